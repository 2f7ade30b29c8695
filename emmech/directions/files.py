"""Directions on disk and on the hub: one safetensors file, with the provenance in its metadata."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from emmech.directions.direction import Direction
from emmech.directions.quality import Quality
from emmech.errors import EmmechError

__all__ = ["push_direction", "read_direction", "write_direction"]

FORMAT = "emmech-direction-1"
_ON_HUB = "direction.safetensors"


def write_direction(direction: Direction, path: str | Path) -> Path:
    """Write vectors, aligned mean and quality as tensors; name and source as JSON in the metadata."""
    from safetensors.numpy import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"vectors": np.ascontiguousarray(direction.vectors)}
    if direction.aligned_mean is not None:
        tensors["aligned_mean"] = np.ascontiguousarray(direction.aligned_mean)
    source = json.dumps(direction.source, default=str)
    metadata = {"format": FORMAT, "name": direction.name, "source": source}
    if direction.quality is not None:
        arrays, rest = direction.quality.pack()
        tensors |= {f"quality/{key}": value for key, value in arrays.items()}
        metadata["quality"] = json.dumps(rest)
    save_file(tensors, path, metadata=metadata)
    return path


def read_direction(path: str | Path) -> Direction:
    """Read what :func:`write_direction` wrote, another tool's file by its ending, or ``hub:owner/name``.

    Raises:
        EmmechError: no such file, damaged, or of another kind; or the hub does not give it.
    """
    if isinstance(path, str) and path.startswith("hub:"):
        path = _from_hub(path.removeprefix("hub:"))
    path = Path(path)
    if not path.is_file():
        raise EmmechError("read the direction", path, "there is no such file")
    if path.suffix in (".gguf", ".pt", ".pth"):
        from emmech.directions.control_vectors import from_repeng, from_steering_vectors

        return from_repeng(path) if path.suffix == ".gguf" else from_steering_vectors(path)
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except Exception as error:  # safetensors has its own error type, and a torn file another
        raise EmmechError("read the direction", path, f"{error}")
    if metadata.get("format") != FORMAT:
        raise EmmechError(
            "read the direction",
            f"{path} with format {metadata.get('format')!r}",
            "it was not written by Direction.save",
            "Direction(vectors) from its arrays",
        )
    quality = None
    if "quality" in metadata:
        arrays = {k.removeprefix("quality/"): v for k, v in tensors.items() if k.startswith("quality/")}
        quality = Quality.unpack(arrays, json.loads(metadata["quality"]))
    source = json.loads(metadata["source"])
    return Direction(tensors["vectors"], metadata["name"], source, tensors.get("aligned_mean"), quality)


def push_direction(direction: Direction, repo: str, *, private: bool = True) -> str:
    """Upload to the Hugging Face Hub as ``direction.safetensors``.

    Raises:
        EmmechError: the hub cannot be reached, or refuses.
    """
    import tempfile

    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            file = write_direction(direction, Path(folder) / _ON_HUB)
            return str(api.upload_file(repo_id=repo, path_or_fileobj=str(file), path_in_repo=_ON_HUB))
    except Exception as error:  # offline, no key, no such owner: each has a type of its own
        raise EmmechError(
            "push the direction to the hub", repo, _first_line(error), "Direction.save(path) keeps it on disk"
        )


def _from_hub(repo: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        return str(hf_hub_download(repo, _ON_HUB))
    except Exception as error:  # offline, no such repository, a malformed name: each has a type of its own
        raise EmmechError(
            "fetch the direction from the hub",
            repo,
            _first_line(error),
            "owner/name of a repository that Direction.push_to_hub made",
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
