"""A decoding step of a sweep: one new token of every row, below where variants part and above it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float, Int

from emmech.engine.block_forward import straight
from emmech.engine.row_adapters import Rows
from emmech.engine.shared_prompt_cache import Branches, branching
from emmech.engine.variants import Engine, Mode, Shared

__all__ = ["Steps"]


class Steps:
    """An engine's passes for rows of one token each, behind a cache.

    Blocks that are known are run straight; others by the model's own forward.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.lower, self.upper = (straight(view, engine.chat) for view in (engine.lower, engine.upper))
        self.embed: Any = engine.chat.trunk.get_input_embeddings()
        self.modules = copy.copy(engine)
        self.modules.lower, self.modules.upper = branching(engine.lower), branching(engine.upper)

    def below(
        self, tokens: Int[torch.Tensor, " rows"], positions: Int[torch.Tensor, " rows"], cache: Branches
    ) -> Shared:
        """Run tokens up to where the variants part; ``[rows, 1, ...]``."""
        engine = self.engine
        if self.lower is None:
            blank, nothing = self._unmasked(), torch.empty(0)
            return self.modules.lowered(tokens[:, None], blank, positions[:, None], nothing, cache=cache)
        with torch.no_grad(), Mode(engine.chat):
            hidden = self.lower(self.embed(tokens), positions, cache)
        read = wrote = None
        if engine.capture is not None:
            read, wrote = (one[:, None] for one in engine.capture.taken())
        return Shared(hidden[:, None], read, wrote, None, None, torch.empty(0))

    def above(
        self,
        hidden: Float[torch.Tensor, "rows d_model"],
        positions: Int[torch.Tensor, " rows"],
        rows: Rows,
        cache: Branches,
    ) -> Float[torch.Tensor, "rows d_model"]:
        """Run rows, each with its own adapters, through what is above, final norm included."""
        if self.upper is None:
            blank = self._unmasked()
            return self.modules.raised(hidden[:, None], blank, positions[:, None], rows, cache=cache)[:, 0]
        own = self.engine.rows
        own.A, own.B, own.steering = rows.A, rows.B, rows.steering
        with torch.no_grad(), Mode(self.engine.chat):
            return self.upper(hidden, positions, cache)

    def _unmasked(self) -> Any:
        """A mask for a model whose attention does not look at it, so that it need not make one."""
        chat = self.engine.chat
        blank = torch.zeros(1, 1, 1, 1, dtype=chat.dtype, device=chat.device)
        kinds = set(getattr(chat.config, "layer_types", None) or ())
        return dict.fromkeys(kinds | {"full_attention"}, blank) if "sliding_attention" in kinds else blank
