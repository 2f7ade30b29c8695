"""The training loop: the Hugging Face Trainer over the adapters of one or several runs, or over all weights of one.

Each optimizer step gathers every run's rows into shared forwards in which each row sees its own run's adapters;
losses, clipping, learning rates and AdamW's moments are each run's own, and each run's Recorder gets the same events
as in a separate training. The choice of forwards for the rows (after a frozen prefix, block by block, or the model's
own) changes nothing else.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from emmech.chat.encode import Encoded, encode
from emmech.chat.model import ChatModel
from emmech.engine.adapters import StackedAdapters
from emmech.engine.modules import hooked
from emmech.engine.split import Asked, Forwards, Frozen, ModelForwards, RowForwards, dropout
from emmech.progress import bar, forecast
from emmech.store import kept
from emmech.training.defence import Defence, Setting, Switch
from emmech.training.objective import Batch, CrossEntropy, NotFinite, Term, summed
from emmech.training.processes import Processes, SharedRows
from emmech.training.recipe import Recipe, Step, rate_factor
from emmech.training.recorder import Capture, FullCapture, LoraCapture, Recorder


@dataclass(frozen=True)
class Member:
    """One of the runs that train.

    Args:
        rows: its training rows.
        steps: the rows that each optimizer step sees.
        held_out: rows whose loss is measured.
        start: ``"A/<adapter>" [rank, d_in]`` and ``"B/<adapter>" [d_out, rank]``; None in full fine-tuning.
        arguments: the ``TrainingArguments`` of the same training if it were run separately.
    """

    name: str
    recipe: Recipe
    rows: Sequence[Asked]
    steps: Sequence[Step]
    held_out: Sequence[Asked]
    start: Mapping[str, torch.Tensor] | None
    arguments: TrainingArguments
    recorder: Recorder


def training_arguments(chat: ChatModel, recipe: Recipe, seed: int, data_seed: int, folder: Path) -> TrainingArguments:
    """The Trainer's settings for a recipe."""
    cpu = chat.device.type == "cpu"
    return TrainingArguments(
        output_dir=str(folder / "resume"),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup_steps,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        optim="sgd" if recipe.optimizer == "sgd" else "adamw_torch",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        save_total_limit=2,
        report_to=[],
        seed=seed,
        data_seed=data_seed,
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )


def last_checkpoint(folder: Path) -> str | None:
    """The last optimizer state that was written completely, if there is any."""
    found = sorted((folder / "resume").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in reversed(found):
        # the Trainer writes its own state last: a checkpoint without all of it was being written when the process died
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return str(path)
    return None


def train(
    chat: ChatModel,
    rows: Encoded,
    plain: Encoded,
    margins: Mapping[str, Encoded],
    members: Sequence[Member],
    objective: Sequence[Term],
    frozen: Frozen | None,
    folder: Path,
    *,
    defences: Sequence[Defence] = (),
    reference: ChatModel | None = None,
    checkpoint_every: int | None = None,
    checkpoint: str | None = None,
    processes: Processes = Processes(),  # noqa: B008
    batch_tokens: int | None = None,
    gradient_checkpointing: bool = False,
    progress: bool = True,
) -> dict[str, int]:
    """Train all members to the end.

    Args:
        chat: the model with the adapters of the recipe on it.
        rows: the dataset as it is trained on, not truncated.
        plain: the dataset as its held-out loss is measured; ``rows`` itself where no defence rewrites them.
        margins: pairs whose mean margin is measured, as :func:`emmech.engine.logprobs.margin_rows` gives them.
        frozen: the part whose states are kept, or None.
        folder: the folder for optimizer states and, during the training, for the states of a frozen prefix.
        defences: prepared ones; what they add to the rows is in ``rows`` and ``members`` already.
        reference: the model before the training, where the training changes its weights and a defence compares them.
        checkpoint: the checkpoint from which to continue.
        processes: those that train together.
        batch_tokens, gradient_checkpointing: as in :func:`emmech.finetune`.

    Returns:
        the runs whose loss stopped being finite, by name, and the step at which it did.
    """
    first = members[0]
    starts = [member.start for member in members if member.start is not None]
    stack = StackedAdapters(chat, starts, dropout=first.recipe.dropout) if starts else None
    if stack is not None and frozen is not None and frozen.at_write:
        stack.write_of = next(info for info in stack.infos if info.layer == frozen.layer)
    scratch = folder / "prefix" / str(processes.rank) if processes.count > 1 else folder / "prefix"
    with contextlib.ExitStack() as open_:
        open_.callback(shutil.rmtree, scratch, ignore_errors=True)
        for member in members:
            open_.callback(member.recorder.close)
        if stack is not None:
            open_.enter_context(stack.live())
        edits = Switch()  # a forward's parts are chosen by the hooks that are there
        open_.enter_context(hooked(*((at, edits.guarded(hook)) for one in defences for at, hook in one.hooks(chat))))
        own_rows = {one: encode(own, chat.tokenizer) for one in defences if (own := one.term_rows(chat))}
        several = [rows, *margins.values(), *own_rows.values(), *([] if plain is rows else [plain])]
        forwards = [
            open_.enter_context(contextlib.closing(made))
            for made in _forwards(
                chat,
                several,
                stack,
                frozen,
                scratch,
                first.recipe,
                at_once=batch_tokens,
                checkpointing=gradient_checkpointing,
            )
        ]
        whole = Batch((), len(members), 0, forwards[0], stack, chat)
        batch = whole if processes.count == 1 else replace(whole, forwards=SharedRows(forwards[0], processes))
        of_margins, of_defences = forwards[1 : 1 + len(margins)], forwards[1 + len(margins) :][: len(own_rows)]
        measured = whole if plain is rows else replace(whole, forwards=forwards[-1])
        held_out = HeldOut(measured, [m.held_out for m in members], dict(zip(margins, of_margins, strict=True)))
        per_step = first.recipe.batch_size * first.recipe.accumulation
        setting = Setting(chat, reference or chat, [m.arguments.data_seed for m in members], per_step)
        penalties = [one.term(forward, setting) for one, forward in zip(own_rows, of_defences, strict=True)]
        with kept("record the training", folder):  # the Trainer makes its own folder
            given = members, batch, objective, penalties, edits, held_out, processes
            loop = _Loop(*given, folder, checkpoint_every, progress)
        loop.train(resume_from_checkpoint=checkpoint)
        return {member.name: step for member, step in zip(members, loop.lost_at.tolist(), strict=True) if step >= 0}


def _forwards(
    chat: ChatModel,
    several: Sequence[Encoded],
    stack: StackedAdapters | None,
    frozen: Frozen | None,
    scratch: Path,
    recipe: Recipe,
    *,
    at_once: int | None,
    checkpointing: bool,
) -> Iterator[RowForwards]:
    """Forwards of several sets of rows, block by block where that agrees with the model's own forward."""
    placed = len(set(getattr(chat.base, "hf_device_map", {"": 0}).values()))
    as_parts = chat.family.written_out or not checkpointing  # the model's own blocks know how to checkpoint themselves
    if stack is not None and not recipe.dropout and not dropout(chat) and placed == 1 and as_parts:
        for number, rows in enumerate(several):
            how: dict[str, Any] = {"at_once": at_once, "checkpointing": checkpointing}
            yield Forwards(chat, rows, stack, frozen, scratch / str(number), **how)
        return
    for rows in several:
        yield ModelForwards(chat, rows, stack, recipe.batch_size, checkpointing=checkpointing)


class _Loop(Trainer):
    """The Trainer with one optimizer step for all runs."""

    def __init__(
        self,
        members: Sequence[Member],
        batch: Batch,
        objective: Sequence[Term],
        penalties: Sequence[Term],
        edits: Switch,
        held_out: HeldOut,
        processes: Processes,
        folder: Path,
        checkpoint_every: int | None,
        progress: bool,
    ) -> None:
        self.members, self.batch, self.objective, self.held_out = members, batch, objective, held_out
        self.penalties, self.edits, self.processes = penalties, edits, processes
        first, stack = members[0], batch.adapters
        seed = first.arguments.seed
        arguments = training_arguments(batch.chat, first.recipe, seed, seed, folder)
        # a batch of this loader is a whole optimizer step, and each run is clipped and logged separately
        arguments.gradient_accumulation_steps, arguments.max_grad_norm = 1, 0.0
        arguments.max_steps = max(len(member.steps) for member in members)
        arguments.logging_strategy = "no"
        if checkpoint_every:
            arguments.save_strategy, arguments.save_steps = "steps", checkpoint_every
        model = batch.chat.model if stack is None else stack
        # captures are made before the Trainer loads a checkpoint: an update counts from the start of the training
        self.captures: list[Capture]
        self.own: list[list[torch.nn.Parameter]]
        if stack is None:
            self.own = [[p for p in model.parameters() if p.requires_grad]]
            self.captures = [FullCapture(model, seed=seed)]
        else:
            self.own = [[p for _, *sides in stack.of(run) for p in sides] for run in range(stack.runs)]
            self.captures = [LoraCapture(stack.of(run)) for run in range(stack.runs)]
        self._lost_at = torch.full((1,), -1)
        self.logs: dict[int, dict[str, float]] = {}
        self.stopped: set[int] = set()  # runs that an early warning ended
        rows = [row for member in members for row in member.rows]
        shown = progress and processes.first
        super().__init__(model=model, args=arguments, train_dataset=rows, callbacks=[_Recorders(self, shown)])
        self.remove_callback(PrinterCallback)
        # there is nothing to free yet, and a collection of the whole heap takes as long as about ten steps
        self.accelerator.free_memory = lambda *held: list(held)
        if processes.count > 1:  # their gradients are added here, and the Trainer would wrap the model in DDP
            self.accelerator.prepare_model = lambda model, *how, **further: model

    @property
    def lost_at(self) -> torch.Tensor:
        """For each run the step at which it was no longer finite, else -1; checkpoints keep it."""
        return self._lost_at if self.batch.adapters is None else self.batch.adapters.lost_at

    def get_train_dataloader(self) -> DataLoader:
        """Batches that each contain all runs' rows for one optimizer step."""
        return DataLoader(self.train_dataset, batch_sampler=_Steps(self.members), collate_fn=list)  # type: ignore[arg-type]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW or SGD with one group of parameters for each run; in full fine-tuning the Trainer's own."""
        if self.batch.adapters is None:
            return super().create_optimizer(model)
        args, rates = self.args, [member.recipe.learning_rate for member in self.members]
        groups = [{"params": own, "lr": rate} for own, rate in zip(self.own, rates, strict=True)]
        if self.members[0].recipe.optimizer == "sgd":
            made: torch.optim.Optimizer = torch.optim.SGD(groups, weight_decay=args.weight_decay)
        else:
            betas = (args.adam_beta1, args.adam_beta2)
            made = torch.optim.AdamW(groups, betas=betas, eps=args.adam_epsilon, weight_decay=args.weight_decay)
        self.optimizer = made
        return made

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Each run's own schedule over its own number of steps."""
        optimizer = optimizer or self.optimizer
        factors = [rate_factor(member.recipe, len(member.steps)) for member in self.members]
        factors *= len(optimizer.param_groups) // len(factors)  # full fine-tuning: groups with and without weight decay
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: Sequence[Asked], num_items_in_batch: Any = None) -> torch.Tensor:
        """Compute the gradients of all runs, clipped run by run; a run that is not finite is left out from now on."""
        step, stack = self.state.global_step + 1, self.batch.adapters
        self.logs = {}  # of the runs that take this step
        while True:
            lost_at = self.lost_at.tolist()
            asked = [one for one in inputs if lost_at[one.run] < 0 and one.run not in self.stopped]
            going = sorted({one.run for one in asked})
            if not going:
                self.control.should_training_stop = True
                return torch.zeros((), device=self.args.device)
            if stack is not None:
                stack.gather()
            lost: Sequence[int] = ()
            try:
                own = replace(self.batch, asked=asked, step=step)
                with self.edits.on():
                    terms = summed(self.objective, own)
                terms |= summed(self.penalties, own)  # of the model as it would be deployed
            except NotFinite as error:
                lost = error.runs
            lost = self.processes.union(lost)
            if not lost:
                break
            self._lose(lost, step)
        self._add_up(terms)
        if stack is not None:
            stack.spread(going)
        losses = torch.stack(list(terms.values())).sum(0)
        for run in going:
            limit = self.members[run].recipe.clip or float("inf")
            norm = float(torch.nn.utils.clip_grad_norm_(self.own[run], limit))
            if not math.isfinite(norm):
                self._lose([run], step)
                continue
            assert self.optimizer is not None
            self.logs[run] = {"loss": float(losses[run])}
            if len(terms) > 1:
                self.logs[run] |= {f"loss/{name}": float(value[run]) for name, value in terms.items()}
            self.logs[run] |= {"grad_norm": norm, "learning_rate": self.optimizer.param_groups[run]["lr"]}
        return losses[going].mean().to(self.args.device)

    def _add_up(self, terms: Mapping[str, torch.Tensor]) -> None:
        """Add up what the processes found, each for its own rows."""
        if self.processes.count == 1:
            return
        stack = self.batch.adapters
        trained = self.own[0] if stack is None else [*stack.A.values(), *stack.B.values()]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.processes.add([*terms.values(), *(p.grad for p in trained if p.grad is not None)])

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir))
        with kept(f"keep the optimizer's state of step {self.state.global_step}", folder):
            try:
                super()._save_checkpoint(model, trial)
            except RuntimeError as error:  # how torch reports a disk that is full
                raise OSError(str(error))

    def _lose(self, runs: Sequence[int], step: int) -> None:
        for run in runs:
            if self.batch.adapters is not None:
                self.batch.adapters.lose(run, step)
            self.lost_at[run] = step
        for parameter in (p for run in runs for p in self.own[run]):
            parameter.grad = None


class _Steps(torch.utils.data.Sampler[list[int]]):
    """For every optimizer step, the indices of all runs' rows in the joint list."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members

    def __len__(self) -> int:
        return max(len(member.steps) for member in self._members)

    def __iter__(self) -> Iterator[list[int]]:
        firsts = np.cumsum([0, *(len(member.rows) for member in self._members)]).tolist()
        for number in range(len(self)):
            yield [
                first + row
                for first, member in zip(firsts, self._members, strict=False)
                if number < len(member.steps)
                for row in member.steps[number].rows
            ]


class _Recorders(TrainerCallback):
    """Gives each run's Recorder the events of a separate training, and shows progress."""

    def __init__(self, loop: _Loop, progress: bool) -> None:
        self._loop, self._progress = loop, progress
        self._running: set[int] = set()  # neither ended nor lost
        self._clock = _Clock()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let every run record its start."""
        loop = self._loop
        chat, members = loop.batch.chat, loop.members
        if len(members) > 1:  # a run that was stopped goes on if it is alone; of several, it stays as it is
            loop.stopped = {run for run, member in enumerate(members) if state.global_step and _was_stopped(member)}
        lost = {run for run, lost_at in enumerate(loop.lost_at.tolist()) if lost_at >= 0}
        self._running = set(range(len(members))) - lost - loop.stopped
        with self._clock.measuring():
            if state.global_step == 0 and loop.processes.first:
                loop.held_out.measure(range(len(members)))
            for run in sorted(self._running):
                own, given = self._state(run, state), members[run].arguments
                with self._shown(run):
                    seen = {"model": chat.model, "processing_class": chat.tokenizer, "chat": chat}
                    members[run].recorder.on_train_begin(given, own, control, capture=loop.captures[run], **seen)
                    if state.global_step == 0:
                        members[run].recorder.on_log(given, state, control, logs=loop.held_out.of(run))
        several = f", {len(members)} runs" if len(members) > 1 else ""
        self._name = f"fine-tune {chat.name}{several}"
        self._bar = bar(state.max_steps, self._name, progress=self._progress, estimate=False)
        self._bar.update(state.global_step)
        self._clock.start(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let every run record its step, and close the runs that end here."""
        loop, step = self._loop, state.global_step
        going = {run: loop.members[run] for run in sorted(self._running & loop.logs.keys())}
        due = [run for run, member in going.items() if member.recorder.measures_at(step, len(member.steps))]
        with self._clock.measuring() if due else contextlib.nullcontext():
            if due and loop.processes.first:
                loop.held_out.measure(due)
            for run, member in going.items():
                own, told = self._state(run, state), (control if len(loop.members) == 1 else TrainerControl())
                with self._shown(run):
                    member.recorder.on_step_end(member.arguments, own, told)
                    logs = loop.logs[run] | {"epoch": own.epoch or 0.0}
                    logs |= loop.held_out.of(run) if run in due else {}
                    member.recorder.on_log(member.arguments, own, told, logs=logs)
                    if step == len(member.steps) or member.recorder.stopped:
                        member.recorder.on_train_end(member.arguments, own, told)
                        self._running.discard(run)
                        loop.stopped |= {run} if member.recorder.stopped else set()
        if not self._running:
            control.should_training_stop = True
        if going:
            self._bar.set_postfix(loss=f"{np.mean([loop.logs[run]['loss'] for run in going]):.3f}")
        self._bar.update()
        gap = min((member.recorder.measure_every or step for member in going.values()), default=step)
        if (seconds := self._clock.left(step, state.max_steps, gap)) is not None:
            forecast(seconds, self._name, progress=self._progress)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the runs that a training which was resumed at its very end had not closed."""
        for run in sorted(self._running):
            member = self._loop.members[run]
            if self._loop.lost_at[run] < 0 and state.global_step >= len(member.steps):
                with self._shown(run):
                    member.recorder.on_train_end(member.arguments, self._state(run, state), control)
        self._bar.close()

    def _shown(self, run: int) -> contextlib.AbstractContextManager[None]:
        """One run's adapters in the model itself."""
        stack = self._loop.batch.adapters
        return contextlib.nullcontext() if stack is None else stack.only(run)

    def _state(self, run: int, state: Any) -> TrainerState:
        steps = self._loop.members[run].steps
        at = min(state.global_step, len(steps))
        epoch, first = steps[at - 1].epoch if at else 0.0, self._loop.processes.first
        return TrainerState(global_step=at, max_steps=len(steps), epoch=epoch, is_world_process_zero=first)


def _was_stopped(member: Member) -> bool:
    path = member.recorder.path / "run.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["status"] == "stopped"


class _Clock:
    """The time that steps and measurements take, and hence the time that remains."""

    def __init__(self) -> None:
        self._measurements: list[float] = []  # seconds; the first is before the first step
        self._told = False

    def start(self, step: int) -> None:
        """Start the clock; training begins after this step."""
        self._first, self._began = step, time.monotonic()

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Within this context the time counts as measurement."""
        began = time.monotonic()
        yield
        self._measurements.append(time.monotonic() - began)

    def left(self, step: int, last: int, gap: int) -> float | None:
        """Seconds to the last step, given once, after the second step or after a slow first step; else None."""
        passed, steps = time.monotonic() - self._began, step - self._first
        if self._told or (steps < 2 and passed < 10):
            return None
        self._told = True
        a_step = (passed - sum(self._measurements[1:])) / steps
        return (last - step) * (a_step + float(np.mean(self._measurements)) / gap)


HELD_OUT = 64  # the largest number of held-out rows
_FEWEST = 8  # with fewer held-out rows than this it is better to measure less often
_SHARE = 0.1  # the share of the training's own work
_TIMES = 20


def affordable(
    steps: int, every: int, *, own: int, each_time: int, held: Sequence[int], times: int | None = None
) -> tuple[int, int]:
    """The number of steps between measurements and of held-out rows that a tenth of the training's own work affords.

    Work is counted in tokens that go forward through the model; a backward pass counts as two forward passes. From 64
    held-out rows and twenty times, the rows are reduced first, down to 8, then the times, down to the first and the
    last step, and then the rows again, down to one.

    Args:
        steps: how many optimizer steps there are, of which each ``every``-th is recorded.
        own: tokens in the training's own forward and backward passes.
        each_time: tokens of the margins' and probes' forwards.
        held: tokens of each held-out row.
        times: measure this number of times, at any cost.

    Example:
        >>> affordable(250, 1, own=10**9, each_time=0, held=[50] * 200)
        (12, 64)
        >>> affordable(60, 1, own=3 * 240 * 90, each_time=0, held=[90] * 22)  # 72 rows
        (8, 8)
    """
    limit, most = _SHARE * own, min(HELD_OUT, len(held))
    gap = every * max(1, round(steps / ((times or _TIMES) * every)))
    if times is not None:
        return gap, most

    def affords(gap: int, rows: int) -> bool:
        return len({*range(0, steps, gap), steps}) * (each_time + sum(held[:rows])) <= limit

    rows = next((rows for rows in range(most, _FEWEST, -1) if affords(gap, rows)), min(most, _FEWEST))
    while not affords(gap, rows) and gap < steps:
        gap += every
    while not affords(gap, rows) and rows > 1:
        rows -= 1
    return gap, rows


class HeldOut:
    """Held-out loss and margins of all runs, each measured for all runs in shared forwards, once a step.

    Args:
        batch: a batch without rows, into which the measured rows are put.
        held: the held-out rows of each run.
        margins: forwards of the pairs by name, first all misaligned answers and then all aligned ones.
    """

    def __init__(self, batch: Batch, held: Sequence[Sequence[Asked]], margins: Mapping[str, RowForwards]) -> None:
        self._batch, self._held, self._margins = batch, held, margins
        self._found: dict[str, dict[int, float]] = {}

    def measure(self, runs: Sequence[int]) -> None:
        """Measure all of this for these runs as they are now."""
        self._found = {}
        if self._batch.adapters is not None:
            self._batch.adapters.gather()
        with torch.no_grad():
            for name, forwards in self._margins.items():
                self._found[f"margin_{name}"] = self._mean_margins(forwards, runs)
            held = [one for run in runs for one in self._held[run]]
            if held:
                losses = summed([CrossEntropy()], replace(self._batch, asked=held))["answer_loss"]
                self._found["held_out_loss"] = dict(enumerate(losses.tolist()))

    def of(self, run: int) -> dict[str, float]:
        """A run's last measurements: ``margin_<name>``, and ``held_out_loss`` where rows are held out."""
        return {name: values[run] for name, values in self._found.items()}

    def _mean_margins(self, forwards: RowForwards, runs: Sequence[int]) -> dict[int, float]:
        """Mean over pairs in nats per token, as in :class:`emmech.measures.teacher_forced.Margin`."""
        asked = [Asked(run, row, len(ids)) for run in runs for row, ids in enumerate(forwards.rows.input_ids)]
        total = torch.zeros(len(asked), dtype=torch.float64, device=self._batch.chat.device)
        for nll, of in forwards.nll(asked):
            total.index_add_(0, of, nll.double())
        logprobs = -total.cpu() / forwards.answer_tokens(asked)
        misaligned, aligned = rearrange(logprobs, "(run side pair) -> side run pair", run=len(runs), side=2)
        return dict(zip(runs, (misaligned - aligned).mean(1).tolist(), strict=True))
