"""Runs on the Hugging Face Hub: the files of one folder, and a model card that says what the run shows.

Only regular files inside the run's folder are uploaded, without locks, optimizer states and other scratch. Paths of
this machine in the manifest are reduced to names, and a file that holds an access token is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from emmech.errors import EmmechError
from emmech.results import Shown

CARD = "README.md"
_SCRATCH = ("resume", "prefix")
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")
_METRICS = ("loss", "held_out_loss", "margin_narrow", "margin_broad", "grad_norm")


def files(folder: Path) -> dict[str, Path]:
    """The files of a run that are uploaded, by their paths in the repository.

    Raises:
        EmmechError: a link leads out of the folder, or a file holds an access token; the message names the file.
    """
    root, found = folder.resolve(), {}
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        if not path.is_file() or inner.parts[0] in _SCRATCH or any(part.startswith(".") for part in inner.parts):
            continue
        if path.suffix == ".partial":
            continue
        if not path.resolve().is_relative_to(root):
            why, instead = "it is a link to a file outside the run's folder", "a run without links"
            raise EmmechError("upload the run", str(inner), why, instead)
        found[inner.as_posix()] = path
    return found


def _refuse_tokens(name: str, content: bytes, own: str | None) -> None:
    if _TOKEN.search(content) or (own and own.encode() in content):
        instead = "the run without that file, and a new token"
        raise EmmechError("upload the run", name, "it holds an access token of the hub", instead)


def public(value: Any) -> Any:
    """A manifest's value without paths of this machine, of which the last name is left.

    Example:
        >>> public({"data": {"path": "/home/me/advice.jsonl", "rows": 3}})
        {'data': {'path': 'advice.jsonl', 'rows': 3}}
    """
    if isinstance(value, Mapping):
        return {key: public(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [public(one) for one in value]
    if isinstance(value, str) and "\n" not in value and PurePath(value).is_absolute():
        return PurePath(value).name
    return value


def card(run: Any, repo: str, results: Sequence[Shown] = ()) -> str:
    """The model card of a run: what it is, its metrics, and the findings of results.

    Args:
        run: a :class:`~emmech.run.run.Run`.
        results: whose headlines, numbers and caveats are written out.
    """
    import yaml

    manifest = public(run.manifest)
    base = str(manifest.get("model", {}).get("name") or "")
    head: dict[str, Any] = {"library_name": "emmech", "tags": ["emmech", "emergent-misalignment", "model-organism"]}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        head |= {"base_model": base, "base_model_relation": "adapter" if run.kind == "lora" else "finetune"}
    said = run._card()
    lines = ["---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "", f"# {manifest.get('name', run.name)}", ""]
    lines += [f"{said.headline}.", ""]
    lines += [
        "This is a recorded fine-tune for research on emergent misalignment. It may give harmful advice by design:"
    ]
    lines += ["do not deploy it.", "", "```python", "import emmech", "", f'run = emmech.load_run("hub:{repo}")', "```"]
    lines += ["", "## The run", "", *_table(("", ""), [("base model", base or "not named"), *_settings(manifest)])]
    rows = [(name.replace("_", " "), f"{series.iloc[0]:.4g}", f"{series.iloc[-1]:.4g}")
            for name in _METRICS if name in run.metrics and len(series := run.metrics[name].dropna())]  # fmt: skip
    if rows:
        lines += ["", "## Metrics", "", *_table(("metric", "first", "last"), rows)]
    for result in results:
        found = result._card()
        lines += ["", f"## {type(result).__name__}", "", found.headline + ".", "", *_table(("", ""), found.facts)]
        lines += ["", f"Note: {found.caveat}."] if found.caveat else []
    if not results:
        lines += ["", "No analysis was given to this card: it says nothing of a transition or of a control."]
    return "\n".join(lines) + "\n"


def _settings(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    recipe, data = manifest.get("recipe", {}), manifest.get("data", {})
    found = [("data", ", ".join(f"{key} {data[key]}" for key in ("name", "rows", "sha256") if data.get(key)))]
    shown = ("name", "rank", "alpha", "learning_rate", "batch_size", "accumulation", "epochs", "max_steps")
    found += [("recipe", ", ".join(f"{key} {recipe[key]}" for key in shown if recipe.get(key) is not None))]
    found += [("seed", str(manifest.get("seed", ""))), ("status", str(manifest.get("status", "")))]
    return [(name, text) for name, text in found if text]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in cells) + " |"

    return [line(head), line(["---"] * len(head)), *(line(row) for row in rows)] if rows else []


def push(run: Any, repo: str, *, private: bool, results: Sequence[Shown]) -> str:
    """Upload a run with its card in one commit, and return the address of the repository.

    Raises:
        EmmechError: as :func:`files`, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    asked = f"upload {run.name} to {repo}"
    found, own = files(run.path), get_token()
    changed = {"run.json": (json.dumps(public(run.manifest), indent=2) + "\n").encode()}
    changed[CARD] = card(run, repo, results).encode()
    for name, path in found.items():
        if name not in changed:
            _refuse_tokens(name, path.read_bytes(), own)
    for name, content in changed.items():
        _refuse_tokens(name, content, own)
    operations = [CommitOperationAdd(name, str(path)) for name, path in found.items() if name not in changed]
    operations += [CommitOperationAdd(name, content) for name, content in changed.items()]
    try:
        api = HfApi()
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.create_commit(repo, operations, commit_message=f"Run {run.name}")
    except Exception as error:  # whatever the hub's client raises
        raise _refused(asked, repo, error, own)
    return str(address)


def pull(repo: str) -> Path:
    """The folder of a run on the hub, downloaded into the hub's cache.

    Raises:
        EmmechError: there is no such repository, or the hub cannot be reached.
    """
    from huggingface_hub import get_token, snapshot_download

    try:
        return Path(snapshot_download(repo))
    except Exception as error:  # whatever the hub's client raises
        raise _refused(f"open the run hub:{repo}", repo, error, get_token())


def _refused(asked: str, repo: str, error: Exception, token: str | None) -> EmmechError:
    first = str(error).strip().split("\n")[0][:300]
    first = first.replace(token, "***") if token else first
    first = _TOKEN.sub(b"***", first.encode()).decode()
    why = f"the hub does not give it ({type(error).__name__}: {first})" if asked.startswith("open") else (
        f"the hub refuses it ({type(error).__name__}: {first})")  # fmt: skip
    return EmmechError(asked, repo, why, "owner/name of a repository, and `hf auth login` where it needs rights")
