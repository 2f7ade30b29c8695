"""Directions on disk and on the hub, as arrays with their provenance: emmech's own file and those of other tools.

emmech writes one safetensors file, with name, source and quality as JSON in its metadata. repeng writes one tensor
``direction.<layer>`` per layer, where layer ``l`` is the output of block ``l`` (as ``hidden_states[l + 1]``), and
llama.cpp reads the same file. steering-vectors keeps ``layer_activations``, a mapping from layer to vector for
``layer_type="decoder_block"``, which is the block's output too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from emmech.errors import EmmechError

__all__ = ["fetch_file", "push_file", "read_file", "read_repeng", "read_steering_vectors", "write_own"]

FORMAT = "emmech-direction-1"
REPENG = "direction."
_ON_HUB = "direction.safetensors"

# tensors, name, source, and what the quality holds besides arrays
Contents = tuple[dict[str, np.ndarray], str, dict[str, Any], dict[str, Any] | None]


def write_own(
    path: str | Path, tensors: Mapping[str, np.ndarray], name: str, source: Mapping[str, Any], quality: Any = None
) -> Path:
    """Write arrays as tensors; name, source and quality as JSON in the metadata."""
    from safetensors.numpy import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": FORMAT, "name": name, "source": json.dumps(source, default=str)}
    if quality is not None:
        metadata["quality"] = json.dumps(quality)
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path, metadata=metadata)
    return path


def read_file(path: Path) -> Contents:
    """Read what :func:`write_own` wrote, or another tool's file by its ending.

    Raises:
        EmmechError: no such file, damaged, or of another kind.
    """
    if not path.is_file():
        raise EmmechError("read the direction", path, "there is no such file")
    if path.suffix == ".gguf":
        return read_repeng(path)
    if path.suffix in (".pt", ".pth"):
        return read_steering_vectors(path)
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
    quality = json.loads(metadata["quality"]) if "quality" in metadata else None
    return tensors, metadata["name"], json.loads(metadata["source"]), quality


def read_repeng(path: str | Path, n_layers: int | None = None) -> Contents:
    """Read a repeng or llama.cpp control vector.

    Raises:
        EmmechError: not a control vector.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        found = {
            int(tensor.name.removeprefix(REPENG)): np.array(tensor.data, dtype=np.float32)
            for tensor in reader.tensors
            if tensor.name.startswith(REPENG)
        }
    except (ValueError, OSError, IndexError) as error:
        raise EmmechError("read the control vector", path, f"{error}")
    return _stacked(found, n_layers, path, "repeng")


def read_steering_vectors(path: str | Path, n_layers: int | None = None) -> Contents:
    """Read the fields of a ``SteeringVector``, or a mapping from layer to vector; only tensors are unpickled.

    Raises:
        EmmechError: not such a file, or of another layer type than the block's output.
    """
    import torch

    try:
        content: Any = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises several types for a file that is not its own
        instead = 'torch.save({"layer_activations": v.layer_activations, "layer_type": v.layer_type}, path)'
        raise EmmechError("read the steering vector", path, _first_line(error), instead)
    kind = content.get("layer_type", "decoder_block") if isinstance(content, Mapping) else None
    if kind != "decoder_block":
        raise EmmechError(
            "read the steering vector",
            f"{path} with layer_type {kind!r}",
            "only a block's output is the residual stream",
            'layer_type "decoder_block"',
        )
    activations = content.get("layer_activations", content)
    found = {int(layer): value.float().numpy() for layer, value in activations.items()}
    return _stacked(found, n_layers, path, "steering-vectors")


def _stacked(found: Mapping[int, np.ndarray], n_layers: int | None, path: str | Path, tool: str) -> Contents:
    if not found or len({vector.shape for vector in found.values()}) != 1 or min(found) < 0:
        why = "it holds no vectors of one width by layer" if found else "it holds no vectors"
        raise EmmechError(f"read the {tool} file", path, why)
    layers = n_layers or max(found) + 1
    if max(found) >= layers:
        raise EmmechError(
            f"read the {tool} file",
            f"n_layers={n_layers}, vectors up to layer {max(found)}",
            "the file has a vector for a layer after the last one",
            f"n_layers={max(found) + 1} or more",
        )
    vectors = np.zeros((layers, next(iter(found.values())).size), dtype=np.float32)
    for layer, vector in found.items():
        vectors[layer] = vector
    path = Path(path)
    return {"vectors": vectors}, path.stem, {"method": f"imported from {tool}", "file": path.name}, None


def push_file(write: Callable[[Path], Path], repo: str, *, private: bool = True) -> str:
    """Upload what ``write`` puts into a file to the Hugging Face Hub, as ``direction.safetensors``.

    Raises:
        EmmechError: the hub cannot be reached, or refuses.
    """
    import tempfile

    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            file = write(Path(folder) / _ON_HUB)
            return str(api.upload_file(repo_id=repo, path_or_fileobj=str(file), path_in_repo=_ON_HUB))
    except Exception as error:  # offline, no key, no such owner: each has a type of its own
        instead = "Direction.save(path) keeps it on disk"
        raise EmmechError("push the direction to the hub", repo, _first_line(error), instead)


def fetch_file(repo: str) -> str:
    """The path of a direction downloaded from the Hugging Face Hub.

    Raises:
        EmmechError: the hub cannot be reached, or has no such direction.
    """
    from huggingface_hub import hf_hub_download

    try:
        return str(hf_hub_download(repo, _ON_HUB))
    except Exception as error:  # offline, no such repository, a malformed name: each has a type of its own
        instead = "owner/name of a repository that Direction.push_to_hub made"
        raise EmmechError("fetch the direction from the hub", repo, _first_line(error), instead)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
