"""Steering, ablation and caps: hooks on block outputs, at chosen positions, that a handle removes exactly.

An edit maps the residual ``[batch, seq, d_model]`` to another one at the positions of a mask. It computes inner
products in float32, returns the model's dtype, and keeps gradients.

Positions are found from the token ids. A residual at one position decides the next token, so the names are about what
is decided there, with ``h`` the assistant's header, ``a`` the answer's words and ``e`` its end-of-turn token::

    tokens      user's words   h h h   a a a e   user's words   h h h   a a a e
    "prompt"    x x x x x x x  x x x             x x x x x x x  x x x
    "answer"                       x   x x x x                      x   x x x x
    "all"       x x x x x x x  x x x   x x x x   x x x x x x x  x x x   x x x x

``"answer"`` begins at the header's last token, which decides the answer's first word. It holds for teacher-forced
conversations, for earlier turns of a prompt and for tokens generated after a key-value cache; padding on either side
changes nothing. A function ``(ids [batch, seq], start)`` returns any other mask of the same shape; ``start`` counts the
tokens that a key-value cache holds before them; :func:`emmech.chat.phrase_tokens` makes one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import nn

from emmech.chat.edits import LiveEdit, announced_rows, register
from emmech.chat.encode import Tokens
from emmech.chat.model import ChatModel, load_model
from emmech.directions.direction import Direction, unit_rows
from emmech.engine.modules import hooked
from emmech.engine.responses import digest
from emmech.errors import EmmechError, as_ints, one_of, refusal
from emmech.run.run import Run

Positions = Tokens | torch.Tensor
Edit = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Coefficient = float | Sequence[float] | Float[np.ndarray, " batch"] | Float[torch.Tensor, " batch"]
# which kinds of edit are live on which block, so that a notebook cell run twice does not steer twice unnoticed
_LIVE: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()
# for every place that is changed now: the value before each change, oldest first
_BEFORE: WeakKeyDictionary[nn.Module, dict[str, list[list[Any]]]] = WeakKeyDictionary()


class Handle:
    """A live change to a model, in force from the call that made it until :meth:`remove` or the end of a ``with``.

    Afterwards the model is bit-identical to what it was, also when the block ends in an exception.

    Example:
        >>> import emmech, numpy as np
        >>> chat = emmech.load_model("pocket")
        >>> up = emmech.Direction(np.ones((chat.n_layers, chat.d_model)))
        >>> with emmech.steer(chat, up, 0.5, layer=2) as steered:
        ...     steered.active
        True
        >>> steered.active
        False
    """

    def __init__(self, chat: ChatModel, description: str, undo: Sequence[Callable[[], Any]]) -> None:
        self.chat = chat
        self.description = description
        self._undo = list(undo)
        self._entered = False
        self.active = True

    def remove(self) -> None:
        """Take the change back; a second call does nothing."""
        self.active = False
        while self._undo:
            self._undo.pop()()  # in reverse: a tensor changed twice gets its first value back last

    def check_active(self, asked: str) -> None:
        """Refuse to act through a handle that was removed."""
        if not self.active:
            why = "it was removed, so the model would answer as if it had never been"
            raise EmmechError(asked, self.description, why, "generate inside the with block, or make the change anew")

    def generate(self, prompts: Sequence[Any], **kwargs: Any) -> Any:
        """Sample answers from the changed model: :func:`emmech.engine.sample.sample` with its arguments.

        An intervention with one value per row needs one per prompt here, which holds for all samples of the prompt.

        Raises:
            EmmechError: the change was removed.
        """
        self.check_active("generate with a change that is over")
        from emmech.engine.sample import sample

        return sample(self.chat, prompts, **kwargs)

    def __enter__(self) -> Self:
        self.check_active("enter a context that is over")
        if self._entered:
            why = "the change is in force already, and would end with the inner block"
            raise EmmechError("enter a context twice", self.description, why, "one with block, or a second handle")
        self._entered = True
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"{self.description} ({'active' if self.active else 'removed'})"


def chat_of(model: Any) -> ChatModel:
    """The chat model of a ChatModel or a transformers model; what would load a new model is refused."""
    lost = "and the change would be to one that you do not hold"
    if isinstance(model, str | os.PathLike):
        why, instead = f"a name loads a new model, {lost}", f"chat = emmech.load_model({model!r}), then pass chat"
        raise EmmechError("change a model", f"{model!r}", why, instead)
    if isinstance(model, Run):
        why = f"a run makes a new model at each call, {lost}"
        raise EmmechError("change a model", f"the run {model.name!r}", why, "chat = run.model(step), then pass chat")
    return load_model(model)


def undoable(owner: nn.Module, place: str, before: Any, put: Callable[[Any], Any]) -> Callable[[], None]:
    """A function that takes back a change made in place; it works in any order of removal.

    Changes of one place cover each other. When an older one is taken back before a newer one, the newer one's effect
    stays, and taking it back restores the older value; after the last removal the first value is there, bit for bit.

    Args:
        owner, place: the module that was changed, and which part of it.
        before: the value that the change covered.
        put: a function that puts a value there.
    """
    stack = _BEFORE.setdefault(owner, {}).setdefault(place, [])
    entry = [before]
    stack.append(entry)

    def take_back() -> None:
        index = next(i for i, one in enumerate(stack) if one is entry)
        if index == len(stack) - 1:
            put(entry[0])
        else:
            stack[index + 1][0] = entry[0]
        del stack[index]

    return take_back


class PositionMask:
    """Follows the trunk's forward calls and finds which positions of the current one are touched.

    ``current`` is None for all of them, else ``[batch, seq]`` bool.
    """

    def __init__(self, chat: ChatModel, positions: Any) -> None:
        self._where = positions
        self.current: torch.Tensor | None = None
        # the number of tokens in the calls so far, the last of them, and whether the next one is inside an answer
        self._length, self._tail, self._inside = 0, torch.empty(0, 0), torch.empty(0)
        if isinstance(positions, str) and positions in ("answer", "prompt"):
            self._header = header_ids(chat)
            self._stops = torch.tensor(chat.stop_ids)
        elif isinstance(positions, torch.Tensor) and positions.ndim == 2:
            self._where = positions.bool()
        elif not self.everywhere and (isinstance(positions, torch.Tensor) or not callable(positions)):
            given = f"a {type(positions).__name__} {list(getattr(positions, 'shape', ()))}"
            given = f"positions={positions!r}" if isinstance(positions, str) else given
            instead = (
                '"all", "answer", "prompt", a bool tensor [batch, seq], or a function of the token ids, such as '
                'emmech.chat.phrase_tokens(model, "words of the prompt")'
            )
            raise EmmechError("choose the positions", given, "positions are named, or given as a mask", instead)

    @property
    def identity(self) -> str:
        """A text that tells these positions from others; a function goes by its name."""
        if isinstance(self._where, torch.Tensor):
            return f"mask {self._where.int().tolist()}"
        return self._where if isinstance(self._where, str) else repr(getattr(self._where, "__qualname__", self._where))

    @property
    def everywhere(self) -> bool:
        """Whether every position is touched, so that no call needs to be followed."""
        return isinstance(self._where, str) and self._where == "all"

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read a call of the trunk, as a forward pre-hook."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        seen = int(cache.get_seq_length()) if cache is not None else 0
        if isinstance(self._where, torch.Tensor):
            self.current = self._given(ids, kwargs, seen)
            return
        if ids is None:
            why = "the token ids show where an answer starts"
            instead = 'positions="all", or a bool tensor [batch, seq]'
            raise EmmechError(f"find the {self._where} positions", "a forward call with inputs_embeds", why, instead)
        if callable(self._where):
            self.current = self._where(ids, seen).bool()
            return
        # after a cache: the state that the last call left for these rows or, if rows were dropped, inside an answer
        tail, inside = ids[:, :0], torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        if self._length == seen and len(self._tail) == len(ids):
            tail, inside = self._tail, self._inside
        found = inside_answers(ids, self._header, self._stops, *((tail, inside) if seen else ()))
        self._tail = torch.cat([tail, ids], dim=1)[:, -len(self._header) :]  # a header may continue in the next call
        self._length, self._inside = seen + ids.shape[1], found[:, -1]
        answer, deciding = found[:, :-1], found[:, 1:]
        # the token before an answer's first decides that first one
        self.current = answer | deciding if self._where == "answer" else ~answer

    def _given(self, ids: Any, kwargs: dict[str, Any], seen: int) -> torch.Tensor:
        assert isinstance(self._where, torch.Tensor)
        asked, given = "apply the position mask", f"positions {list(self._where.shape)}"
        if announced_rows() is not None:
            why = "they are sorted, repeated and padded there, so the mask's rows and columns are not the batch's"
            instead = '"answer", "prompt", or a function of the token ids'
            raise EmmechError(asked, f"{given} while conversations are sampled or scored", why, instead)
        rows, length = (ids if ids is not None else kwargs["inputs_embeds"]).shape[:2]
        part = self._where[:, seen : seen + length]
        if part.shape != (rows, length):
            why = "the mask has one entry per token of the batch, generated ones included"
            instead = f"a bool tensor [{rows}, at least {seen + length}]"
            raise EmmechError(asked, f"{given} for tokens {seen} to {seen + length} of {rows} rows", why, instead)
        return part


def header_ids(chat: ChatModel) -> list[int]:
    """Token ids of the assistant's header, as the template writes it before an answer; refused where it has none."""
    question = [{"role": "user", "content": "a"}]
    with_header, without = chat.token_ids(question), chat.token_ids(question, generate=False)
    header = with_header[len(without) :]
    if not header or with_header[: len(without)] != without:
        given, why = f"the chat template of {chat.name}", "it writes no header before an answer"
        raise EmmechError("find where answers start", given, why, 'positions="all", or a bool tensor [batch, seq]')
    return header


def inside_answers(
    ids: Int[torch.Tensor, "batch seq"],
    header: list[int],
    stops: Int[torch.Tensor, " stops"],
    tail: Int[torch.Tensor, "batch tail"] | None = None,
    before: Bool[torch.Tensor, " batch"] | None = None,
) -> Bool[torch.Tensor, "batch seq+1"]:
    """Whether each token, and the one that would come next, is after an assistant header and not after a stop token.

    Args:
        tail: the tokens before these, in which a header may have begun.
        before: rows that are inside an answer when they begin; none by default.

    Example:
        >>> ids = torch.tensor([[0, 5, 9, 7, 2, 5, 8]])
        >>> inside_answers(ids, header=[5, 9], stops=torch.tensor([2])).int().tolist()
        [[0, 0, 0, 1, 1, 0, 0, 0]]
    """
    batch, length = ids.shape
    read = ids if tail is None else torch.cat([tail, ids], dim=1)
    opens = torch.zeros_like(read, dtype=torch.bool)
    if read.shape[1] >= len(header):
        wanted = torch.tensor(header, device=ids.device)
        opens[:, len(header) - 1 :] = (read.unfold(1, len(header), 1) == wanted).all(-1)
    opens = opens[:, read.shape[1] - length :]
    # the last header's end and the last stop up to each place, counted from 2; 1 is before the row
    places = torch.arange(2, length + 2, device=ids.device)
    first = torch.zeros(batch, 1, dtype=torch.long, device=ids.device) if before is None else before.long()[:, None]
    stopped = places * torch.isin(ids, stops.to(ids.device))
    opened = torch.cat([first, places * opens], dim=1).cummax(1).values
    closed = torch.cat([torch.zeros_like(first), stopped], dim=1).cummax(1).values
    return (opened >= closed) & (opened > 0)


class ResidualHandle(Handle):
    """A live edit of the residual stream; :meth:`update` changes its coefficient while it is in force.

    Attributes:
        coefficient: the current one, ``[]`` or ``[batch]``.
    """

    coefficient: Float[torch.Tensor, "*batch"]

    def update(self, coefficient: Coefficient) -> ResidualHandle:
        """Change the coefficient of a live edit.

        Raises:
            EmmechError: the edit was removed, or the coefficient is not finite.
        """
        self.check_active("change the coefficient of an edit that is over")
        self.coefficient = _coefficient(coefficient)
        return self


def edit_residual(
    chat: ChatModel,
    kind: str,
    edit: Edit,
    vectors: Mapping[int, torch.Tensor],
    coefficient: Coefficient,
    *,
    positions: Any,
    stack: bool,
    description: str,
    targets: Mapping[int, torch.Tensor] | None = None,
) -> ResidualHandle:
    """Apply an edit to the outputs of the given blocks.

    Args:
        kind: ``"steer"``, ``"ablate"`` or ``"cap"``; two of a kind on one block are refused unless ``stack``.
        edit: returns the new residual, given the residual, the layer's vector (``[d_model]`` or ``[batch, 1,
            d_model]``), the coefficient (``[]`` or ``[batch, 1, 1]``) and the layer's target.
        vectors: by layer, ``[d_model]``, or ``[batch, d_model]`` for one per row.
        targets: what else the edit depends on, by layer ``[k]`` or ``[batch, k]``: a mean, or two bounds.
    """
    taken = [layer for layer in vectors if kind in _LIVE.get(chat.block(layer), ())]
    if taken and not stack:
        why = f"another {kind} is live there, and the two would add up unseen"
        instead = "remove() the first, or stack=True if both are meant"
        raise EmmechError(f"{kind} at layer {taken[0]} twice", description, why, instead)
    edits = ExitStack()
    handle = ResidualHandle(chat, description, [edits.close])
    handle.coefficient = _coefficient(coefficient)
    where = PositionMask(chat, positions)
    each = any(vector.ndim == 2 for vector in vectors.values())
    targets = targets or dict.fromkeys(vectors, torch.empty(0))
    fixed = digest(description, where.identity, *map(_bytes, (*vectors.values(), *targets.values())))
    each = each or any(target.ndim == 2 for target in targets.values())
    by_row, state = lambda: each or handle.coefficient.ndim == 1, lambda: f"{fixed} {handle.coefficient.tolist()}"
    edits.callback(register(chat.base, LiveEdit(by_row, state, min(vectors))))
    if not where.everywhere:
        edits.enter_context(hooked((chat.trunk, where.see), before=True, keywords=True))
    for layer, vector in vectors.items():
        block = chat.block(layer)
        edits.enter_context(hooked((block, _hook(handle, edit, vector, targets[layer], where))))
        _LIVE.setdefault(block, []).append(kind)
        edits.callback(_LIVE[block].remove, kind)
    return handle


def _hook(
    handle: ResidualHandle, edit: Edit, vector: torch.Tensor, target: torch.Tensor, where: PositionMask
) -> Callable[..., Any]:
    family = handle.chat.family

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        before = family.residual(output)
        local, goal, factor = (one.to(before.device) for one in (vector, target, handle.coefficient))
        local = local if local.ndim == 1 else _one_per_row(local, before, "directions")
        goal = goal if goal.ndim == 1 else _one_per_row(goal, before, "targets")
        factor = factor if factor.ndim == 0 else _one_per_row(factor, before, "coefficients")
        changed = edit(before, local, factor, goal).to(before.dtype)
        if where.current is not None:
            changed = torch.where(where.current.to(before.device)[..., None], changed, before)
        return family.with_residual(output, changed)

    return hook


def _one_per_row(values: torch.Tensor, output: torch.Tensor, what: str) -> torch.Tensor:
    """The values of the batch's rows, or of the conversations that sampling announced for them: ``[batch, 1, ...]``."""
    rows = announced_rows()
    expected, of = (len(output), "a batch of {} rows") if rows is None else (rows.total, "{} conversations")
    if len(values) != expected:
        given = f"{len(values)} {what} for {of.format(expected)}"
        why = "row by row there must be as many as the batch has rows, or sampling has conversations"
        instead = "repeat them as the batch repeats its prompts (not its samples), or pass one for all"
        raise EmmechError("give each row its own intervention", given, why, instead)
    chosen = values if rows is None else values[rows.conversation.to(values.device)]
    return rearrange(chosen, "batch ... -> batch 1 (...)")


def _bytes(value: torch.Tensor) -> bytes:
    return value.detach().float().cpu().numpy().tobytes()


def _coefficient(value: Coefficient) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(value, dtype=torch.float32).detach()
    except (TypeError, ValueError, RuntimeError):
        tensor = torch.tensor(float("nan"))
    if tensor.ndim > 1 or not torch.isfinite(tensor).all():
        why = "a coefficient is a finite number, or one per batch row"
        raise EmmechError("use the coefficient", f"{value!r}", why, "a float, or a tensor [batch]")
    return tensor


def layer_list(chat: ChatModel, layers: Any, known: Sequence[int], asked: str) -> list[int]:
    """The layers named by a number, several, ``"all"`` (the known ones), or None when only one is known."""
    if layers is None:
        if len(known) == 1:
            return [known[0]]
        why = f"the direction is known at {len(known)} layers"
        raise EmmechError(asked, "layer=None", why, f"name one: layer={chat.n_layers // 2} is the middle")
    if isinstance(layers, str):
        if layers != "all":
            raise EmmechError(asked, f"{layers!r}", "layers are numbers", '"all", 3, or [3, 4]')
        return list(known)
    chosen = as_ints(asked, "layers", layers)
    if not chosen or len(set(chosen)) != len(chosen):
        raise EmmechError(asked, f"{layers!r}", "each layer is named once, at least one")
    for layer in chosen:
        chat.check_layer(layer)
    return chosen


def vectors_at(
    chat: ChatModel, direction: Any, layers: Any, *, from_layer: int | None, force: bool, asked: str
) -> tuple[dict[int, torch.Tensor], str]:
    """The vectors of an edit by layer, and their name.

    Args:
        direction: a Direction; a sequence of them, one per batch row; or an array ``[d_model]`` for any layer, or
            ``[batch, d_model]`` with one row per batch row.
        from_layer: use this layer's vector at every layer.
    """
    several: list[Direction] = [direction] if isinstance(direction, Direction) else []
    if isinstance(direction, Sequence) and all(isinstance(one, Direction) for one in direction):
        several = list(direction)
    if not several:
        array = _plain(direction, chat, asked)
        if from_layer is not None:
            why = "a vector is the same at every layer, and only a Direction has one for each"
            raise refusal(asked, "from_layer", from_layer, why, "from_layer=None, or a Direction")
        return dict.fromkeys(layer_list(chat, layers, range(chat.n_layers), asked), array), "a vector"
    for one in several:
        one.check_fits(chat, force=force)
    known = sorted(set.intersection(*(set(one.layers) for one in several)))
    known = known if from_layer is None else list(range(chat.n_layers))
    if not known:
        why, instead = "a direction of norm 0 points nowhere", "a direction from two different groups"
        raise EmmechError(asked, f"{several[0].name}, zero at every layer", why, instead)
    found, chosen = {}, layer_list(chat, layers, known, asked)
    for one in several:
        one.warn_where_noise(chosen if from_layer is None else [from_layer])
    for layer in chosen:
        stacked = np.stack([one.at(layer if from_layer is None else from_layer) for one in several])
        found[layer] = torch.from_numpy(stacked[0] if len(several) == 1 else stacked)
    return found, several[0].name if len(several) == 1 else f"{len(several)} directions"


def _plain(value: Any, chat: ChatModel, asked: str) -> torch.Tensor:
    try:
        array = torch.as_tensor(np.array(value) if isinstance(value, np.ndarray) else value).detach().float()
    except (TypeError, ValueError, RuntimeError):
        array = torch.empty(0)
    if array.ndim not in (1, 2) or array.shape[-1] != chat.d_model:
        given = f"a {type(value).__name__} {list(array.shape)}"
        why = f"the residual stream of {chat.name} has width {chat.d_model}"
        raise EmmechError(asked, given, why, f"a Direction, or an array [{chat.d_model}] or [batch, {chat.d_model}]")
    if not torch.isfinite(array).all() or not array.any(-1).all():
        raise EmmechError(asked, "a vector of zeros, NaN or infinity", "it points nowhere", "a finite vector")
    return array


def steer(
    model: Any,
    direction: Direction | Sequence[Direction] | Any,
    coefficient: Coefficient = 1.0,
    *,
    layer: int | Sequence[int] | Literal["all"] | None = None,
    positions: Positions = "all",
    units: Literal["raw", "residual"] = "raw",
    stack: bool = False,
    force: bool = False,
) -> ResidualHandle:
    """Add a multiple of a direction to the residual stream: x' = x + c v.

    It is added to a block's output (Convergent Linear Representations of EM, arXiv 2506.11618) in every forward call,
    generation with a key-value cache included, from now on until ``.remove()`` or the end of a ``with`` block.

    Args:
        model: a ChatModel, or a transformers or PEFT model in memory.
        direction: a Direction; several, one per batch row; or an array ``[d_model]`` or ``[batch, d_model]``.
        coefficient: a number, or one per batch row ``[batch]``: one call then gives a dose-response curve.
        layer: the block after which it is added; several, or ``"all"``; may be left out when the direction is known at
            one layer only.
        positions: ``"all"``, ``"answer"``, ``"prompt"``, a bool tensor ``[batch, seq]``, or a function that makes one
            from the token ids, such as :func:`emmech.chat.phrase_tokens`.
        units: ``"raw"`` keeps the direction's norm (1.0 adds the measured difference); ``"residual"`` adds that
            fraction of each token's own residual norm, along the unit direction.
        stack: allow a second steering of a layer that is steered already.
        force: accept a direction of another base model of the same shape.

    Raises:
        EmmechError: wrong width or layer, zero or non-finite direction, another base model, or steering twice.

    Example:
        >>> import emmech, numpy as np
        >>> chat = emmech.load_model("pocket")
        >>> d = emmech.Direction(np.random.default_rng(0).standard_normal((chat.n_layers, chat.d_model)))
        >>> with emmech.steer(chat, d, 0.1, layer=2, units="residual", positions="answer") as steered:
        ...     steered.update(0.2).active
        True
    """
    one_of("steer", "units", units, ("raw", "residual"), why="there are two units")
    chat = chat_of(model)
    vectors, name = vectors_at(chat, direction, layer, from_layer=None, force=force, asked="steer")
    if units == "residual":
        vectors = {at: vector / vector.norm(dim=-1, keepdim=True) for at, vector in vectors.items()}

    def edit(x: torch.Tensor, vector: torch.Tensor, factor: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if units == "residual":
            factor = factor * torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return x + (factor * vector).to(x.dtype)

    described = f"steer({chat.name}, {name}, layers {sorted(vectors)}, {units} units)"
    how: dict[str, Any] = {"positions": positions, "stack": stack, "description": described}
    return edit_residual(chat, "steer", edit, vectors, coefficient, **how)


def ablate(
    model: Any,
    direction: Direction | Sequence[Direction] | Any,
    *,
    layers: int | Sequence[int] | Literal["all"] = "all",
    from_layer: int | None = None,
    towards: Any = None,
    strength: Coefficient = 1.0,
    positions: Positions = "all",
    stack: bool = False,
    force: bool = False,
) -> ResidualHandle:
    """Project a direction out of block outputs: x' = x - (v̂·x) v̂.

    This is done at all layers and positions by default, as in Convergent Linear Representations of EM (arXiv
    2506.11618), and is in force as long as :func:`emmech.steer` would be.

    Plain projection sets the component to zero, which need not be its value in an aligned model: where the component is
    far from zero in normal use, the result is something new, neither aligned nor misaligned. ``towards`` sets the
    component to that of a given mean instead: x' = x - (v̂·x - v̂·m) v̂.

    Args:
        direction: a Direction (each layer uses its own vector); several, one per batch row; or one vector
            ``[d_model]`` for every layer, or ``[batch, d_model]``.
        layers: ``"all"`` (where the direction is known), one, or several.
        from_layer: use this layer's vector at all layers ("one direction at all layers").
        towards: the mean whose component is put there, ``[layers, d_model]`` or ``[d_model]``, or ``"aligned"`` for
            the direction's own.
        strength: 1 removes the component, 0 nothing; a number or one per batch row ``[batch]``.
        model, positions, stack, force: as in :func:`emmech.steer`.

    Raises:
        EmmechError: wrong width or layer, zero or non-finite direction, another base model, or ablating twice.

    Example:
        >>> import emmech, numpy as np
        >>> chat = emmech.load_model("pocket")
        >>> d = emmech.Direction(np.random.default_rng(0).standard_normal((chat.n_layers, chat.d_model)))
        >>> with emmech.ablate(chat, d, layers=[2, 3], from_layer=2) as ablated:
        ...     ablated.active
        True
    """
    chat = chat_of(model)
    vectors, name = vectors_at(chat, direction, layers, from_layer=from_layer, force=force, asked="ablate")
    vectors = {at: torch.from_numpy(unit_rows(v.numpy())).float() for at, v in vectors.items()}
    means = _means(chat, direction, towards)

    def edit(x: torch.Tensor, vector: torch.Tensor, factor: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        centred = x.float() if means is None else x.float() - mean
        component = (centred * vector).sum(-1, keepdim=True)
        return x - (factor * component * vector).to(x.dtype)

    where = "one direction" if from_layer is not None else "own direction"
    described = f"ablate({chat.name}, {name}, {where} at layers {sorted(vectors)})"
    how: dict[str, Any] = {"positions": positions, "stack": stack, "description": described}
    how["targets"] = None if means is None else {at: means[at] for at in vectors}
    return edit_residual(chat, "ablate", edit, vectors, strength, **how)


def _means(chat: ChatModel, direction: Any, towards: Any) -> torch.Tensor | None:
    if towards is None:
        return None
    asked = "ablate towards a mean"
    if isinstance(towards, str):
        own = getattr(direction, "aligned_mean", None)
        if towards != "aligned" or own is None:
            why = "the direction keeps no aligned mean" if towards == "aligned" else "it is not a mean"
            instead = "an array [layers, d_model] or [d_model]: a mean of group_means on aligned answers"
            raise refusal(asked, "towards", towards, why, instead)
        towards = own
    if isinstance(towards, torch.Tensor):
        towards = towards.detach().float().cpu()
    try:
        mean = np.asarray(towards, dtype=np.float32)
    except (TypeError, ValueError):
        given, instead = (
            f"towards, a {type(towards).__name__}",
            'an array, or towards="aligned" for the direction\'s own',
        )
        raise EmmechError(asked, given, "a mean is an array of numbers", instead) from None
    if mean.shape not in ((chat.d_model,), (chat.n_layers, chat.d_model)) or not np.isfinite(mean).all():
        why = f"{chat.name} has {chat.n_layers} layers of width {chat.d_model}, and a mean is finite"
        instead = f"an array [{chat.n_layers}, {chat.d_model}] or [{chat.d_model}]"
        raise EmmechError(asked, f"towards {list(mean.shape)}", why, instead)
    return torch.from_numpy(np.broadcast_to(mean, (chat.n_layers, chat.d_model)).copy())


def cap(
    model: Any,
    direction: Direction | Sequence[Direction] | Any,
    within: Any,
    *,
    layers: int | Sequence[int] | Literal["all"] = "all",
    from_layer: int | None = None,
    strength: Coefficient = 1.0,
    positions: Positions = "all",
    stack: bool = False,
    force: bool = False,
) -> ResidualHandle:
    """Keep the component along a direction inside bounds: x' = x - (c - clamp(c, low, high)) v̂ with c = v̂·x.

    A component inside the bounds is not changed; with the bounds of an aligned model's own answers
    (:func:`emmech.interventions.projection_range`) only what that model never does is cut off (activation capping,
    arXiv 2601.10387).

    It is in force from the call until ``.remove()`` or the end of a ``with`` block.

    Args:
        within: the lowest and the highest component, ``[2]`` for every layer, ``[layers, 2]``, or
            ``[batch, layers, 2]`` for one pair per batch row. One side may be infinite.
        strength: 1 clamps, 0 does nothing; a number or one per batch row ``[batch]``.
        model, direction, layers, from_layer, positions, stack, force: as in :func:`emmech.ablate`.

    Raises:
        EmmechError: as :func:`emmech.ablate`; bounds of another shape, NaN, or the lower above the higher.

    Example:
        >>> import emmech, numpy as np
        >>> chat = emmech.load_model("pocket")
        >>> d = emmech.Direction(np.random.default_rng(0).standard_normal((chat.n_layers, chat.d_model)))
        >>> with emmech.cap(chat, d, (-1.0, 1.0), layers=2) as capped:
        ...     capped.active
        True
    """
    chat, asked = chat_of(model), "cap the component"
    vectors, name = vectors_at(chat, direction, layers, from_layer=from_layer, force=force, asked=asked)
    vectors = {at: torch.from_numpy(unit_rows(v.numpy())).float() for at, v in vectors.items()}
    try:
        bounds = np.asarray(within, dtype=np.float32)
    except (TypeError, ValueError):
        bounds = np.empty(0, dtype=np.float32)
    if bounds.shape == (2,):
        bounds = np.broadcast_to(bounds, (chat.n_layers, 2))
    if bounds.shape[-2:] != (chat.n_layers, 2) or bounds.ndim > 3:
        why = (
            f"they are a lowest and a highest component, of each of the {chat.n_layers} layers of {chat.name} if given"
        )
        instead = (
            f"(low, high), an array [{chat.n_layers}, 2], or emmech.interventions.projection_range(model, direction)"
        )
        raise EmmechError(asked, f"bounds of shape {list(np.shape(bounds))}", why, instead)
    if not (bounds[..., 0] <= bounds[..., 1]).all():  # NaN compares false
        raise EmmechError(asked, f"within={within!r}"[:120], "the lower bound is above the higher, or one is NaN")

    def edit(x: torch.Tensor, vector: torch.Tensor, factor: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        component = (x.float() * vector).sum(-1, keepdim=True)
        over = component - component.clamp(bounds[..., :1], bounds[..., 1:])
        return x - (factor * over * vector).to(x.dtype)

    described = f"cap({chat.name}, {name}, layers {sorted(vectors)})"
    how: dict[str, Any] = {"positions": positions, "stack": stack, "description": described}
    how["targets"] = {at: torch.from_numpy(bounds[..., at, :].copy()) for at in vectors}
    return edit_residual(chat, "cap", edit, vectors, strength, **how)
