"""Sampled answers, their seeds, and the file that makes sampling resumable, for local models and servers alike."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from emmech.errors import EmmechError, as_float, as_int, check_texts
from emmech.store import append_jsonl, drop_unfinished, intact, made_folder, read_jsonl, sealed, warn_of_lines

_ASKED = "sample answers"
_MEANING = {"request": "conversations, seed or model"}


@dataclass(frozen=True)
class Response:
    """One sampled answer.

    Args:
        conversation: index into the given conversations.
        sample: the number of the answer to it, from 0.
        seed: the row's own seed; ``sample(chat, [conversation], seed=[seed])`` draws the same text again.
        text: the answer, without the token that ended it.
        finish: ``"stop"``; ``"length"`` when it was cut at ``max_new_tokens`` (or at the end of the context);
            ``"cancelled"`` when its stream was; ``"error"`` when a server gave no answer and ``text`` is empty.
        tokens: its length in tokens, or -1 where a server does not report it.
    """

    conversation: int
    sample: int
    seed: int
    text: str
    finish: str
    tokens: int


def digest(*parts: object) -> str:
    """A sha256 over the parts' representations."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def row_seed(*parts: object) -> int:
    """A 62-bit seed that is a function of its parts alone and is the same on every machine.

    Example:
        >>> row_seed(0, "prompt", 1) == row_seed(0, "prompt", 1) != row_seed(0, "prompt", 2)
        True
    """
    hashed = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "little") >> 2  # fits int64, so that data frames keep it whole


def row_seeds(prompts: Sequence[Hashable], samples: int, seed: int | Sequence[int]) -> list[int]:
    """The seed of every row, with ``samples`` rows per prompt.

    Given one seed, a row's own seed is derived from it, the prompt's content and the sample's number, so that adding or
    reordering prompts changes no row. Given a sequence, the first sample of each prompt has exactly that seed.
    """
    if isinstance(seed, Sequence):
        return [int(own) if number == 0 else row_seed(int(own), number) for own in seed for number in range(samples)]
    seen: Counter[Hashable] = Counter()
    found = []
    for prompt in prompts:
        for _ in range(samples):
            found.append(row_seed(int(seed), prompt, seen[prompt]))
            seen[prompt] += 1  # the same conversation given twice is answered anew
    return found


class ResponseLog:
    """Answers by row, written to a JSONL file as they are drawn if there is a path.

    The first line holds the settings. A file with other settings is refused, and a half-written last line is dropped.
    Every line has a checksum, in which the settings take part: a damaged line is named in a warning and asked again.

    Args:
        path: the file; None keeps the answers in memory only.
        settings: everything on which the answers depend, as JSON values.

    Raises:
        EmmechError: the file was begun with other settings, or cannot be told from one that was.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any]) -> None:
        self.path = Path(path) if path is not None else None
        self.done: dict[int, Response] = {}
        if self.path is None:
            return
        made_folder("keep the answers", self.path.parent)
        drop_unfinished(self.path)  # the unfinished row is drawn again
        self._settings, self._belongs = settings, digest(sorted(settings.items()))
        self._earlier = False  # whether a version without checksums began the file
        self._unsealed = 0
        damaged: list[Path] = []
        stored = read_jsonl(self.path, damaged, sound=self._is_line)
        heads = [line for line in stored if "request" in line]
        # damage can give a first line the look of an earlier version's; one that was written anew has a checksum
        head = next((line for line in heads if "checksum" in line), heads[0] if heads else None)
        other = head is not None and any(head.get(name) != value for name, value in settings.items())
        if other and self._earlier and any("checksum" in line for line in stored if "request" not in line):
            # its answers are of these settings
            head, other = None, False
            damaged.insert(0, self.path.with_name(f"{self.path.name}:1"))
        if head is not None and other:
            differing = [_MEANING.get(key, key) for key in settings if head.get(key) != settings[key]]
            raise EmmechError(
                f"continue sampling into {self.path.name}",
                self.path,
                f"it was begun with other arguments: {', '.join(differing) or 'of another kind'}",
                "repeat the arguments it was begun with, or give another file",
            )
        if head is None and self._unsealed:
            why = "its first line, which says what was asked, is damaged"
            raise EmmechError(
                f"continue sampling into {self.path.name}", self.path, why, "another file, or a copy of it"
            )
        warn_of_lines(damaged, "their answers are drawn again")
        if head is None:
            append_jsonl(self.path, sealed(settings))
        for line in stored:
            if "request" in line:
                continue
            row = line.pop("row")
            line.pop("checksum", None)
            if line["finish"] != "error":  # such a row is asked again
                self.done[row] = Response(**line)

    def _is_line(self, line: Mapping[str, Any]) -> bool:
        if "checksum" in line:
            return intact(line, "" if "request" in line else self._belongs)
        if "request" in line:
            self._earlier = line.keys() == self._settings.keys()
            return self._earlier
        whole = line.keys() == {"row", *(one.name for one in fields(Response))} and isinstance(line["row"], int)
        self._unsealed += whole
        return whole and self._earlier

    def add(self, row: int, response: Response) -> None:
        """Keep one answer."""
        self.done[row] = response
        if self.path is not None:
            append_jsonl(self.path, sealed({"row": row, **asdict(response)}, self._belongs))

    def responses(self, rows: int) -> list[Response]:
        """All answers, in order."""
        return [self.done[row] for row in range(rows)]


def as_conversations(asked: Any) -> Any:
    """Conversations from a user's message, or from a list with some among them; anything else is unchanged.

    Example:
        >>> as_conversations("hello")
        [[{'role': 'user', 'content': 'hello'}]]
    """
    given = [asked] if isinstance(asked, str) else asked
    if not isinstance(given, Sequence):
        return given
    return [[{"role": "user", "content": one}] if isinstance(one, str) else one for one in given]


def check_request(
    conversations: Any, samples: Any, max_new_tokens: Any, temperature: Any, top_p: Any, seed: Any
) -> None:
    """Refuse what cannot be sampled.

    Raises:
        EmmechError: no conversations, one that ends in an assistant turn, or a setting out of range.
    """
    several = isinstance(conversations, Sequence)
    if several and conversations and isinstance(conversations[0], dict):
        instead = 'sample(chat, [[{"role": "user", "content": "..."}]]), or sample(chat, "...")'
        raise _refused(f"conversations={conversations!r}"[:120], "each conversation is a list of messages", instead)
    if not several or not conversations or any(not messages for messages in conversations):
        given = f"{len(conversations)} conversations" if several else f"{conversations!r}"
        raise _refused(given, "there is nothing to answer", "at least one message in each")
    for index, messages in enumerate(conversations):
        if messages[-1].get("role") == "assistant":
            given = f"conversations[{index}] ends in an assistant turn"
            raise _refused(given, "the model answers the last user turn", "leave the assistant's turn out")
    check_settings(samples, max_new_tokens, temperature, top_p)
    check_texts(_ASKED, "conversations", conversations, strings=False)
    for one in seed if isinstance(seed, Sequence) and not isinstance(seed, str) else [seed]:
        as_int(_ASKED, "seed", one)
    if isinstance(seed, Sequence) and len(seed) != len(conversations):
        given = f"{len(seed)} seeds for {len(conversations)} conversations"
        raise _refused(given, "a sequence of seeds has one for each conversation", "seed=0 derives one for every row")


def check_settings(samples: Any, max_new_tokens: Any, temperature: Any, top_p: Any) -> None:
    """Refuse settings out of range.

    Raises:
        EmmechError: names the setting and the nearest value in range.
    """
    as_float(_ASKED, "temperature", temperature)
    as_float(_ASKED, "top_p", top_p)
    if not isinstance(samples, int) or samples < 1:
        raise _refused(f"samples={samples!r}", "it counts the answers per conversation", "samples=1 or more")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise _refused(f"max_new_tokens={max_new_tokens!r}", "an answer has at least one token", "max_new_tokens=600")
    if temperature < 0:
        raise _refused(f"temperature={temperature}", "it divides the logits", "1.0, or 0 for the likeliest token")
    if not 0 < top_p <= 1:
        raise _refused(f"top_p={top_p}", "it is a probability", "top_p=1.0 keeps every token")


def _refused(given: str, why: str, instead: str) -> EmmechError:
    return EmmechError(_ASKED, given, why, instead)
