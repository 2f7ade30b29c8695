"""Directions to and from other tools: repeng and llama.cpp control vectors (GGUF), steering-vectors (a torch file)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from emmech.directions.direction import Direction
from emmech.directions.files import REPENG, read_repeng, read_steering_vectors

__all__ = ["from_repeng", "from_steering_vectors", "to_repeng", "to_steering_vectors"]


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
        writer.add_tensor(f"{REPENG}{layer}", np.ascontiguousarray(direction.vectors[layer]))
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
    tensors, name, source, _ = read_repeng(path, n_layers)
    return Direction(tensors["vectors"], name, source)


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
    tensors, name, source, _ = read_steering_vectors(path, n_layers)
    return Direction(tensors["vectors"], name, source)
