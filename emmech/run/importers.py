"""Runs that were not recorded here: trajectories that are already arrays, and series of PEFT checkpoints.

Public checkpoint folders can bring plausible nonsense into an analysis (Model Organisms, arXiv 2506.11613, and its
replications): a ``final`` folder that is not the last step, an empty file, or an adapter whose weights never loaded
and which is therefore the identity. Each of these is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from emmech.errors import EmmechError

_KEY = re.compile(r"^(?:(?:module|_orig_mod|base_model\.model)\.)*(.+)\.lora_([AB])(?:\.(.+))?\.weight$")
_NUMBER = re.compile(r"(?:checkpoint|step)[-_]?(\d+)$|^(\d+)$")

_FROM_ARRAYS = "make a run from arrays"

Contents = tuple[np.ndarray, dict[str, np.ndarray], list[dict[str, Any]]]


def read_arrays(steps: Any, a: Any, b: Any) -> Contents:
    """Check trajectories given as arrays, and return the parts of a Run: steps, tensors, adapters."""
    index = np.asarray(steps)
    whole = index.ndim == 1 and len(index) > 0 and np.issubdtype(index.dtype, np.number)
    if not whole or np.any(np.diff(index) <= 0) or np.any(index != index.astype(np.int64)):
        given = f"steps of shape {list(index.shape)}: {index.reshape(-1)[:6].tolist()}"
        why = "steps are whole numbers, each larger than the one before"
        raise EmmechError(_FROM_ARRAYS, given, why, "np.arange(len(B)), or sort by step and drop duplicates")
    arrays = {"B/adapter": _array("B", b, len(index))}
    if a is not None:
        arrays["A/adapter"] = _array("A", a, len(index))
    b, a = arrays["B/adapter"], arrays.get("A/adapter")
    rank = 1 if b.ndim == 2 else int(b.shape[2])
    if a is not None and (1 if a.ndim == 2 else a.shape[1]) != rank:
        instead = "A [steps, rank, d_in] with B [steps, d_out, rank]"
        raise EmmechError(_FROM_ARRAYS, f"A {list(a.shape)}, B {list(b.shape)}", "their ranks differ", instead)
    d_in = int(a.shape[-1]) if a is not None else 0
    entry = _entry("adapter", -1, "adapter", rank, float(rank), 1.0, d_in, int(b.shape[1]))
    return index.astype(np.int64), arrays, [entry]


def _array(name: str, value: Any, steps: int) -> np.ndarray:
    try:
        array = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):
        array = np.empty(0, dtype=np.float32)
    if array.ndim not in (2, 3) or len(array) != steps:
        given = f"{name} of shape {list(array.shape)} for {steps} steps"
        why = "its first axis is not the steps" if array.ndim in (2, 3) else "it needs two or three axes"
        raise EmmechError(_FROM_ARRAYS, given, why, f"{name} of shape [{steps}, d]")
    if not np.isfinite(array).all():
        given = f"{name}, row {int(np.argwhere(~np.isfinite(array))[0][0])}"
        raise EmmechError(_FROM_ARRAYS, given, "it holds NaN or infinity", "drop that record")
    return array


def metric_rows(frame: Any) -> list[dict[str, Any]]:
    """The rows of a table of numbers that is indexed by step, with None where a number is missing.

    Raises:
        EmmechError: a step is no whole number, or a value is no finite number.
    """
    rows = []
    for step, row in frame.to_dict(orient="index").items():
        if not isinstance(step, int | float | np.number) or not np.isfinite(step) or step < 0 or step != int(step):
            given, why = f"metrics with the step {step!r}"[:120], "a step is a whole number, at least 0"
            raise EmmechError(_FROM_ARRAYS, given, why, "metrics indexed by step, or with a column step")
        known = {str(name): value for name, value in row.items() if not pd.isna(value)}
        for name, value in known.items():
            if not isinstance(value, int | float | np.number | np.bool_) or not np.isfinite(value):
                given = f"metrics with {name}={value!r} at step {step}"[:120]
                raise EmmechError(_FROM_ARRAYS, given, "a metric is a finite number", f"metrics.drop(columns={name!r})")
        missing: dict[str, Any] = dict.fromkeys(map(str, row))
        rows.append({"step": int(step), **missing, **{name: float(value) for name, value in known.items()}})
    return rows


def _entry(
    name: str, layer: int, module: str, rank: int, alpha: float, scaling: float, d_in: int, d_out: int
) -> dict[str, Any]:
    return {
        "name": name,
        "layer": layer,
        "module": module,
        "rank": rank,
        "alpha": alpha,
        "scaling": scaling,
        "d_in": d_in,
        "d_out": d_out,
        "rslora": bool(np.isclose(scaling, alpha / rank**0.5)),
    }


def series_in(folder: Path) -> list[Path]:
    """The adapter folders of one folder, which are the folder itself or those in it.

    The output folder of a Trainer holds checkpoints and the last adapter itself. That one counts where its own
    ``trainer_state.json`` has a later step than they do; otherwise it is a copy of one of them.
    """
    inside = sorted(path.parent for path in folder.glob("*/adapter_config.json"))
    if not (folder / "adapter_config.json").is_file():
        return inside or [folder]
    kept = [one for one in inside if one.name.startswith("checkpoint-")]
    if not kept or folder.name.startswith("checkpoint-"):
        return [folder]
    stated = (folder / "trainer_state.json").is_file()
    return [*kept, folder] if stated and _step_of(folder) > max(map(_step_of, kept)) else kept


def holds_series(folder: Path) -> bool:
    """Whether a folder holds adapters in folders of its own, and is not itself that of a model or of one adapter."""
    return not (folder / "config.json").is_file() and holds_adapters(folder) and series_in(folder) != [folder]


def holds_adapters(folder: Path) -> bool:
    """Whether a folder is one that :meth:`Run.from_peft` reads: an adapter's, or one that holds such folders."""
    return all((one / "adapter_config.json").is_file() for one in series_in(folder))


def name_of(folders: Sequence[Path]) -> str:
    """The name of the folder that is given, or that holds all that are given."""
    try:
        return Path(os.path.commonpath([os.path.normpath(folder.absolute()) for folder in folders])).name or "peft"
    except ValueError:  # no folders, or on several drives
        return "peft"


def read_peft(folders: Sequence[Path]) -> tuple[Contents, str]:
    """Read a series of PEFT folders into steps, tensors, adapters, and the base model's name."""
    from emmech.engine.adapters import short_names

    if not folders:
        raise _refuse("no folders were given", Path(), "a list of checkpoint folders")
    steps: dict[int, Path] = {}
    weights: dict[int, dict[str, np.ndarray]] = {}
    seen: dict[str, Path] = {}
    adapters: list[dict[str, Any]] = []
    bases: dict[str, Path] = {}
    for folder in folders:
        config, this_weights = _read_folder(folder)
        step = _step_of(folder)
        if step in steps:
            raise _refuse(f"its step {step} is also that of {steps[step].name}", folder, "give one of the two")
        digest = hashlib.sha256(b"".join(this_weights[key].tobytes() for key in sorted(this_weights))).hexdigest()
        if digest in seen:
            raise _refuse(f"its weights are those of {seen[digest].name}", folder, "give one of the two")
        if weights:
            first = next(iter(weights.values()))
            if [(k, v.shape) for k, v in sorted(this_weights.items())] != [
                (k, v.shape) for k, v in sorted(first.items())
            ]:
                raise _refuse(f"its tensors' shapes differ from those of {folders[0].name}", folder, "one series")
        names = short_names(_modules(this_weights))
        found = [_adapter(module, *names[module], this_weights, config, folder) for module in names]
        if adapters and found != adapters:
            raise _refuse(f"its lora_alpha or use_rslora differs from {folders[0].name}'s", folder, "one series")
        base = str(config.get("base_model_name_or_path") or "")
        if base:
            bases.setdefault(base, folder)
        if len(bases) > 1:
            other, named_by = next(iter(bases.items()))
            why = f"its base model {base!r} is not that of {named_by.name}, {other!r}"
            raise _refuse(why, folder, "one series; base_model_name_or_path in adapter_config.json names the model")
        seen[digest], steps[step], weights[step], adapters = folder, folder, this_weights, found
    order = sorted(steps)
    arrays: dict[str, np.ndarray] = {}
    for entry in adapters:
        a, b = (np.stack([weights[step][f"{side} {entry['module']}"] for step in order]) for side in "AB")
        if entry["rank"] == 1:
            a, b = a[:, 0], b[:, :, 0]
        arrays |= {f"A/{entry['name']}": a, f"B/{entry['name']}": b}
    return (np.array(order, dtype=np.int64), arrays, adapters), next(iter(bases), "")


def logged(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """What the Trainer logged until the last of these checkpoints, as rows of a run's metrics."""
    states = [folder for folder in folders if (folder / "trainer_state.json").is_file()]
    if not states:
        return []
    state = json.loads((max(states, key=_step_of) / "trainer_state.json").read_text(encoding="utf-8"))
    found = []
    for row in entries if isinstance(entries := state.get("log_history"), list) else ():
        step = row.get("step") if isinstance(row, dict) else None
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            continue
        # the last row is a summary of the whole training
        numbers = {
            str(name): float(value)
            for name, value in row.items()
            if isinstance(value, int | float) and name != "step" and not name.startswith(("train_", "total_flos"))
        }
        if numbers and all(map(math.isfinite, numbers.values())):
            found.append({"step": step, **numbers})
    return found


def model_entry(name: str) -> dict[str, Any]:
    """What a base model's name tells: its depth and width too, where its configuration is on this disk."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    entry: dict[str, Any] = {"name": name or None}
    file: Any = Path(name) / "config.json"
    if name and not file.is_file():
        try:
            file = try_to_load_from_cache(name, "config.json")
        except HFValidationError:  # a path
            file = None
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8")) if name and isinstance(file, str | Path) else {}
        config = config.get("text_config", config)
        shape = {"n_layers": config.get("num_hidden_layers"), "d_model": config.get("hidden_size")}
    except (OSError, ValueError, AttributeError):
        return entry
    return entry | {key: value for key, value in shape.items() if isinstance(value, int)}


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The configuration, and the tensors as ``"A <module>"`` and ``"B <module>"``."""
    from safetensors import SafetensorError, safe_open

    from emmech.engine.adapters import bare, beyond_pairs

    if not folder.is_dir():
        raise _refuse("there is no such folder", folder, "a folder with adapter_model.safetensors")
    if (folder / "run.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise _refuse("it is a recorded run already", folder, f"emmech.load_run({str(folder)!r})")
    if (folder / "adapter_model.bin").is_file() and not (folder / "adapter_model.safetensors").is_file():
        why = "adapter_model.bin is a pickle, which runs code of its maker when it is opened"
        how = "safetensors.torch.save_file(torch.load(path, weights_only=True), 'adapter_model.safetensors')"
        raise _refuse(why, folder, f"convert it where you trust it: {how}")
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            tensors = {key: file.get_tensor(key).float().numpy() for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        name = Path(str(error.filename or error)).name
        inside = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
        instead = f"one of its folders: {', '.join(inside[:5])}" if inside else "a folder that save_pretrained wrote"
        raise _refuse(f"{name} is missing", folder, instead)
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise _refuse(f"its files cannot be read: {error}", folder, "download it again")
    if not isinstance(config, dict):
        raise _refuse("adapter_config.json is no JSON object", folder, "download it again")
    if (field := beyond_pairs(config)) is not None:
        why = f"{field} in adapter_config.json makes it more than B A with a factor"
        how = "PeftModel.from_pretrained(base, folder).merge_and_unload()"
        raise _refuse(why, folder, f"merge it in PEFT: {how}, and load_model that")
    matches = {key: _KEY.match(key) for key in tensors}
    strange = [key for key, match in matches.items() if match is None]
    if len(names := sorted({match[3] or "" for match in matches.values() if match is not None})) > 1:
        raise _refuse(f"it holds several adapters, {', '.join(map(repr, names[:5]))}", folder, "a file of one adapter")
    found = {f"{match[2]} {bare(match[1])}": tensors[key] for key, match in matches.items() if match is not None}
    if len(found) + len(strange) < len(matches):
        raise _refuse("two of its keys are the same side of one module", folder, "a file of one adapter")
    halves = [key for key in found if f"{'B' if key[0] == 'A' else 'A'} {key[2:]}" not in found]
    if not found:
        raise _refuse("it holds no lora_A / lora_B tensors", folder, "a LoRA adapter")
    if strange or halves:
        half = f"lora_{halves[0][0]} of {halves[0][2:]} without the other half" if halves else ""
        why = f"it holds {f'the tensor {strange[0]}' if strange else half}, which is no part of a plain LoRA pair"
        raise _refuse(why, folder, "merge it in PEFT and load that")
    if (stray := next((module for module in _modules(found) if not _chosen(module, config, folder)), None)) is not None:
        why = f"it holds a pair of {stray}, which target_modules and the like in adapter_config.json leave out"
        raise _refuse(why, folder, "the adapter_config.json that was saved with these tensors")
    if not all(np.isfinite(value).all() for value in found.values()):
        raise _refuse("it holds NaN or infinity", folder, "leave it out")
    if not any(found[f"B {module}"].any() for module in _modules(found)):
        why = "B is zero everywhere: the adapter is the identity (untrained, or its weights did not load)"
        raise _refuse(why, folder, "leave it out; the base model is step 0 by definition")
    return config, found


def _chosen(module: str, config: dict[str, Any], folder: Path) -> bool:
    """Whether PEFT puts an adapter on a module; it passes over the tensors of any other."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if config.get("target_modules") == "all-linear":  # of the blocks: the map to the vocabulary is left out
        if "." not in module or not re.search(r"\.\d+\.", module):
            return False
        config = config | {"target_modules": [module.rpartition(".")[2]]}
    try:
        return bool(
            check_target_module_exists(
                SimpleNamespace(**({"target_modules": None, "target_parameters": None} | config)), module
            )
        )
    except (TypeError, AttributeError, ValueError, re.error) as error:
        why = f"its target_modules and the like in adapter_config.json choose nothing ({error})"
        raise _refuse(why, folder, "the adapter_config.json that was saved with these tensors")


def _modules(weights: dict[str, np.ndarray]) -> list[str]:
    return [key[2:] for key in weights if key.startswith("A ")]


def _adapter(
    module: str, name: str, layer: int, weights: dict[str, np.ndarray], config: dict[str, Any], folder: Path
) -> dict[str, Any]:
    a, b = weights[f"A {module}"], weights[f"B {module}"]
    try:
        rank = _by_pattern(config.get("rank_pattern"), module, config.get("r", 8))
        alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    except (AttributeError, TypeError, re.error) as error:
        why = f"its rank_pattern or alpha_pattern is no mapping of regular expressions: {error}"
        raise _refuse(why, folder, "the adapter_config.json that was saved with these tensors")
    if type(rank) is not int or a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
        why = f"{module} has A {list(a.shape)} and B {list(b.shape)}, but rank {rank!r} in adapter_config.json"
        raise _refuse(why, folder, "the adapter_config.json that was saved with these tensors")
    if not isinstance(alpha, int | float) or not 0 < abs(alpha) <= 1e30:
        raise _refuse(f"its lora_alpha is {alpha!r}, so the adapter writes nothing or NaN", folder, "a number, not 0")
    scaling = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    return _entry(name, layer, module, rank, float(alpha), scaling, int(a.shape[1]), int(b.shape[0]))


def _by_pattern(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's value for a module: that of the first regular expression to match the end of its path, or the default."""
    pattern = {} if pattern is None else pattern
    return next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", module)), default)


def _step_of(folder: Path) -> int:
    state = folder / "trainer_state.json"
    if state.exists():
        try:
            return _index(json.loads(state.read_text(encoding="utf-8"))["global_step"])
        except (ValueError, TypeError, LookupError, OSError, RecursionError) as error:
            raise _refuse(f"its trainer_state.json has no step: {error}", folder, "delete that file, or mend it")
    match = _NUMBER.search(folder.name)
    if match is None or len(match[1] or match[2]) > 18:  # more does not fit 64 bits
        why = "its step is unknown: neither trainer_state.json nor a number in its name"
        raise _refuse(why, folder, "rename it to checkpoint-STEP ('final' is not always the last step)")
    return int(match[1] or match[2])


def _index(step: Any) -> int:
    if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**63:
        return step
    raise ValueError(f"{step!r:.60} is no number of steps")


def _refuse(why: str, folder: Path, instead: str) -> EmmechError:
    return EmmechError("read the PEFT checkpoints", folder, why, instead)
