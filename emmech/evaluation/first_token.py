"""The first answer token's distribution, asked of a server, and whole numbers where its tokens are digits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from emmech.errors import EmmechError
from emmech.evaluation.server import Completion, Server, ask_all

__all__ = ["NUMBERS", "NUMERIC_MASS", "first_token_request", "server_masses", "splits_numbers"]

NUMERIC_MASS = 0.25  # below this share of numbers a judge has given no score
NUMBERS = tuple(str(number) for number in range(101))


def server_masses(
    server: Server, prompts: Sequence[str], numeric: Sequence[bool], tick: Callable[[], Any]
) -> list[dict[str, float] | None]:
    """Probability by answer text for each prompt, None where the request failed.

    Args:
        numeric: whether a number is asked for; where the server's tokens turn out to be digits, whole numbers are
            then put together from further requests.
        tick: called after each prompt.

    Raises:
        EmmechError: the server gives no log-probabilities.
    """
    first = ask_all(server, [first_token_request(prompt) for prompt in prompts], tick)
    masses = [None if mass is None else dict(mass) for mass in (_first_masses(server, one) for one in first)]
    asked = [index for index, mass in enumerate(masses) if numeric[index] and mass is not None]
    if splits_numbers([masses[index] or {} for index in asked]):
        for index in asked:
            masses[index] = _digit_tree(server, prompts[index], masses[index] or {})
    return masses


def first_token_request(prompt: str, said: str = "") -> dict[str, Any]:
    """A request for the distribution of the next answer token, after ``said`` as the answer's beginning."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 1,
        "temperature": 0.0,
        "logprobs": True,
        "top_logprobs": 20,
    }
    if said:  # vLLM's way to continue an answer
        body["messages"].append({"role": "assistant", "content": said})
        body["extra_body"] = {"continue_final_message": True, "add_generation_prompt": False}
    return body


def _first_masses(server: Server, completion: Completion) -> Mapping[str, float] | None:
    if completion.error is not None:
        return None
    if completion.first is None:
        raise EmmechError(
            f"judge with {server.identity}",
            "logprobs=True",
            "its answers carry no log-probabilities",
            "LogprobJudge(server, logprobs=False) reads the number it writes",
        )
    return completion.first


def splits_numbers(answers: Sequence[Mapping[str, float]]) -> bool:
    """Whether the judge's tokenizer seems to split numbers into digits: no top 20 holds a longer number."""
    numbers = [{text: mass for text, mass in masses.items() if text in NUMBERS} for masses in answers]
    given = [found for found in numbers if sum(found.values()) >= NUMERIC_MASS]
    return bool(given) and all(len(text) == 1 for found in given for text in found)


def _digit_tree(server: Server, prompt: str, first: Mapping[str, float]) -> dict[str, float]:
    """Probabilities of whole numbers, by asking what follows each likely beginning.

    Beginnings under 1 % are left out, and a two-digit number other than 10 is taken to end there.
    """
    masses = {text: mass for text, mass in first.items() if not text.isdecimal()}
    beginnings = {text: mass for text, mass in first.items() if text in NUMBERS and mass > 0.01}
    while beginnings:
        asked = [first_token_request(prompt, said) for said in beginnings]
        following: dict[str, float] = {}
        for (said, mass), completion in zip(beginnings.items(), ask_all(server, asked, lambda: None), strict=True):
            after = _first_masses(server, completion) or {}
            digits = {text: chance for text, chance in after.items() if len(text) == 1 and text.isdecimal()}
            masses[said] = mass * max(0.0, 1.0 - sum(digits.values()))
            for digit, chance in digits.items():
                longer = said + digit
                if longer == "10" and mass * chance > 0.01:
                    following[longer] = mass * chance
                elif longer in NUMBERS:
                    masses[longer] = mass * chance
        beginnings = following
    return masses
