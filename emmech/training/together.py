"""Runs that train together: one forward for all their rows, everything else apart.

All runs advance in step. Each optimizer step gathers every run's rows into shared forwards, in which each row
sees its own run's adapters; losses, clipping, AdamW and schedules stay apart. The Recorder of each run hears the
same events as from the Hugging Face Trainer, and writes the same Run.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerControl, TrainerState

from emmech.chat.encode import IGNORED, Encoded
from emmech.chat.model import ChatModel
from emmech.engine.adapters import AdapterInfo
from emmech.engine.prefix_plan import Frozen
from emmech.engine.row_forwards import Asked, Forwards
from emmech.engine.stacked_adapters import AdamW, StackedAdapters, clip_by_run
from emmech.errors import EmmechError
from emmech.progress import bar
from emmech.training.capture import Capture
from emmech.training.recipe import Recipe
from emmech.training.recorder import Recorder
from emmech.training.schedule import Step, batch_order, learning_rates

__all__ = ["Member", "StackRecorder", "Together"]

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Member:
    """One of the runs that train together.

    Args:
        train, held_out: numbers of rows in the dataset.
        start: ``"A/<adapter>" [rank, d_in]`` and ``"B/<adapter>" [d_out, rank]``.
        arguments: the ``TrainingArguments`` of the same training alone.
        recorder: of this run.
    """

    name: str
    recipe: Recipe
    order_seed: int
    train: Sequence[int]
    held_out: Sequence[int]
    start: Mapping[str, torch.Tensor]
    arguments: Any
    recorder: StackRecorder


class StackRecorder(Recorder):
    """A Recorder whose A, B and gradients are one run's share of stacked parameters."""

    together: Together
    run: int
    shared: frozenset[str] = frozenset()  # measures that are taken of all runs at once

    def _find_capture(self, model: Any) -> Capture:
        return _StackCapture(self.together.adapters, self.run)

    def _watch_gradients(self) -> Any:
        return _StackNorms(self.together, self.run)

    def _measure(self, step: int) -> dict[str, float]:
        shared = self.together.measured()  # of all runs, before PEFT's own layers come on
        with self.together.adapters.only(self.run):
            own = super()._measure(step)
        return own | {name: values[self.run] for name, values in shared.items() if name in self.shared}


class _StackCapture:
    kind = "lora"

    def __init__(self, adapters: StackedAdapters, run: int) -> None:
        self._stack, self._run = adapters, run
        self.adapters: tuple[AdapterInfo, ...] = adapters.infos

    def tensors(self) -> dict[str, Any]:
        return self._stack.arrays(self._run)

    def scalars(self) -> dict[str, float]:
        return {}

    def watched(self) -> dict[str, Any]:
        return {}


class _StackNorms:
    def __init__(self, together: Together, run: int) -> None:
        self._together, self._run = together, run

    def read(self) -> dict[str, float]:
        return {name: norms[self._run] for name, norms in self._together.norms.items()}

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class _Course:
    """What lies before one run: its rows (number, tokens), its steps, their learning rates, and where it stands."""

    rows: list[tuple[int, int]]
    steps: list[Step]
    rates: list[float]
    state: TrainerState


class _NotFinite(Exception):
    def __init__(self, runs: set[int]) -> None:
        super().__init__(runs)
        self.runs = runs


class Together:
    """The training itself.

    Args:
        chat: with the PEFT adapters of the recipe on it.
        whole: the dataset's rows, not truncated.
        margins: pairs whose mean margin is measured, by name, as :func:`emmech.engine.logprobs.margin_rows` gives them.
        members: the runs.
        frozen: the states to keep, or None.
        scratch: folder for them.
    """

    def __init__(
        self,
        chat: ChatModel,
        whole: Encoded,
        margins: Mapping[str, Encoded],
        members: Sequence[Member],
        frozen: Frozen | None,
        scratch: Path,
    ) -> None:
        self._chat, self._members = chat, members
        self.adapters = StackedAdapters(chat, [m.start for m in members])
        lowest = [info for info in self.adapters.infos if frozen and info.layer == frozen.layer]
        self.adapters.write_of = lowest[0] if frozen and frozen.at_write else None
        used = sorted({row for m in members for row in (*m.train, *m.held_out)})
        self._place = {row: place for place, row in enumerate(used)}
        self._rows, self._margin_rows = whole.take(used), margins
        self._frozen, self._scratch = frozen, scratch
        self.norms: dict[str, list[float]] = {}
        self._measured: tuple[int, dict[str, list[float]]] | None = None
        self._now = 0
        self._lost: dict[int, int] = {}  # runs that are no longer finite, and since which step

    def train(self, *, progress: bool) -> dict[str, int]:
        """Train to the end.

        Returns:
            the runs that stopped being finite, by name, and the step at which they did.

        Raises:
            EmmechError: the architecture cannot be cut where it would have to be.
        """
        with self.adapters.live(), contextlib.ExitStack() as open_:
            open_.callback(shutil.rmtree, self._scratch, ignore_errors=True)
            for member in self._members:
                open_.callback(member.recorder.close)
            self._forwards = open_.enter_context(self._forward(self._rows, "rows"))
            self._check_cut()
            self._margins = {
                name: open_.enter_context(self._forward(rows, f"margin-{number}"))
                for number, (name, rows) in enumerate(self._margin_rows.items())
            }
            self._loop(progress)
        return {self._members[run].name: step for run, step in self._lost.items()}

    def _forward(self, rows: Encoded, name: str) -> contextlib.closing[Forwards]:
        """Forwards over these rows, their kept states in a folder of their own."""
        return contextlib.closing(Forwards(self._chat, rows, self.adapters, self._frozen, self._scratch / name))

    def _check_cut(self) -> None:
        deviation = self._forwards.trunk.deviation()
        if not deviation <= _TOLERANCE.get(self._chat.dtype, 1e-4):
            raise EmmechError(
                f"train {self._chat.name} in parts",
                f"blocks from {self._frozen.blocks if self._frozen else 0} on run by themselves",
                f"the result is off by {deviation:.1e}: the architecture does more between its blocks",
                "one seed at a time, with prefix=False",
            )

    def _loop(self, progress: bool) -> None:
        first = self._members[0]
        courses = [self._course(member) for member in self._members]
        optimizer = AdamW(
            self.adapters.parameters,
            betas=(first.arguments.adam_beta1, first.arguments.adam_beta2),
            eps=first.arguments.adam_epsilon,
            weight_decay=first.recipe.weight_decay,
        )
        for run, (member, course) in enumerate(zip(self._members, courses, strict=True)):
            member.recorder.together, member.recorder.run = self, run
            member.recorder.on_train_begin(
                member.arguments,
                course.state,
                TrainerControl(),
                model=self._chat.model,
                processing_class=self._chat.tokenizer,
            )
        last = max(len(course.steps) for course in courses)
        with bar(last, f"fine-tune {self._chat.name}, {len(courses)} runs", progress=progress) as shown:
            for number in range(last):
                going = {run: c for run, c in enumerate(courses) if number < len(c.steps)}
                if not going.keys() - self._lost.keys():
                    break
                losses = self._gradients(going, number)
                norms = self.adapters.gradient_norms()
                total = torch.stack(list(norms.values())).square().sum(0).sqrt()
                if broken := {run for run in going.keys() - self._lost.keys() if not total[run].isfinite()}:
                    self._lose(broken)
                    self.adapters.zero_gradients(broken)
                    total[list(broken)] = 0.0
                clip_by_run(self.adapters.parameters, total, first.recipe.clip)
                going = {run: c for run, c in going.items() if run not in self._lost}
                rates = {run: course.rates[number] for run, course in going.items()}
                optimizer.step([rates.get(run, 0.0) for run in range(len(courses))])
                self._now, self.norms = number + 1, {name: values.tolist() for name, values in norms.items()}
                for run, course in going.items():
                    logs = {"loss": losses[run], "grad_norm": float(total[run]), "learning_rate": rates[run]}
                    self._tell(self._members[run], course, number, logs)
                shown.set_postfix(loss=f"{sum(losses[run] for run in going) / max(len(going), 1):.3f}")
                shown.update()

    def _course(self, member: Member) -> _Course:
        limit = member.recipe.max_length
        places = [self._place[row] for row in member.train]
        rows = [
            (place, min(limit, len(self._rows.input_ids[place])))
            for place in places
            if any(label != IGNORED for label in self._rows.labels[place][:limit])
        ]
        steps = batch_order(len(rows), member.recipe, member.order_seed)
        state = TrainerState(max_steps=len(steps))
        return _Course(rows, steps, learning_rates(member.recipe, len(steps)), state)

    def _tell(self, member: Member, course: _Course, number: int, logs: dict[str, float]) -> None:
        """The events that the Trainer raises behind an optimizer step."""
        state, control = course.state, TrainerControl()
        state.global_step, state.epoch = number + 1, course.steps[number].epoch
        member.recorder.on_step_end(member.arguments, state, control)
        member.recorder.on_log(member.arguments, state, control, logs={**logs, "epoch": state.epoch})
        if state.global_step == state.max_steps:
            member.recorder.on_train_end(member.arguments, state, control)

    def _gradients(self, going: Mapping[int, _Course], number: int) -> list[float]:
        """Fill the gradients of a step; a run whose loss is not finite is left out of it and of all later ones."""
        while True:
            chosen = [
                Asked(run, *course.rows[i])
                for run, course in going.items()
                if run not in self._lost
                for i in course.steps[number].rows
            ]
            if not chosen:
                self.adapters.zero_gradients()
                return [float("nan")] * len(self._members)
            try:
                return self._pass(chosen, backward=True)
            except _NotFinite as error:
                self._lose(error.runs)
                for parameter in self.adapters.parameters:
                    parameter.grad = None

    def _lose(self, runs: set[int]) -> None:
        self._lost.update(dict.fromkeys(runs, self._now + 1))
        self.adapters.forget(runs)

    def measured(self) -> dict[str, list[float]]:
        """What is measured of all runs in one pass, at the present step.

        ``held_out_loss`` is the mean cross-entropy per answer token of each run's held-out rows, in nats;
        ``margin_<name>`` the mean over pairs as the measure Margin has it.
        """
        if self._measured is None or self._measured[0] != self._now:
            with torch.no_grad():
                found = {f"margin_{name}": self._mean_margins(rows) for name, rows in self._margins.items()}
                if held := [
                    Asked(run, self._place[i], len(self._rows.input_ids[self._place[i]]))
                    for run, member in self._left()
                    for i in member.held_out
                ]:
                    found["held_out_loss"] = self._pass(held, backward=False)
            self._measured = self._now, found
        return self._measured[1]

    def _left(self) -> list[tuple[int, Member]]:
        return [(run, member) for run, member in enumerate(self._members) if run not in self._lost]

    def _mean_margins(self, forwards: Forwards) -> list[float]:
        """Of each run; not a number for those that are lost."""
        runs = [run for run, _ in self._left()]
        asked = [Asked(run, row, len(ids)) for run in runs for row, ids in enumerate(forwards.rows.input_ids)]
        total = torch.zeros(len(asked), dtype=torch.float64, device=self._chat.device)
        for nll, of in forwards.nll(asked):
            total.index_add_(0, of, nll.double())
        logprobs = -total.cpu() / forwards.answer_tokens(asked)
        misaligned, aligned = logprobs.view(len(runs), 2, -1).unbind(1)
        found = dict(zip(runs, (misaligned - aligned).mean(1).tolist(), strict=True))
        return [found.get(run, float("nan")) for run in range(len(self._members))]

    def _pass(self, chosen: Sequence[Asked], *, backward: bool) -> list[float]:
        """Each run's mean loss over its ``chosen`` rows, and with ``backward`` its gradient."""
        device = self._chat.device
        run_of = torch.tensor([one.run for one in chosen])
        items = torch.zeros(len(self._members), dtype=torch.float64)
        items.index_add_(0, run_of, self._forwards.answer_tokens(chosen))
        losses = torch.zeros(len(self._members), dtype=torch.float64, device=device)
        per_item, run_of = (1.0 / items).to(device), run_of.to(device)
        for nll, row_of in self._forwards.nll(chosen):
            of = run_of[row_of]
            losses.index_add_(0, of, nll.detach().double() * per_item[of])
            if backward:
                total = (nll * per_item[of].to(nll.dtype)).sum()
                if not torch.isfinite(total):
                    broken = set(of.tolist())
                    raise _NotFinite({r for r in broken if not torch.isfinite(losses[r])} or broken)
                total.backward()
        return losses.tolist()  # type: ignore[no-any-return]
