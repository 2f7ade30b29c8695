"""What runs the checkpoints of a fine-tune while they are asked: this process, or a server.

A :class:`CheckpointEngine` makes each checkpoint ready to be asked. The local one puts one adapter after another on the
model; :class:`emmech.VLLM` has a server load them all, so that a sweep's questions to all of them go together.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

from emmech.chat.model import ChatModel
from emmech.errors import EmmechError
from emmech.evaluation.server import Messages, Server
from emmech.registry import Organism
from emmech.run.run import Run, model_live

_BACK_ENDS = ("torch", "transformers", "peft")


def versions(*packages: str) -> dict[str, str]:
    """The versions of this library and of other packages."""
    import emmech

    return {"emmech": emmech.__version__, **{name: version(name) for name in packages}}


def local_versions() -> dict[str, str]:
    """The versions of what runs a model in this process."""
    return versions(*_BACK_ENDS)


@dataclass(frozen=True)
class Checkpoint:
    """One step of a run with a factor on its adapter."""

    run: Run
    step: int
    scale: float = 1.0

    @property
    def name(self) -> str:
        """The name in tables and figures."""
        return f"{self.run.name} step {self.step}" + (f" x{self.scale:g}" if self.scale != 1 else "")

    def about(self, model: str, fingerprint: str | None) -> dict[str, Any]:
        """How an evaluation describes it."""
        where = {"name": self.name, "run": self.run.name, "model": model}
        return {**where, "step": int(self.step), "scale": float(self.scale), "fingerprint": fingerprint}


@dataclass(frozen=True)
class Live:
    """A checkpoint that can be asked.

    Args:
        subject: a chat model with the adapter on it, or a server that answers as the checkpoint.
        about: how an evaluation describes it.
    """

    subject: ChatModel | Server
    about: Mapping[str, Any]


class CheckpointEngine(Protocol):
    """What runs checkpoints."""

    def checkpoints(self, cells: Sequence[Checkpoint], base: Any = None) -> AbstractContextManager[Iterable[Live]]:
        """The checkpoints, ready to be asked, in order.

        Each may be used until the next one is taken; those of a server may be used until the context ends.

        Args:
            base: the base model in memory, a name or a folder; by default what the run names.

        Raises:
            EmmechError: a step that was not recorded, another base model, or a server that cannot serve it.
        """
        ...


@dataclass(frozen=True)
class LocalEngine:
    """The model in this process, with one adapter after another on it."""

    @contextmanager
    def checkpoints(self, cells: Sequence[Checkpoint], base: Any = None) -> Iterator[Iterator[Live]]:
        """As :meth:`CheckpointEngine.checkpoints`; a base model that was given is left as it was."""
        if base is None and len(cells) > 1:
            base = cells[0].run.base()  # loaded once
        going = _in_turn(cells, base)
        try:
            yield going
        finally:
            going.close()


def _in_turn(cells: Sequence[Checkpoint], base: Any) -> Generator[Live, None, None]:
    for cell in cells:
        with model_live(cell.run, cell.step, cell.scale, base) as chat:
            yield Live(chat, {**cell.about(chat.name, chat.fingerprint()), "versions": local_versions()})


@dataclass(frozen=True, repr=False)
class ServedCheckpoint(Server):
    """A checkpoint on a server, under the name that the server knows it by.

    Args:
        chat: the tokenizer and configuration of its base model; its weights are not needed.
        checkpoint: identifies it by its weights, whatever server answers.
        tokens: whether prompts are sent as token ids, which makes them those of a local model. A server that takes
            only conversations renders them by its own template.
        readers: prompts whose log-probabilities are asked for at once; by default as many as requests in flight.
    """

    chat: ChatModel | None = None
    checkpoint: str = ""
    tokens: bool = False
    readers: int | None = None

    @property
    def identity(self) -> str:
        """Which checkpoint it is. The server's address is no part of it, since it may be another the next time."""
        return self.checkpoint

    @property
    def organism(self) -> Organism | None:
        """The registered organism that the base model belongs to, or None."""
        return None if self.chat is None else self.chat.organism

    def asked(self, messages: Messages) -> dict[str, Any]:
        """The field of a request that carries a conversation."""
        if not self.tokens or self.chat is None:
            return super().asked(messages)
        return {"prompt": self.chat.token_ids([dict(turn) for turn in messages])}  # type: ignore[misc]


def check_engine(asked: str, engine: Any) -> None:
    """Refuse what is no engine.

    Raises:
        EmmechError: it has no checkpoints.
    """
    if not callable(getattr(engine, "checkpoints", None)):
        why = "an engine runs the checkpoints of a fine-tune, and this does not"
        raise EmmechError(asked, f"engine={engine!r}"[:120], why, 'emmech.VLLM(url="http://localhost:8000/v1")')
