"""Directions in the files of other tools: repeng control vectors (GGUF) and steering-vectors (a torch file).

repeng writes one tensor ``direction.<layer>`` per layer, where layer ``l`` is the output of block ``l`` (as
``hidden_states[l + 1]``), and llama.cpp reads the same file. steering-vectors keeps ``layer_activations``, a mapping
from layer to vector for ``layer_type="decoder_block"``, which is the block's output too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from emmech.directions.direction import Direction
from emmech.errors import EmmechError

__all__ = ["from_repeng", "from_steering_vectors", "to_repeng", "to_steering_vectors"]

_REPENG = "direction."


def to_repeng(direction: Direction, path: str | Path, *, model_type: str = "llama") -> Path:
    """Write a control vector as repeng and llama.cpp read it; layers of norm zero are left out.

    Args:
        model_type: the architecture's name in GGUF (``"qwen2"``, ``"llama"``, ...).
    """
    import gguf

    path = Path(path)
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", model_type)
    writer.add_uint32("controlvector.layer_count", len(direction.layers))
    for layer in direction.layers:
        writer.add_tensor(f"{_REPENG}{layer}", np.ascontiguousarray(direction.vectors[layer]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def from_repeng(path: str | Path, *, n_layers: int | None = None) -> Direction:
    """Read a repeng or llama.cpp control vector.

    Args:
        n_layers: layers of the model, which the file does not say; by default one more than the last in the file.

    Raises:
        EmmechError: not a control vector.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        found = {
            int(tensor.name.removeprefix(_REPENG)): np.array(tensor.data, dtype=np.float32)
            for tensor in reader.tensors
            if tensor.name.startswith(_REPENG)
        }
    except (ValueError, OSError, IndexError) as error:
        raise EmmechError("read the control vector", path, f"{error}")
    return _stacked(found, n_layers, path, "repeng")


def to_steering_vectors(direction: Direction, path: str | Path) -> Path:
    """Write the fields of a steering-vectors ``SteeringVector``: ``SteeringVector(**torch.load(path))`` makes one."""
    import torch

    activations = {layer: torch.from_numpy(direction.vectors[layer].copy()) for layer in direction.layers}
    torch.save({"layer_activations": activations, "layer_type": "decoder_block"}, path)
    return Path(path)


def from_steering_vectors(path: str | Path, *, n_layers: int | None = None) -> Direction:
    """Read the fields of a ``SteeringVector``, or a mapping from layer to vector; only tensors are unpickled.

    Raises:
        EmmechError: not such a file, or of another layer type than the block's output.
    """
    import torch

    try:
        content: Any = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises several types for a file that is not its own
        first = str(error).split("\n")[0][:160]
        raise EmmechError(
            "read the steering vector",
            path,
            first,
            'torch.save({"layer_activations": v.layer_activations, "layer_type": v.layer_type}, path)',
        )
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


def _stacked(found: Mapping[int, np.ndarray], n_layers: int | None, path: str | Path, tool: str) -> Direction:
    if not found or len({vector.shape for vector in found.values()}) != 1 or min(found) < 0:
        raise EmmechError(
            f"read the {tool} file",
            path,
            "it holds no vectors of one width by layer" if found else "it holds no vectors",
        )
    layers = n_layers or max(found) + 1
    if max(found) >= layers:
        raise EmmechError(
            f"read the {tool} file",
            f"n_layers={n_layers}, vectors up to layer {max(found)}",
            "a vector lies behind the last layer",
            f"n_layers={max(found) + 1} or more",
        )
    vectors = np.zeros((layers, next(iter(found.values())).size), dtype=np.float32)
    for layer, vector in found.items():
        vectors[layer] = vector
    return Direction(vectors, Path(path).stem, {"method": f"imported from {tool}", "file": Path(path).name})
