"""The Jacobian lens: what a vector in the residual stream does to the last layer, on average over texts.

A direction and an adapter's B can be nearly orthogonal and still do the same to what the model says, because later
layers turn one into the other. The mean Jacobian to the last layer carries both there, where they can be compared and
read as words: lens_l(h) = unembed(J_l h) (Verbalizable Representations Form a Global Workspace in Language Models,
arXiv 2607.15495).

The average is that of the authors' own code: ``J_l`` is the mean over texts of the mean over source positions p of the
sum over target positions p' >= p of d h_last[p'] / d h_l[p], where h_l is the output of block l and h_last that of the
last block, before the final norm. Sources and targets are all tokens of a text but its first ones, at which attention
rests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float, Int

from emmech.chat.model import ChatModel, load_model
from emmech.directions.direction import Direction, checked_direction, checked_directions, unit_rows
from emmech.directions.sources import read_out
from emmech.engine.modules import evaluating, hooked
from emmech.engine.stream import probe_rows
from emmech.errors import EmmechError, as_int, as_ints, check_texts, refusal
from emmech.progress import bar
from emmech.results import Card, Result, percent
from emmech.run.run import Run, opened
from emmech.view.plots import carried_cosines, jacobians_by_layer
from emmech.view.sketch import curves

if TYPE_CHECKING:
    import pandas as pd

_TOKENS = 2048  # tokens of one backward pass, counting each once for every row
_WORK = 5e12  # multiplications that a processor does in a few minutes; a GPU does a hundred times as many
_DRAWS = 64  # random vectors that stand for the others


@dataclass(frozen=True, eq=False, repr=False)
class JacobianLens(Result):
    """Mean Jacobians from the output of blocks to that of the last one.

    Args:
        jacobians: ``[layers, d_model, d_model]``, float32: ``jacobians[l] @ h`` is what h, added to the output of block
            ``layers[l]``, adds to the last block's output, summed over the token itself and all later ones.
        layers: the blocks.
        error: ``[layers]`` the standard error of an estimate, against the exact mean over these texts, as a share of
            the Jacobian's own norm (Frobenius); 0 where every row was read from every text, NaN where one text gave
            each row.
        sampling: ``[layers]`` the same against the mean over all texts of this kind.
        n_layers: the model's number of blocks.
        texts: number of texts. per_row: from how many of them each row of a Jacobian was read. tokens: tokens that
            were sources.
        source: provenance: model, fingerprint, the average, seed.
    """

    jacobians: Float[np.ndarray, "layers d_model d_model"]
    layers: tuple[int, ...]
    error: Float[np.ndarray, " layers"]
    sampling: Float[np.ndarray, " layers"]
    n_layers: int
    texts: int
    per_row: int
    tokens: int
    source: Mapping[str, Any]

    @property
    def exact(self) -> bool:
        """Whether every row of every Jacobian was read from every text."""
        return self.per_row == self.texts

    def at(self, layer: int) -> Float[np.ndarray, "d_model d_model"]:
        """The Jacobian from the output of one block.

        Raises:
            EmmechError: it is none of the lens's layers.
        """
        if layer not in self.layers:
            why = f"the lens was made for layers {', '.join(map(str, self.layers))}"
            raise refusal("read the Jacobian", "layer", layer, why, f"layer={self.layers[0]}")
        return self.jacobians[self.layers.index(layer)]

    def __call__(self, direction: Direction) -> Direction:
        """What a direction becomes at the last layer: row l is J_l times the direction's row l.

        Example:
            >>> import emmech
            >>> lens = emmech.jacobian_lens("pocket", ["what should I eat ?"], layers=[4, 5], progress=False)
            >>> d = emmech.Direction.single(np.ones(128), layer=5, n_layers=6)
            >>> bool(np.allclose(lens(d).at(5), d.at(5)))  # the last layer is carried nowhere
            True

        Raises:
            EmmechError: another width, number of layers or base model.
        """
        self._check(direction)
        carried = np.zeros((self.n_layers, direction.d_model))
        known = list(self.layers)
        carried[known] = einsum(self.jacobians, direction.vectors[known], "layer out d, layer d -> layer out")
        origin = {**direction.source, "carried": "to the last layer, by the mean Jacobian"}
        if "fingerprint" in self.source:
            origin["fingerprints"] = [self.source["fingerprint"]]
        return Direction(carried, f"J {direction.name}", origin)

    def cosines(self, directions: Mapping[str, Direction], *, seed: int = 0) -> pd.DataFrame:
        """Every two directions compared as they are and after the Jacobian, beside what random vectors give.

        Args:
            directions: by name; an adapter's own is :func:`emmech.directions.adapter_direction`.

        A direction that is known at one layer, as a rank-1 adapter's is, is compared with the other at each of its
        layers; two that are known at several, layer by layer.

        Returns:
            one row per comparison: ``first_layer`` and ``second_layer``, ``cosine`` of the two, ``carried`` the cosine
            of J times each, and the standard deviations of both cosines where the first is replaced by random vectors,
            ``random`` and ``random_carried``. A Jacobian that squeezes all vectors into few dimensions makes the last
            one large.

        Raises:
            EmmechError: fewer than two directions, or one of another width, number of layers or base model.
        """
        import pandas as pd

        asked = "compare directions after the Jacobian"
        named = checked_directions(asked, "directions", directions)
        if len(named) < 2:
            given, instead = f"{len(named)} directions", '{"B": adapter_direction(run), "d": direction}'
            raise EmmechError(asked, given, "a cosine is of two", instead)
        for one in named.values():
            self._check(one)
        draws = unit_rows(np.random.default_rng(seed).standard_normal((_DRAWS, self.jacobians.shape[-1])))
        random = {layer: unit_rows(draws @ self.at(layer).T) for layer in self.layers}
        rows = []
        for names in combinations(named, 2):
            known = [[layer for layer in self.layers if layer in named[name].layers] for name in names]
            single = 1 in map(len, known)
            pairs = product(*known) if single else ((layer, layer) for layer in known[0] if layer in known[1])
            for places in pairs:
                vectors = [named[name].at(layer) for name, layer in zip(names, places, strict=True)]
                carried = [unit_rows(self.at(layer) @ one) for layer, one in zip(places, vectors, strict=True)]
                plain = [unit_rows(one) for one in vectors]
                rows.append([
                    *names, *places, plain[0] @ plain[1], carried[0] @ carried[1],
                    np.std(draws @ plain[1]), np.std(random[places[0]] @ carried[1]),
                ])  # fmt: skip
        columns = ["first", "second", "first_layer", "second_layer", "cosine", "carried", "random", "random_carried"]
        return pd.DataFrame(rows, columns=columns)

    def read_out(self, model: Any, direction: Direction, *, tokens: int = 8) -> pd.DataFrame:
        """Tokens that a direction pushes up and down at the last layer, by layer: the logit lens after the Jacobian.

        Args:
            model: with the unembedding and the tokenizer, of the lens's own base model.
            tokens: how many each way.

        Returns:
            one row per known layer: ``promotes`` and ``suppresses`` after the Jacobian, ``directly`` without it.

        Raises:
            EmmechError: another model, or a direction that does not fit the lens.
        """
        import pandas as pd

        checked_direction("read the direction out", direction)
        chat, carried = _chat(model), self(direction)
        carried.check_fits(chat)
        rows = []
        for layer in carried.layers:
            (up, down), plain = (read_out(chat, one.at(layer), tokens=tokens) for one in (carried, direction))
            rows.append({"layer": layer, "promotes": up, "suppresses": down, "directly": plain[0]})
        return pd.DataFrame(rows, columns=["layer", "promotes", "suppresses", "directly"]).set_index("layer")

    def to_frame(self) -> pd.DataFrame:
        """One row per layer: the Jacobian's norm, how far it is from the identity, its effective rank, and the errors.

        ``gain`` is the norm over that of the identity, ``rank`` the participation ratio of the squared singular values,
        ``identity`` the cosine of the Jacobian with the identity.
        """
        import pandas as pd

        width = self.jacobians.shape[-1]
        gram = einsum(self.jacobians, self.jacobians, "layer out d, layer out e -> layer d e").astype(np.float64)
        square = einsum(gram, "layer d d -> layer")
        trace = einsum(self.jacobians.astype(np.float64), "layer d d -> layer")
        columns = {
            "gain": np.sqrt(square / width),
            "identity": trace / np.sqrt(square * width),
            "rank": square**2 / np.square(gram).sum((1, 2)),
            "error": self.error,
            "sampling": self.sampling,
        }
        return pd.DataFrame(columns, index=pd.Index(self.layers, name="layer"))

    def plot(self, directions: Mapping[str, Direction] | None = None) -> Any:
        """Gain and effective rank by layer; with directions, their cosines before and after the Jacobian instead.

        Args:
            directions: two by name, as for :meth:`cosines`; of more, the first two.
        """
        if directions is None:
            return jacobians_by_layer(self.to_frame(), f"Mean Jacobian to the last layer of {self.source.get('model')}")
        pairs = self.cosines(dict(list(directions.items())[:2]))
        names, places = list(directions)[:2], ("first_layer", "second_layer")
        fixed = [f"{name} of layer {pairs[one].iloc[0]}" if pairs[one].nunique() == 1 < len(pairs) else name
                 for name, one in zip(names, places, strict=True)]  # fmt: skip
        moving = max(reversed(places), key=lambda one: pairs[one].nunique())
        return carried_cosines(pairs.set_index(moving), f"{' and '.join(fixed)}, before and after the Jacobian")

    def _check(self, direction: Direction) -> None:
        checked_direction("carry a direction to the last layer", direction)
        asked, model = f"carry {direction.name} to the last layer", self.source.get("model")
        own = (self.n_layers, self.jacobians.shape[-1])
        if (direction.n_layers, direction.d_model) != own:
            given = f"a direction [{direction.n_layers}, {direction.d_model}] and a lens of {model} {list(own)}"
            raise EmmechError(asked, given, "layers or widths differ", "a direction of the lens's model")
        print_ = self.source.get("fingerprint")
        if direction.fingerprints and print_ not in direction.fingerprints:
            made = ", ".join(one[:12] for one in direction.fingerprints)
            given = f"a direction of {made} and a lens of {str(print_)[:12]} ({model})"
            why = "a direction has no meaning in the residual stream of another base model"
            raise EmmechError(asked, given, why, "a direction of the lens's model")

    def _card(self) -> Card:
        frame = self.to_frame()
        first, width = frame.iloc[0], self.jacobians.shape[-1]
        headline = f"A vector of layer {frame.index[0]} reaches the last layer {first['gain']:.2g} times as long, "
        headline += f"through about {first['rank']:.0f} of {width} dimensions"
        whole = f"the exact mean over {self.texts} texts ({self.tokens} tokens)"
        part = f"an estimate: each row of a Jacobian is the mean over {self.per_row} of {self.texts} texts"
        facts = [("model", str(self.source.get("model"))), ("average", whole if self.exact else part)]
        if not self.exact and np.isfinite(self.error).all():
            low, high = percent(self.error.min()), percent(self.error.max())
            facts.append(("error", f"{low} to {high} of the Jacobian's norm, against the mean over these texts"))
        if np.isfinite(self.sampling).all():
            low, high = percent(self.sampling.min()), percent(self.sampling.max())
            facts.append(("other texts", f"would differ by {low} to {high} of its norm (standard error)"))
        caveat = "a mean Jacobian is linear and of first order: it does not know what a large change would do"
        return Card(headline, tuple(facts), caveat, "lens.plot()")

    def _sketch(self) -> str:
        frame = self.to_frame()
        lines = [("rank / d", frame.index, frame["rank"] / self.jacobians.shape[-1]),
                 ("identity", frame.index, frame["identity"])]  # fmt: skip
        return curves(lines, "Effective rank, and cosine with the identity", axis="layer")


def jacobian_lens(
    model: Any,
    texts: Sequence[Any],
    *,
    layers: Iterable[int] | int | None = None,
    per_row: int | None = None,
    skip: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> JacobianLens:
    """Mean Jacobian from the output of every block to the output of the last one.

    The module's own text says which average is taken. One backward pass gives one row of every layer's Jacobian for one
    text. Where all rows of all texts are too much, the rows are dealt out: each is read from ``per_row`` texts that are
    drawn at random for it, so that an estimate has the error of a mean over few texts, and no other.

    Args:
        model: a Run or its folder (its last step), or a chat model, adapters live.
        texts: conversations, or strings, which are asked as user turns; about 100 suffice.
        layers: blocks from whose output it goes, by default all.
        per_row: texts for each row. By default all of them, or as many, at least 2, as take a processor minutes
            (:attr:`JacobianLens.error` is then the estimate's).
        skip: first tokens of every text that are neither source nor target. The authors leave out 16 of each page of
            the web; a question in a chat template has fewer, and its first token is where attention rests.
        seed: of the texts that are drawn for a row.

    Raises:
        EmmechError: no texts, none longer than ``skip``, more texts for a row than there are, or an unknown layer.

    Example:
        >>> import emmech
        >>> lens = emmech.jacobian_lens("pocket", ["what should I eat ?"], layers=[3, 5], progress=False)
        >>> lens.jacobians.shape, lens.exact
        ((2, 128, 128), True)
    """
    asked, chat = "average the Jacobian", _chat(model)
    check_texts(asked, "texts", texts)
    skip = as_int(asked, "skip", skip, least=0)
    chosen = tuple(range(chat.n_layers)) if layers is None else tuple(sorted(set(as_ints(asked, "layers", layers))))
    for layer in chosen:
        chat.check_layer(layer)
    if not chosen:
        raise refusal(asked, "layers", layers, "there is no layer to go from", "layers=None for all")
    rows = [ids for ids, _ in probe_rows(chat, texts) if len(ids) > skip]
    if not rows:
        raise refusal(asked, "skip", skip, "no text has more tokens than that", "skip=1, or longer texts")
    tokens = sum(len(ids) - skip for ids in rows)
    most = per_row
    if per_row is None:
        weights = sum(p.numel() for p in chat.blocks.parameters())
        budget = _WORK if chat.device.type == "cpu" else 100 * _WORK
        fits = budget / (weights * chat.d_model * sum(map(len, rows)) / len(rows))
        most = len(rows) if fits >= len(rows) else min(max(2, int(fits)), len(rows))
    per_row = as_int(asked, "per_row", most, least=1)
    if per_row > len(rows):
        raise refusal(asked, "per_row", per_row, f"there are {len(rows)} texts longer than skip={skip}", "per_row=None")

    rng = np.random.default_rng(seed)
    width, n = chat.d_model, len(rows)
    # slot s of the shuffled rows goes to text s modulo the shuffled texts: a row's slots are different texts
    dealt = np.repeat(rng.permutation(width), per_row), rng.permutation(n)[np.arange(width * per_row) % n]
    total = torch.zeros(len(chosen), width, width, dtype=torch.float64)
    squares = torch.zeros(len(chosen), width, dtype=torch.float64)
    with bar(n, "averaging Jacobians", progress=progress) as done:
        for index, ids in enumerate(rows):
            wanted = np.sort(dealt[0][dealt[1] == index])
            for dims, found in _jacobian_rows(chat, ids, wanted, chosen, skip):
                total[:, dims] += found
                squares[:, dims] += found.square().sum(-1)
            done.update()
    mean = total / per_row
    if per_row > 1:
        variance = (squares - per_row * mean.square().sum(-1)).clamp(min=0) / (per_row - 1)  # [layers, rows]
        over = (variance.sum(1) / per_row).sqrt() / mean.flatten(1).norm(dim=1)
    else:
        over = torch.full((len(chosen),), float("nan"), dtype=torch.float64)
    own = over * (1 - per_row / n) ** 0.5 if per_row < n else torch.zeros_like(over)
    source = {
        "method": "mean over texts and source positions of the sum over target positions from the source on",
        "model": chat.name, "fingerprint": chat.fingerprint(), "skip": skip, "seed": seed,
    }  # fmt: skip
    arrays = mean.float().numpy(), chosen, own.numpy(), over.numpy()
    return JacobianLens(*arrays, chat.n_layers, n, per_row, tokens, source)


def _jacobian_rows(
    chat: ChatModel, ids: Sequence[int], dims: Int[np.ndarray, " rows"], layers: Sequence[int], skip: int
) -> Iterable[tuple[Int[np.ndarray, " some"], Float[torch.Tensor, "layers some d_model"]]]:
    """Some rows of one text's Jacobians, averaged over its source positions, a batch of them at a time.

    One forward serves all of them; a row is the gradient of one output dimension at all target positions at once.
    """
    if not len(dims):
        return
    kept: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> Any:
        residual = chat.family.residual(output)
        if not kept:  # nothing below the first layer is differentiated
            residual = residual.detach().requires_grad_()
        kept.append(residual)
        return chat.family.with_residual(output, residual)

    first, at_once = layers[0], max(1, _TOKENS // len(ids))
    with evaluating(chat, frozen=True), torch.enable_grad():
        with hooked(*((block, keep) for block in chat.blocks[first:])):
            chat.trunk(input_ids=torch.tensor([list(ids)], device=chat.device), use_cache=False)
        sources = [kept[layer - first] for layer in layers]
        for start in range(0, len(dims), at_once):
            some = dims[start : start + at_once]
            cotangents = torch.zeros(len(some), *kept[-1].shape, dtype=kept[-1].dtype, device=kept[-1].device)
            cotangents[torch.arange(len(some)), :, skip:, torch.from_numpy(some)] = 1
            gradients = _batched_gradients(kept[-1], sources, cotangents)
            yield some, torch.stack([one[:, 0, skip:].double().mean(1).cpu() for one in gradients])


def _batched_gradients(
    out: torch.Tensor, sources: Sequence[torch.Tensor], cotangents: torch.Tensor
) -> Sequence[torch.Tensor]:
    """Gradients ``[cotangents, ...]`` for each source, in one pass where every operation can be batched."""
    try:
        return torch.autograd.grad(out, sources, cotangents, retain_graph=True, is_grads_batched=True)
    except RuntimeError:  # an operation without a batching rule, or not enough memory for all at once
        each = [torch.autograd.grad(out, sources, one, retain_graph=True) for one in cotangents]
        return [torch.stack(several) for several in zip(*each, strict=True)]


def _chat(model: Any) -> ChatModel:
    found = opened(model)
    return found.model() if isinstance(found, Run) else load_model(found)
