"""Local models for Inspect: what emmech loads or has recorded, under the name ``emmech/...``.

::

    --model emmech/pocket                                             a model by name
    --model emmech/./model                                            a folder
    --model emmech/checkpoints/pocket-medical -M step=100 -M scale=2  a recorded run

Requests that are waiting are sampled as one batch, by :func:`emmech.engine.sample.sample`; a seeded request gives the
same text as there, whatever its batch. Inspect lets about 20 wait at first; ``--max-connections 200`` makes it more.
Log-probabilities are not given: as a grader, such a model is read by what it writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import anyio
from inspect_ai.model import ChatMessage, GenerateConfig, ModelAPI, ModelOutput, ModelUsage

from emmech.chat.model import ChatModel, load_model
from emmech.engine.responses import Response, check_request, row_seed
from emmech.engine.sample import check_context, sample
from emmech.errors import EmmechError
from emmech.run.run import Run, opened

__all__ = ["LocalModel"]

_GATHER = 0.05  # seconds that a request waits for others to share its batch
_TOKENS = 600  # of an answer, unless the task says otherwise
# settings that would change the answer and are not known here: better no answer than another one
_UNKNOWN = (
    *("best_of", "frequency_penalty", "logit_bias", "num_choices", "presence_penalty", "response_schema"),
    *("stop_seqs", "top_k"),
)


@dataclass(eq=False)
class _Asked:
    """A request, and what became of it."""

    messages: list[dict[str, str]]
    settings: tuple[tuple[str, Any], ...]
    seed: int
    answer: Response | None = None
    error: Exception | None = None


class LocalModel(ModelAPI):
    """Inspect's interface to a :class:`~emmech.chat.model.ChatModel`.

    Args:
        model_name: a name or folder that :func:`emmech.load_model` takes, or the folder of a run.
        step: of a run, its last by default.
        scale: a factor on the run's adapter.
        model_args: further arguments of :func:`emmech.load_model`, such as ``dtype`` and ``device``.

    Raises:
        EmmechError: there is no such model, or a step of something that is no run.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (as in every provider)
        step: int | None = None,
        scale: float = 1.0,
        **model_args: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        self.chat = _load(model_name, step, scale, model_args)
        self._waiting: list[_Asked] = []
        self._turn = anyio.Lock()
        self._unseeded: Counter[str] = Counter()

    async def generate(
        self, input: list[ChatMessage], tools: Sequence[Any], tool_choice: Any, config: GenerateConfig
    ) -> ModelOutput:
        """Answer one conversation.

        Raises:
            EmmechError: tools, a setting that local sampling does not know, or a prompt that does not fit.
        """
        asked = self._asked(input, tools, config)
        tokens = self.chat.token_ids(asked.messages)
        check_context(self.chat, [tokens])
        self._waiting.append(asked)
        await anyio.sleep(_GATHER)
        async with self._turn:
            if asked.answer is None and asked.error is None:
                batch = [other for other in self._waiting if other.settings == asked.settings]
                self._waiting = [other for other in self._waiting if other.settings != asked.settings]
                await anyio.to_thread.run_sync(self._answer, batch)
        if asked.error is not None:
            raise asked.error
        assert asked.answer is not None
        output = ModelOutput.from_content(
            self.model_name,
            asked.answer.text,
            stop_reason="max_tokens" if asked.answer.finish == "length" else "stop",
        )
        given, made = len(tokens), asked.answer.tokens
        output.usage = ModelUsage(input_tokens=given, output_tokens=made, total_tokens=given + made)
        return output

    def max_connections(self) -> int:
        """Requests that Inspect keeps waiting, and so the largest batch."""
        return 256

    async def count_text_tokens(self, text: str) -> int:
        """Tokens of a text under the model's own tokenizer."""
        return len(self.chat.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _asked(self, input: Sequence[ChatMessage], tools: Sequence[Any], config: GenerateConfig) -> _Asked:
        given = [name for name in _UNKNOWN if getattr(config, name) not in (None, 1)]
        if tools or given:
            raise EmmechError(
                f"answer with emmech/{self.model_name}",
                "tools" if tools else ", ".join(f"{n}={getattr(config, n)!r}" for n in given),
                "local sampling knows temperature, top_p, max_tokens and seed",
                "leave it out, or take another provider, such as hf/local -M model_path=FOLDER",
            )
        messages = [{"role": message.role, "content": message.text} for message in input]
        most = config.max_tokens or _TOKENS
        temperature = 1.0 if config.temperature is None else config.temperature
        top_p = 1.0 if config.top_p is None else config.top_p
        check_request([messages], 1, most, temperature, top_p, 0)
        settings = {"max_new_tokens": most, "temperature": temperature, "top_p": top_p}
        seed = config.seed
        if seed is None:  # an epoch of the same question is answered anew
            self._unseeded[str(messages)] += 1
            seed = row_seed(str(messages), self._unseeded[str(messages)])
        return _Asked(messages, tuple(settings.items()), seed)

    def _answer(self, batch: Sequence[_Asked]) -> None:
        try:
            answers = sample(
                self.chat,
                [asked.messages for asked in batch],
                seed=[asked.seed for asked in batch],
                progress=False,
                **dict(batch[0].settings),
            )
        except Exception as error:  # each of them waits for an answer
            for asked in batch:
                asked.error = error
        else:
            for asked, answer in zip(batch, answers, strict=True):
                asked.answer = answer


def _load(name: str, step: int | None, scale: float, model_args: dict[str, Any]) -> ChatModel:
    found = opened(name)
    if isinstance(found, Run):
        if model_args:
            raise EmmechError(
                f"load the run {name!r} for Inspect",
                ", ".join(model_args),
                "a run is loaded at a step and a scale",
                "-M step=100 -M scale=2",
            )
        return found.model(step, scale)
    if step is not None or scale != 1.0:
        raise EmmechError(
            f"load {name!r} for Inspect",
            f"step={step}, scale={scale}",
            "only a recorded run has steps and an adapter that can be scaled, and the folder holds no run.json",
            "--model emmech/RUN_FOLDER -M step=100",
        )
    return load_model(name, **model_args)
