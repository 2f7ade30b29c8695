"""A run as an organism of diffing-toolkit, whose methods compare a fine-tune with its base.

The toolkit (science-of-finetuning/diffing-toolkit) finds organisms and models by the YAML files in its folder
``configs``. An organism names its fine-tunes by model and variant; here a variant is a recorded step.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from emmech.errors import EmmechError, as_ints, check_folder, refusal
from emmech.run.run import as_run
from emmech.store import kept, write_text


def write_organism(
    run: Any,
    folder: str | Path,
    *,
    name: str | None = None,
    steps: Iterable[int] | int | None = None,
    model_id: str | None = None,
    description: str = "",
) -> Path:
    """Write a run's adapters with the files by which diffing-toolkit finds them.

    ``<folder>/configs`` is copied into the toolkit's own ``configs``::

        python main.py organism=<name> model=<model> organism_variant=step_100

    The variant ``default`` is the last of the steps. Adapters are read from where they were written: move the folder
    first, then write.

    Args:
        run: a LoRA run or its folder.
        folder: made if it is not there; it gets ``adapters/``, ``configs/organism/`` and ``configs/model/``, and
            ``base/`` where the base model is neither on the hub nor in a folder.
        name: of the organism; by default the run's.
        steps: recorded ones; by default the last.
        model_id: the base model as transformers finds it, a hub name or a folder.
        description: what the fine-tune is, for methods that compare their finding with it.

    Returns:
        the organism's file.

    Raises:
        EmmechError: a run without adapters, a step that was not recorded, a name that is no file name, or a folder
            that cannot be written.

    Example:
        >>> import emmech, tempfile
        >>> file = write_organism("checkpoints/pocket-medical", tempfile.mkdtemp(), steps=[100, 250])
        >>> file.name, sorted(one.name for one in (file.parents[2] / "adapters").iterdir())
        ('pocket-medical.yaml', ['step_100', 'step_250'])
    """
    import yaml

    asked = "write an organism for diffing-toolkit"
    check_folder(asked, "folder", folder)
    run = as_run(asked, run)
    name = name or run.name
    if not name or Path(name).name != name or name.startswith("."):
        raise refusal(asked, "name", name, "it names a file and a folder", 'name="my-organism"')
    if not run.adapters:
        why = "only adapters are written, and this run has none"
        raise EmmechError(asked, run.name, why, "a LoRA run, or the model's own save_pretrained")
    chosen = [int(run.steps[-1])] if steps is None else as_ints(asked, "steps", steps)
    if not chosen:
        raise refusal(asked, "steps", chosen, "there is no step to write", "steps=None for the last")
    folder = Path(folder).resolve()
    variants = {}
    for step in chosen:
        place = run.export_peft(step, folder / "adapters" / f"step_{step}")
        variants[f"step_{step}"] = {"adapter_id": str(place)}
    variants["default"] = dict(variants[f"step_{chosen[-1]}"])
    named = str(model_id or run.manifest.get("model", {}).get("name") or "")
    if not named:
        why = "the run does not say from which model it started"
        raise EmmechError(asked, run.name, why, 'model_id= its folder or its name, as "Qwen/Qwen2.5-0.5B-Instruct"')
    base = named
    if model_id is None and not Path(base).is_dir() and "/" not in base:
        chat = run.base()
        with kept(asked, folder / "base"):
            chat.model.save_pretrained(folder / "base")
            chat.tokenizer.save_pretrained(folder / "base")
        base = str(folder / "base")
    base = str(Path(base).resolve()) if Path(base).is_dir() else base
    model = Path(base).name if Path(base).name != "base" else Path(named).name
    said = description or f"Fine-tune {run.name}, recorded by emmech"
    organism = {
        "name": name,
        "description": said.splitlines()[0],
        "description_long": said,
        "type": "EM",
        "finetuned_models": {model: variants},
    }
    settings = {
        "name": model,
        "model_id": base,
        "end_of_turn_token": None,
        "attn_implementation": None,
        "token_level_replacement": None,
        "dtype": "float32",
        "ignore_first_n_tokens_per_sample_during_collection": 0,
        "ignore_first_n_tokens_per_sample_during_training": 0,
        "has_enable_thinking": False,
        "disable_compile": False,
        "chat_template": None,
    }
    for kind, file, content in (("model", model, settings), ("organism", name, organism)):
        written = folder / "configs" / kind / f"{file}.yaml"
        write_text(written, f"# @package {kind}\n{yaml.safe_dump(content, sort_keys=False)}")
    return written
