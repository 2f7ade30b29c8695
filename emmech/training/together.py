"""Runs that train together: one forward for all their rows, everything else apart.

All runs advance in step. Each optimizer step gathers every run's rows into shared forwards, in which each row
sees its own run's adapters; losses, clipping, AdamW and schedules stay apart. The Recorder of each run hears the
same events as from the Hugging Face Trainer, and writes the same Run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerControl, TrainerState

from emmech.chat.adapter import AdapterInfo
from emmech.chat.encode import IGNORED, Encoded
from emmech.chat.logprob import pad
from emmech.chat.model import ChatModel
from emmech.errors import EmmechError
from emmech.progress import bar
from emmech.training.capture import Capture
from emmech.training.frozen import Frozen
from emmech.training.prefix import Trunk, batches_by_length, detached
from emmech.training.recipe import Recipe
from emmech.training.recorder import Measure, Recorder
from emmech.training.schedule import Step, batch_order, learning_rates
from emmech.training.stacked import AdamW, StackedAdapters, clip_by_run

__all__ = ["Member", "StackRecorder", "Together"]

_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}  # a larger batch leaves a core's cache and gains nothing there
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

    def _find_capture(self, model: Any) -> Capture:
        return _StackCapture(self.together.adapters, self.run)

    def _watch_gradients(self) -> Any:
        return _StackNorms(self.together, self.run)

    def _measure(self, step: int) -> dict[str, float]:
        if "held_out_loss" in self._measures:
            self.together.held_out_losses()  # of all runs, before PEFT's own layers come on
        with self.together.adapters.only(self.run):
            return super()._measure(step)

    def measure(self, name: str, measure: Measure) -> None:
        """Take one more number from the model whenever measures are due."""
        self._measures[name] = measure

    def held_out_loss(self, chat: ChatModel) -> float:
        """The measure of that name, for all runs in one pass."""
        return self.together.held_out_losses()[self.run]


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
        members: the runs.
        frozen: the states to keep, or None.
        scratch: folder for them.
    """

    def __init__(
        self, chat: ChatModel, whole: Encoded, members: Sequence[Member], frozen: Frozen | None, scratch: Path
    ) -> None:
        self._chat, self._members = chat, members
        self.adapters = StackedAdapters(chat, [m.start for m in members])
        lowest = [info for info in self.adapters.infos if frozen and info.layer == frozen.layer]
        self._write_of = lowest[0] if frozen and frozen.at_write else None
        self.adapters.at_write = self._write_of.name if self._write_of else None
        used = sorted({row for m in members for row in (*m.train, *m.held_out)})
        self._place = {row: place for place, row in enumerate(used)}
        self._rows = whole.take(used)
        # of each row: answer tokens that its first tokens predict
        self._answers = [
            np.cumsum(np.asarray(labels) != IGNORED) - (labels[0] != IGNORED) for labels in self._rows.labels
        ]
        self._frozen, self._scratch = frozen, scratch
        self.norms: dict[str, list[float]] = {}
        self._held: tuple[int, list[float]] | None = None
        self._now = 0
        self._lost: dict[int, int] = {}  # runs that are no longer finite, and since which step

    def train(self, *, progress: bool) -> dict[str, int]:
        """Train to the end.

        Returns:
            the runs that stopped being finite, by name, and the step at which they did.

        Raises:
            EmmechError: the architecture cannot be cut where it would have to be.
        """
        with self.adapters.live():
            self._trunk = Trunk(self._chat, self._rows, self._frozen, self._scratch)
            try:
                self._check_cut()
                self._loop(progress)
            finally:
                self._trunk.close()
                for member in self._members:
                    member.recorder.close()
        return {self._members[run].name: step for run, step in self._lost.items()}

    def _check_cut(self) -> None:
        deviation = self._trunk.deviation()
        if not deviation <= _TOLERANCE.get(self._chat.dtype, 1e-4):
            raise EmmechError(
                f"train {self._chat.name} in parts",
                given=f"blocks from {self._frozen.blocks if self._frozen else 0} on run by themselves",
                why=f"the result is off by {deviation:.1e}: the architecture does more between its blocks",
                instead="one seed at a time, with prefix=False",
            ) from None

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
                (run, *course.rows[i])
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

    def held_out_losses(self) -> list[float]:
        """Mean cross-entropy per answer token of each run's held-out rows, in nats."""
        if self._held is None or self._held[0] != self._now:
            chosen = [
                (run, self._place[i], len(self._rows.input_ids[self._place[i]]))
                for run, member in enumerate(self._members)
                if run not in self._lost
                for i in member.held_out
            ]
            with torch.no_grad():
                self._held = self._now, self._pass(chosen, backward=False)
        return self._held[1]

    def _pass(self, chosen: Sequence[tuple[int, int, int]], *, backward: bool) -> list[float]:
        """Each run's mean loss over its ``chosen`` rows (run, row, tokens), and with ``backward`` its gradient."""
        device, stem = self._chat.device, self._trunk.stem
        answers = {(row, n): int(self._answers[row][n - 1]) for _, row, n in chosen}
        items = torch.zeros(len(self._members), dtype=torch.float64)
        for run, row, n in chosen:
            items[run] += answers[row, n]
        losses = torch.zeros(len(self._members), dtype=torch.float64, device=device)
        per_item = (1.0 / items).to(device)
        present = sorted({run for run, _, _ in chosen})
        runs_of_past = torch.tensor(present, device=device)
        with self.adapters.rows_of(runs_of_past):
            whole = self._trunk.read_stem(len(present), self._writer(runs_of_past, [stem] * len(present)))
        past, cuts = detached(whole)
        # the last token of a row predicts nothing
        lengths = [n - stem - 1 for _, _, n in chosen]
        for batch in batches_by_length(lengths, _BATCH_TOKENS[_kind(device)]):
            members, own = [chosen[i] for i in batch], [lengths[i] for i in batch]
            runs = torch.tensor([run for run, _, _ in members], device=device)
            sequences = torch.tensor([present.index(run) for run, _, _ in members], device=device)
            targets = pad([self._rows.labels[row][stem + 1 : n] for _, row, n in members], IGNORED).to(device)
            read = targets != IGNORED
            with self.adapters.rows_of(runs):
                hidden = self._trunk.hidden(
                    [row for _, row, _ in members], own, read, past, sequences, self._writer(runs, own)
                )
            nll = self._trunk.nll(hidden, targets[read])
            of = runs.repeat_interleave(read.sum(1))
            losses.index_add_(0, of, nll.detach().double() * per_item[of])
            if backward:
                total = (nll * per_item[of].to(nll.dtype)).sum()
                if not torch.isfinite(total):
                    broken = {run for run, _, _ in members}
                    raise _NotFinite({r for r in broken if not torch.isfinite(losses[r])} or broken)
                total.backward()
        if backward and cuts:
            torch.autograd.backward([made for _, made in cuts], [leaf.grad for leaf, _ in cuts])
        return losses.tolist()  # type: ignore[no-any-return]

    def _writer(
        self, runs: torch.Tensor, own: Sequence[int]
    ) -> Callable[[torch.Tensor], torch.Tensor] | None:
        info = self._write_of
        if info is None:
            return None
        of_token = runs.repeat_interleave(torch.tensor(own, device=runs.device))
        return lambda x: self.adapters.write(info, x, of_token)


def _kind(device: torch.device) -> str:
    return device.type if device.type in _BATCH_TOKENS else "cuda"
