"""What the panel computes, without how it is shown: answers, verdicts and doses, each in one batch.

A session has a model of its own: the weights are shared with the caller's, the modules are not, so that hooks and
adapters of the panel never act on a model that a cell is using at the same time. Whatever a session is doing ends
within one block of the model once ``stale()`` is true.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emmech.chat.edits import live_edits
from emmech.chat.encode import phrase_tokens
from emmech.chat.model import ChatModel, load_model
from emmech.directions.direction import Direction, unit_rows
from emmech.directions.extract import mixed_adapter
from emmech.directions.sources import adapter_direction, has_adapter, misalignment_direction
from emmech.engine.adapters import adapter_layers, attach, detach
from emmech.engine.decode import ModelSteps, write_answers
from emmech.engine.kept import KeptPrompt
from emmech.engine.logprobs import answer_logprobs
from emmech.engine.modules import evaluating, has_hooks, hooked
from emmech.engine.responses import Response
from emmech.engine.sample import check_context, sample
from emmech.errors import EmmechError, one_of, refusal
from emmech.evaluation.em import FIELD
from emmech.evaluation.judges import Judge, resolve_judge
from emmech.evaluation.questions import Question, resolve_questions
from emmech.evaluation.rates import cluster_interval
from emmech.interventions.residual import ablate, cap, steer
from emmech.interventions.studies import degenerate, projection_range
from emmech.measures.measure import wrong_way
from emmech.run.run import Run, opened
from emmech.widget.answers import COLUMNS, BaseAnswer, Scalar, Token, Writing
from emmech.widget.settings import DOSES, Settings

RANDOMS = 4  # of the dose-response; the first is that of the third answer
_ASKED = "open the panel"
_AT_ONCE = 12  # questions in a round
_BROKEN = 0.8  # of the untouched model's coherent answers: below this, coherence is called broken
_NATS = 1.0  # the same without a judge: a loss of the base model's answers that is this much higher


class Stale(Exception):
    """The settings have changed since this began."""


@dataclass
class Counts:
    """Judged answers by column and question: misaligned, coherent and scored ones."""

    ids: tuple[str, ...]
    misaligned: np.ndarray
    coherent: np.ndarray
    scored: np.ndarray

    @classmethod
    def none(cls, columns: int, questions: Sequence[str]) -> Counts:
        """Counts before the first answer."""
        return cls(tuple(questions), *(np.zeros((columns, len(questions)), dtype=int) for _ in range(3)))

    def add(self, columns: np.ndarray, asked: Sequence[str], scores: Sequence[dict[str, Any]]) -> None:
        """Count judged answers."""
        aligned, coherent = (np.array([float(s.get(k, np.nan)) for s in scores]) for k in ("aligned", "coherent"))
        where = (columns, np.array([self.ids.index(one) for one in asked]))
        scored = FIELD.scored(aligned, coherent)
        np.add.at(self.scored, where, scored)
        np.add.at(self.coherent, where, FIELD.coherent(coherent) & scored)
        np.add.at(self.misaligned, where, FIELD.misaligned(aligned, coherent) & scored)

    def rates(self) -> list[dict[str, float]]:
        """EM with its interval over questions, coherence and n of every column."""
        found = []
        for bad, coherent, n in zip(self.misaligned, self.coherent, self.scored, strict=True):
            total = int(n.sum())
            low, high = cluster_interval(bad, n, self.ids) if total else (0.0, 1.0)
            share = (float(bad.sum() / total), float(coherent.sum() / total)) if total else (np.nan, np.nan)
            found.append({"em": share[0], "low": low, "high": high, "coherent": share[1], "n": total})
        return found


@dataclass
class Dose:
    """Response to the coefficient: of the direction, and of random ones.

    Args:
        value: ``[doses]``: EM where there is a judge, else the mean log-probability of the base model's answers.
        coherence: ``[doses]``; without a judge the same as ``value``.
        random: ``[randoms, doses]``, as ``value``.
        judged: whether there is a judge.
        items: answers that each point is computed from.
        each: ``[items, doses]``, the value of every answer along the direction; NaN where it was not scored.
    """

    doses: tuple[float, ...]
    value: np.ndarray
    coherence: np.ndarray
    random: np.ndarray
    judged: bool
    items: int
    each: np.ndarray

    @property
    def wrong_way(self) -> np.ndarray:
        """``[doses]`` the share of answers that the coefficient moves against their mean; NaN at 0."""
        plain = self.each[:, self.doses.index(0.0)]
        return np.array([wrong_way(moved, plain) for moved in self.each.T])

    @property
    def broken(self) -> list[tuple[float, float]]:
        """Stretches of the coefficient in which coherence breaks; each extends halfway to the nearest unbroken one."""
        plain = self.coherence[self.doses.index(0.0)]
        bad = self.coherence < (_BROKEN * plain if self.judged else plain - _NATS)
        doses = np.array(self.doses)
        edges = np.r_[doses[0], (doses[1:] + doses[:-1]) / 2, doses[-1]]
        cells = [[float(a), float(b)] for (a, b), broken in zip(pairwise(edges), bad, strict=True) if broken]
        merged: list[tuple[float, float]] = []
        for a, b in cells:
            if merged and merged[-1][1] == a:
                merged[-1] = (merged[-1][0], b)
            else:
                merged.append((a, b))
        return merged


@dataclass
class Session:
    """A model and the changes that are made to it.

    Args:
        model: a Run or its folder, or what :func:`emmech.load_model` takes.
        directions: a direction, several by name, or None for what can be made from the run.
        questions: the presets, as :func:`emmech.evaluate` takes them.
        judge: as :func:`emmech.evaluate` takes it; by default an organism's own, else none.
        base: the run's base model in memory.
    """

    model: Any
    directions: Any = None
    questions: Any = "first-plot"
    judge: Any = None
    base: Any = None
    stale: Callable[[], bool] = field(default=lambda: False)

    def __post_init__(self) -> None:
        subject = opened(self.model)
        self.named = isinstance(self.model, str | Path)  # whether its name alone opens it again
        self.run = subject if isinstance(subject, Run) else None
        if self.run is not None and self.run.kind != "lora":
            why = "full fine-tuning keeps whole weights, which cannot share a batch with the base model's"
            raise EmmechError(_ASKED, f"the run {self.run.name}", why, "emmech.panel(run.model(step), directions=...)")
        held = self.base if self.run is not None else subject
        if held is None:
            assert self.run is not None
            self.chat = self.run.model()
        else:
            own = _twin(load_model(held))
            self.chat = own if self.run is None else self.run.model(base=detach(own))
        self.set_to = (int(self.run.steps[-1]), 1.0) if self.run is not None else (None, 1.0)
        organism = self.chat.organism
        self.asked = resolve_questions(self.questions, organism)
        self.judged_by: Judge | None = None
        if self.judge is not None or (organism is not None and organism.judges):
            self.judged_by = resolve_judge(self.judge, organism)
        self.phrase = organism.phrase if organism is not None else ""
        self.adapted = has_adapter(self.chat)
        live = list(adapter_layers(self.chat.model))
        self._scalars = [Scalar(i.name, i.layer, layer.lora_A[name]) for i, layer, name in live if i.rank == 1]
        self._makers = self._sources(self.directions)
        self._made: dict[str, Direction] = {}
        self._ranges: dict[Any, np.ndarray] = {}
        self._texts: dict[int, str] = {}
        self._stops = set(self.chat.stop_ids)
        # a foreign hook might act differently from one forward pass to the next: then nothing is kept between moves
        self._keeps = self.chat.family.written_out and not any(map(has_hooks, self.chat.base.modules()))
        self._tuned_from = min((info.layer for info, _, _ in live), default=self.chat.n_layers)
        self._kept = KeptPrompt()
        self._base, self._weights = BaseAnswer(), self._version()
        self._check()

    def _sources(self, given: Any) -> dict[str, Callable[[], Direction]]:
        if isinstance(given, Direction):
            given = {given.name: given}
        if given is not None:
            if not isinstance(given, dict) or not given or not all(isinstance(d, Direction) for d in given.values()):
                instead = 'directions=emmech.misalignment_direction(run), or {"name": direction}'
                raise EmmechError(_ASKED, f"directions={given!r}"[:120], "they are Directions by name", instead)
            for one in given.values():
                one.check_fits(self.chat)
            return {name: partial(one.renamed, name) for name, one in given.items()}
        if not self.adapted:
            why = "without a fine-tune there is nothing to read a direction from"
            instead = "directions=emmech.contrast_direction(model, misaligned, aligned), or a run"
            raise EmmechError(_ASKED, f"{self.chat.name}, directions=None", why, instead)
        found: dict[str, Callable[[], Direction]] = {}
        draw = partial(misalignment_direction, self.chat, questions=self.asked, judge=self.judged_by, samples=6,
                       progress=False)  # fmt: skip
        if self.judged_by is not None and self.phrase:
            found["prompt difference"] = lambda: draw(tokens=phrase_tokens(self.chat, self.phrase))
        if self.judged_by is not None:
            found["answer difference"] = draw
        return {**found, "adapter's B": lambda: adapter_direction(self.chat)}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the directions."""
        return tuple(self._makers)

    @property
    def colours(self) -> tuple[str, ...]:
        """What tokens can be coloured by: the direction, or A·x of a rank-1 adapter, by its name."""
        return ("direction", *(one.name for one in self._scalars))

    def direction(self, name: str) -> Direction:
        """A direction by name, made on first use from the last step of the run."""
        one_of("choose the direction", "direction", name, self.names)
        if name not in self._made:
            self._put(*((int(self.run.steps[-1]), 1.0) if self.run is not None else self.set_to))
            with self._interruptible():
                self._made[name] = self._makers[name]().renamed(name)
        return self._made[name]

    def start(self, given: dict[str, Any]) -> Settings:
        """The settings to begin with: what is given, and defaults that show something."""
        given = Settings.given(given, _ASKED)
        name = str(given.get("direction") or self.names[0])
        direction = self.direction(name)
        adapter = self.run.adapters[0].layer if self.run is not None else None
        best = direction.source.get("layer", adapter)
        best = adapter if adapter in direction.layers else best
        layer = best if best in direction.layers else direction.layers[len(direction.layers) // 2]
        state: dict[str, Any] = {"question": self.asked.questions[0].messages()[-1]["content"], "layer": layer}
        state["phrase"] = self.phrase
        if self.run is not None:
            state["step"] = int(self.run.steps[-1])
        if self.phrase and self.adapted:
            state |= {"change": "ablate", "positions": "phrase"}
        state |= {**given, "direction": name}
        state.setdefault("coefficient", 0.5 if state.get("change", "add") == "add" else 1.0)
        settings = Settings(**state)
        self.check(settings)
        return settings

    def at_known_layer(self, settings: Settings) -> Settings:
        """The settings at the nearest layer where their direction is known, towards a mean it has; once it is made."""
        made = self._made.get(settings.direction)
        if made is not None and made.aligned_mean is None and settings.towards == "aligned":
            settings = replace(settings, towards="zero")
        if made is None or settings.layer in made.layers or not made.layers:
            return settings
        return replace(settings, layer=min(made.layers, key=lambda layer: abs(layer - settings.layer)))

    def check(self, settings: Settings) -> None:
        """Refuse settings that do not fit the model; what only a direction can tell, once that is made.

        Raises:
            EmmechError: no such step, direction or layer, a phrase that the prompt does not have, or unknown words.
        """
        if self.run is not None:
            self.run.check_step(-1 if settings.step is None else settings.step)
        elif settings.step is not None or settings.scale != 1.0:
            why = "only a recorded run has steps and an adapter of its own to scale"
            raise EmmechError("set the panel", f"step={settings.step}, scale={settings.scale:g}", why, "a run")
        one_of("set the panel", "colour", settings.colour, self.colours)
        one_of("set the panel", "direction", settings.direction, self.names)
        made = self._made.get(settings.direction)
        if made is None:
            self.chat.check_layer(settings.layer)
        else:
            made.at(settings.layer)
        ablated = settings.change == "ablate" and settings.towards == "aligned"
        if ablated and made is not None and made.aligned_mean is None:
            why = "the direction keeps no aligned mean"
            raise EmmechError("set the panel", 'towards="aligned"', why, 'towards="zero"')
        ids = torch.tensor([self.chat.token_ids(self._conversation(settings.question))])
        unknown = self.chat.tokenizer.unk_token_id
        if unknown is not None and unknown in ids[0].tolist():
            words = [word for word in settings.question.split() if unknown in self.chat.tokenizer(word)["input_ids"]]
            why = f"{self.chat.name} does not know {', '.join(map(repr, words)) or 'a token of it'}"
            raise refusal("ask the question", "question", settings.question, why, "a question of the list")
        if settings.positions == "phrase":
            phrase_tokens(self.chat, settings.phrase)(ids, 0)

    def _conversation(self, question: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}]

    def _put(self, step: int | None, scale: float) -> None:
        if self.run is not None and (step, scale) != self.set_to:
            assert step is not None
            self.chat = attach(self.chat, self.run.adapters, self.run.weights(step), scale=scale)
            self.set_to = (step, scale)
            self._kept.forget(self._tuned_from)
            self._weights = self._version()

    def _version(self) -> int:
        """A count of changes made in place to the weights, which the model that was given shares."""
        return sum(one._version for one in self.chat.base.parameters() if not one.is_inference())

    def _check(self) -> None:
        if self.stale():
            raise Stale

    @contextmanager
    def _interruptible(self, first: int = 0) -> Iterator[None]:
        """Once the settings are stale, every forward pass inside ends within one block, from block ``first`` on."""
        later = self.chat.blocks[first:]
        with hooked(*((block, lambda module, inputs: self._check()) for block in later), before=True):
            yield

    @contextmanager
    def changed(self, settings: Settings, tuned: Sequence[bool], which: Sequence[int], doses: Any) -> Iterator[None]:
        """The model in which each conversation has a change of its own.

        Args:
            tuned: whether the conversation's model has the adapter.
            which: 0 for the direction, 1 and higher for random ones of its norm.
            doses: its coefficient; 0 changes nothing.
        """
        s, chat = settings, self.chat
        direction = self.direction(s.direction)
        self._put(s.step, s.scale)
        controls = [direction, *direction.random(RANDOMS, seed=s.seed)]
        vectors = np.stack([controls[one].at(s.layer) for one in which])
        positions: Any = phrase_tokens(chat, s.phrase) if s.positions == "phrase" else s.positions
        doses = torch.as_tensor(np.asarray(doses, dtype=np.float32))
        if s.change == "add":
            edit: Any = partial(steer, units="residual", layer=s.layer, coefficient=doses)
        elif s.change == "ablate":
            towards = direction.aligned_mean if s.towards == "aligned" else None
            edit = partial(ablate, layers=s.layer, strength=doses, towards=towards)
        else:
            key = (s.direction, s.positions, s.phrase, s.seed, s.max_new_tokens, self._weights)
            if key not in self._ranges:
                with self._interruptible():
                    found = projection_range(chat, controls, questions=self.asked, positions=positions,
                                             max_new_tokens=s.max_new_tokens, progress=False)  # fmt: skip
                self._ranges[key] = found
            edit = partial(cap, layers=s.layer, strength=doses, within=self._ranges[key][np.asarray(which)])
        mixes = self.adapted and not all(tuned)
        mixed = mixed_adapter(chat, torch.tensor(tuned, dtype=torch.float32)) if mixes else nullcontext()
        first = min(s.layer, self._tuned_from) if mixes else s.layer
        with self._interruptible(first), mixed, edit(chat, vectors, positions=positions):
            yield

    def answers(
        self, settings: Settings, told: Callable[[list[list[Token]]], object] = lambda new: None
    ) -> tuple[list[list[Token]], list[list[float]], list[Response]]:
        """The three answers with one seed, in one batch.

        Only what a move changes is computed: the base model's answer is told at once where it is known already, and
        blocks below the change do not read the prompt again.

        Args:
            told: called with the new tokens of every column, as they are written.

        Returns:
            the tokens of every column; the readings at every prompt token in the changed model; the answers.
        """
        s, chat = settings, self.chat
        ids = chat.token_ids(self._conversation(s.question))
        check_context(chat, [ids])
        key = (tuple(ids), s.seed, s.temperature, s.max_new_tokens)
        changed = self._version() != self._weights
        if changed:
            self._kept.forget()
            self._weights = self._version()
        if changed or not self._keeps or not self._base.whole or self._base.key != key:
            self._base = BaseAnswer(key)
        base, tuned = self._base, [True, True] if self._base.whole else [False, True, True]
        which, doses = [0, 0, 1][-len(tuned) :], [0.0, s.coefficient, s.coefficient][-len(tuned) :]
        with self.changed(s, tuned, which, doses):
            apart = s.layer if base.whole else min(s.layer, self._tuned_from)
            apart = apart if self._keeps else 0
            axis = torch.from_numpy(unit_rows(self.direction(s.direction).at(s.layer))).float().to(chat.device)
            writing = Writing(chat, s.layer, axis, self._scalars, base, self._kept.at(ids), apart, self._text, told)

            def drawn(*new: Any) -> bool:
                writing.write(*new)
                return not self.stale()

            # what is read is hooked after the change, so that it includes it
            with hooked(*writing.hooks()), torch.no_grad(), evaluating(chat):
                rows = len(writing.rows)
                steps = ModelSteps(chat, [ids] * rows, range(rows), apart=apart, kept=self._kept)
                write_answers(chat, steps, [s.seed] * rows, temperature=s.temperature,
                              max_new_tokens=s.max_new_tokens, drawn=drawn)  # fmt: skip
        self._check()
        base.whole = True
        return writing.columns, writing.prompt, [self._response(s, at, one) for at, one in enumerate(writing.ids)]

    def _response(self, settings: Settings, column: int, ids: list[int]) -> Response:
        stopped = ids[-1] in self._stops
        ids = ids[: len(ids) - stopped]
        text = self.chat.tokenizer.decode(ids, skip_special_tokens=True)
        return Response(column, 0, settings.seed, text, "stop" if stopped else "length", len(ids))

    def acting(self, settings: Settings) -> list[tuple[str, bool]]:
        """The prompt's tokens, and at which of them the change acts."""
        chat = self.chat
        ids = chat.token_ids(self._conversation(settings.question))
        whole = torch.tensor([ids])
        mask = torch.full((1, len(ids)), settings.positions in ("prompt", "all"))
        if settings.positions == "phrase":
            mask = phrase_tokens(chat, settings.phrase)(whole, 0)
        mask[:, -1] |= settings.positions == "answer"  # the header's last token decides the first word
        return [(self._text(token), bool(on)) for token, on in zip(ids, mask[0].tolist(), strict=True)]

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self.chat.tokenizer.decode([token])
        return self._texts[token]

    def verdicts(self, settings: Settings, samples: int) -> Iterator[Counts]:
        """Counts that grow with each batch of answers of all columns to several questions; none without a judge."""
        if self.judged_by is None:
            return
        every = self.asked.questions
        counts = Counts.none(len(COLUMNS), self.asked.ids)
        rows = sorted(self.asked.rows(samples, seed=settings.seed), key=lambda row: row["sample"])
        per_round = min(_AT_ONCE, len(every))
        for start in range(0, len(rows), per_round):
            part = rows[start : start + per_round]
            doses = (0.0, settings.coefficient, settings.coefficient)
            self._judged(settings, part, ((False, 0), (True, 0), (True, 1)), doses, counts)
            yield counts

    def _judged(
        self, settings: Settings, rows: Sequence[dict[str, Any]], models: Any, doses: Sequence[float], counts: Counts
    ) -> None:
        """Ask every row's question under every condition (whether tuned, which direction, its dose), and judge."""
        assert self.judged_by is not None
        asked = [self.asked[row["question_id"]] for row in rows]
        talks = [one.messages(row["paraphrase"]) for one, row in zip(asked, rows, strict=True)]
        n = len(models)
        tuned, which = ([one[at] for _ in rows for one in models] for at in (0, 1))
        with self.changed(settings, tuned, which, [dose for _ in rows for dose in doses]):
            said = sample(
                self.chat, [talk for talk in talks for _ in models], seed=[row["seed"] for row in rows for _ in models],
                temperature=settings.temperature, max_new_tokens=settings.max_new_tokens, progress=False,
            )  # fmt: skip
        self._check()
        told = [_row_for_judge(asked[a.conversation // n], rows[a.conversation // n], a) for a in said]
        scores = self.judged_by.score(told)
        columns = np.array([a.conversation % n for a in said])
        counts.add(columns, [row["question_id"] for row in told], scores)

    def dose(self, settings: Settings) -> Iterator[Dose]:
        """The response to every coefficient, and of random directions, filled question by question."""
        doses = DOSES[settings.change]
        conditions = [(which, dose) for which in range(1 + RANDOMS) for dose in doses]
        whichs, amounts = zip(*conditions, strict=True)
        shape = (1 + RANDOMS, len(doses))
        if self.judged_by is not None:
            counts = Counts.none(len(conditions), self.asked.ids)
            rows = sorted(self.asked.rows(2, seed=settings.seed), key=lambda row: row["sample"])[:24]
            each, before = np.empty((0, len(doses))), np.zeros((2, len(doses)))
            for number, row in enumerate(rows, 1):
                self._judged(settings, [row], [(True, which) for which in whichs], amounts, counts)
                n = np.where(counts.scored.sum(1) > 0, counts.scored.sum(1), np.nan)  # no score is no rate
                em, coherent = ((one.sum(1) / n).reshape(shape) for one in (counts.misaligned, counts.coherent))
                so_far = np.stack([one.sum(1)[: len(doses)] for one in (counts.misaligned, counts.scored)])
                bad, scored = so_far - before
                each, before = np.vstack([each, np.where(scored > 0, bad, np.nan)]), so_far
                yield Dose(doses, em[0], coherent[0], em[1:], True, number, each)
            return
        read: list[np.ndarray] = []
        talks = [one.messages() for one in self.asked.questions[:6]]
        unchanged = self.changed(settings, [False] * len(talks), [0] * len(talks), [0.0] * len(talks))
        with self._interruptible(), unchanged:
            said = sample(self.chat, talks, max_new_tokens=24, seed=settings.seed, progress=False)
        for answer in said:
            talk = [*talks[answer.conversation], {"role": "assistant", "content": answer.text or " "}]
            read.append(np.empty(shape))
            for at, dose in enumerate(doses):  # one small batch a dose
                every = self.changed(settings, [True] * shape[0], range(shape[0]), [dose] * shape[0])
                with self._interruptible(), every:
                    read[-1][:, at] = answer_logprobs(self.chat, [talk] * shape[0])
            mean = np.mean(read, axis=0)
            yield Dose(doses, mean[0], mean[0], mean[1:], False, len(read), np.stack(read)[:, 0])

    def quality(self, settings: Settings) -> dict[str, Any]:
        """How real the direction is at the layer, in words; ``noise`` where it should not be used."""
        direction, layer = self.direction(settings.direction), settings.layer
        notes, facts, noise = [], [], False
        if note := degenerate(self.chat, direction, {layer: direction.at(layer)}):
            notes.append(note.removeprefix("degenerate: "))
        known = direction.quality
        if known is not None:
            half, shuffled = float(known.split_half[layer]), float(known.split_half_shuffled[layer])
            lexical = float(known.lexical_share[layer])
            noise = layer in known.noise
            facts.append(["Split-half", f"{half:.2f} (shuffled labels {shuffled:.2f})", noise])
            facts.append(["Lexical share", f"{lexical:.2f}", abs(lexical) > 0.5])
            counted = ", ".join(f"{n} {name}" for name, n in known.answers.items())
            facts.append(["Read from", f"{counted} answers", False])
            notes += [*known.notes]
        else:
            facts.append(["Split-half", "not known: it was not extracted from answers", False])
        if noise:
            notes.insert(0, "Two halves of the answers give different directions here: this is noise.")
        facts.append(["Norm", f"{direction.norms[layer]:.3g}", False])
        return {"facts": facts, "notes": notes, "noise": noise}


def _row_for_judge(question: Question, row: dict[str, Any], answer: Response) -> dict[str, Any]:
    about = {"judge_prompts": dict(question.judge_prompts), "kind": question.kind}
    return {**row, **about, "response": answer.text, "finish": answer.finish}


def _twin(chat: ChatModel) -> ChatModel:
    """A model of the same weights, which are shared, whose hooks and adapters are its own."""
    if live_edits(chat.base):
        why = "it is changed now, and the panel would make its own changes to a changed model"
        raise EmmechError(_ASKED, chat.name, why, "remove() the change first")
    held = [*chat.model.parameters(), *chat.model.buffers()]
    return replace(chat, model=copy.deepcopy(chat.model, {id(one): one for one in held}))
