"""What a rank-1 adapter reacts to: its scalar A·x on every token.

At rank 1 an adapter's write is ``scaling * (A·x) * B``: one number per token decides how much of one fixed vector is
added. Those numbers can be read, shown over the text, and probed (Convergent Linear Representations of EM, arXiv
2506.11618, reads its nine adapters this way).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from emmech.chat.model import ChatModel, load_model
from emmech.directions.extract import held_out_auc
from emmech.engine.adapters import adapter_layers
from emmech.engine.logprobs import in_batches
from emmech.engine.modules import evaluating, hooked
from emmech.engine.stream import probe_rows
from emmech.errors import EmmechError, as_int, check_texts, one_of, refusal
from emmech.progress import bar
from emmech.results import Card, Result
from emmech.run.run import Run, opened
from emmech.view.plots import scalar_histogram, shaded_text

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class AdapterScalars(Result):
    """The scalars of every adapter on every token of some texts.

    Args:
        adapters: their names.
        values: ``[tokens, adapters]``, A·x, not multiplied by the scaling.
        writes: ``[adapters]`` scaling * ||B||: the length of what a scalar of 1 writes.
        tokens: ``[tokens]`` the tokens as text.
        text: ``[tokens]`` which text each token is of.
        answer: ``[tokens]`` whether it belongs to an answer.
    """

    adapters: tuple[str, ...]
    values: Float[np.ndarray, "tokens adapters"]
    writes: Float[np.ndarray, " adapters"]
    tokens: tuple[str, ...]
    text: Int[np.ndarray, " tokens"]
    answer: Bool[np.ndarray, " tokens"]

    def to_frame(self) -> pd.DataFrame:
        """One row per token."""
        import pandas as pd

        scalars = dict(zip(self.adapters, self.values.T, strict=True))
        return pd.DataFrame({"text": self.text, "answer": self.answer, "token": self.tokens, **scalars})

    def top_tokens(self, adapter: str | int = 0, *, n: int = 10, least: int = 2) -> pd.DataFrame:
        """Tokens by their mean scalar: those that drive the adapter most each way.

        Args:
            least: occurrences that a token must have.
        """
        column = self.adapters[self._column(adapter)]
        grouped = self.to_frame().groupby("token")[column].agg(["mean", "std", "count"])
        grouped = grouped[grouped["count"] >= least].sort_values("mean", ascending=False)
        return grouped if len(grouped) <= 2 * n else grouped.iloc[[*range(n), *range(-n, 0)]]

    def by_text(self) -> Float[np.ndarray, "texts adapters"]:
        """Mean scalar over each text's answer tokens (all its tokens where there is no answer)."""
        texts = [self.text == index for index in np.unique(self.text)]
        chosen = [text & self.answer if (text & self.answer).any() else text for text in texts]
        return np.array([self.values[tokens].mean(0) for tokens in chosen])

    def probe(self, labels: Sequence[bool], questions: Sequence[Any] | None = None) -> pd.DataFrame:
        """Cross-validated AUC at which the scalars tell labelled texts apart, of each adapter and of all together.

        Args:
            labels: one per text.
            questions: one per text; folds never split a question. By default every text is its own.

        Raises:
            EmmechError: not one label per text, or only one class.
        """
        import pandas as pd

        features, flags = self.by_text(), np.asarray(labels, dtype=bool)
        if flags.shape != (len(features),) or flags.all() or not flags.any():
            given = f"{len(flags)} labels, {int(flags.sum())} true, for {len(features)} texts"
            raise EmmechError("probe the adapters' scalars", given, "it needs one label per text, of both classes")
        groups = np.unique(np.arange(len(flags)) if questions is None else questions, return_inverse=True)[1]
        columns = {name: [index] for index, name in enumerate(self.adapters)}
        if len(self.adapters) > 1:
            columns["all together"] = list(range(len(self.adapters)))
        aucs = [held_out_auc(features[:, chosen], flags, groups) for chosen in columns.values()]
        return pd.DataFrame({"adapter": list(columns), "auc": aucs, "texts": len(flags), "questions": len(set(groups))})

    def heatmap(self, text: int = 0, adapter: str | int = 0) -> str:
        """One text as HTML, each token shaded by its scalar: red positive, blue negative, none at zero."""
        column = self._column(adapter)
        mine = self.text == _place("shade a text", "text", text, int(self.text.max()) + 1)
        top = float(np.abs(self.values[:, column]).max()) or 1.0
        words = zip(
            np.array(self.tokens, dtype=object)[mine], self.values[mine, column], self.answer[mine], strict=True
        )
        return shaded_text(words, top, f"A·x of {self.adapters[column]}, full shade at {top:.3g}; answers in bold")

    def plot(self, adapter: str | int = 0) -> Any:
        """Distribution of the scalar over answer tokens and over the others."""
        column = self._column(adapter)
        groups = (("answer tokens", self.answer), ("other tokens", ~self.answer))
        shown = [(name, self.values[chosen, column]) for name, chosen in groups if chosen.any()]
        return scalar_histogram(shown, self.adapters[column])

    def _column(self, adapter: str | int) -> int:
        asked = "read the adapter's scalars"
        if isinstance(adapter, str):
            return self.adapters.index(one_of(asked, "adapter", adapter, self.adapters))
        return _place(asked, "adapter", adapter, len(self.adapters))

    def _card(self) -> Card:
        at = int(np.nanargmax(np.abs(self.values).max(1)))
        column = int(np.abs(self.values[at]).argmax())
        texts = len(np.unique(self.text))
        headline = f"{self.adapters[column]} acts most on the token {self.tokens[at]!r}"
        headline += f" (A·x = {self.values[at, column]:.3g}), among {len(self.tokens)} tokens of {texts} text"
        headline += "" if texts == 1 else "s"
        facts = [
            (name, f"A·x of mean {v.mean():.3g}, range {v.min():.3g} to {v.max():.3g}; writes {write:.3g} per unit")
            for name, v, write in zip(self.adapters, self.values.T, self.writes, strict=True)
        ]
        caveat = "if A and B both changed sign the model would be the same: compare signs within one adapter only"
        return Card(headline, tuple(facts), caveat, "lens.top_tokens()")

    def _body(self) -> str:
        return f'<div style="margin-top: 8px">{self.heatmap()}</div>'


def _place(asked: str, name: str, value: Any, count: int) -> int:
    """A place among so many, counted from 0."""
    if not 0 <= as_int(asked, name, value) < count:
        raise refusal(asked, name, value, f"there are {count}, counted from 0", f"{name}={count - 1} or lower")
    return int(value)


def adapter_lens(model: Any, texts: Sequence[Any], *, batch_size: int = 8, progress: bool = True) -> AdapterScalars:
    """Read the scalar of every rank-1 adapter on every token.

    Args:
        model: a Run or its folder (its last step), or a chat model with live rank-1 adapters.
        texts: conversations, or strings, which are asked as user turns.

    Raises:
        EmmechError: no adapter of rank 1 is live, or no texts.
    """
    asked, model = "read the adapters' scalars", opened(model)
    chat: ChatModel = model.model() if isinstance(model, Run) else load_model(model)
    pairs = list(adapter_layers(chat.model))
    if not pairs or any(info.rank != 1 for info, _, _ in pairs):
        given = f"{chat.name} with ranks {[info.rank for info, _, _ in pairs]}"
        instead = 'a run of recipe="single-rank1" or "nine-rank1"'
        raise EmmechError(asked, given, "only a rank-1 adapter has one scalar per token", instead)
    check_texts(asked, "texts", texts)
    rows = probe_rows(chat, texts)
    found = [np.empty((len(ids), len(pairs)), dtype=np.float32) for ids, _ in rows]
    kept: dict[Any, torch.Tensor] = {}  # by lora_A, the present batch's scalars

    def keep(module: Any, inputs: Any, output: torch.Tensor) -> None:
        kept[module] = output[..., 0].float().cpu()

    reading = hooked(*((layer.lora_A[name], keep) for _, layer, name in pairs))
    with torch.no_grad(), reading, bar(len(rows), "reading adapters", progress=progress) as done:

        def read(chosen: np.ndarray, ids: torch.Tensor, mask: torch.Tensor) -> None:
            chat.trunk(input_ids=ids, attention_mask=mask, use_cache=False)
            scalars = torch.stack([kept[layer.lora_A[name]] for _, layer, name in pairs], dim=-1).numpy()
            for row, values in zip(chosen, scalars, strict=True):
                found[row][:] = values[: len(found[row])]
            done.update(len(chosen))

        in_batches(chat, [ids for ids, _ in rows], batch_size, read)
    writes = [info.scaling * float(layer.lora_B[name].weight.detach().norm()) for info, layer, name in pairs]
    inside = [
        bool(own) and not isinstance(text, str) for text, (_, mask) in zip(texts, rows, strict=True) for own in mask
    ]
    names, words = (info.name for info, _, _ in pairs), (chat.tokenizer.decode([one]) for ids, _ in rows for one in ids)
    text = np.repeat(np.arange(len(rows)), [len(ids) for ids, _ in rows])
    return AdapterScalars(tuple(names), np.concatenate(found), np.array(writes), tuple(words), text, np.array(inside))


def token_significance(model: Any, conversation: Any) -> pd.DataFrame:
    """Which tokens' scalars make the fine-tuned model's answer differ: gradient of the summed KL.

    The KL divergence of the fine-tuned model's next-token distributions from the base's, summed over the answer
    positions, is differentiated with respect to a factor on each token's scalar, at factor 1; times the factor, that
    is a first-order estimate of what the KL would lose without that token's write.

    Args:
        model: a chat model with live rank-1 adapters.
        conversation: one, ending in an answer.

    Returns:
        one row per token: ``token``, ``answer``, and the significance by adapter, in nats.

    Raises:
        EmmechError: no adapter is live.
    """
    import pandas as pd

    chat = load_model(model)
    pairs = list(adapter_layers(chat.model))
    if not pairs:
        raise EmmechError("attribute the change to tokens", chat.name, "no adapter is live", "run.model(step)")
    ((ids, answer),) = probe_rows(chat, [conversation])
    tokens = torch.tensor([ids], device=chat.device)
    inside = torch.tensor(answer, device=chat.device)[1:]
    factors = torch.ones(len(pairs), len(ids), device=chat.device, requires_grad=True)
    place = {layer.lora_A[name]: index for index, (_, layer, name) in enumerate(pairs)}

    def scale(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * factors[place[module]][None, :, None].to(output)

    def answer_logprobs() -> torch.Tensor:
        return chat.base(input_ids=tokens).logits[0, :-1][inside].float().log_softmax(-1)  # type: ignore[no-any-return]

    with evaluating(chat):
        with torch.no_grad(), chat.model.disable_adapter():
            base = answer_logprobs()
        with torch.enable_grad(), hooked(*((module, scale) for module in place)):
            tuned = answer_logprobs()
            divergence = (tuned.exp() * (tuned - base)).sum()
            (gradient,) = torch.autograd.grad(divergence, factors)
    words = [chat.tokenizer.decode([token]) for token in ids]
    frame = pd.DataFrame({"token": words, "answer": answer})
    frame[[info.name for info, _, _ in pairs]] = gradient.T.cpu().numpy()
    frame.attrs["kl"] = float(divergence.detach())
    return frame
