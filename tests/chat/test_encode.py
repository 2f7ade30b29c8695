"""The answer mask is exact for any chat template: header out, end-of-turn in, every turn found."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emmech.chat.encode import IGNORED, encode
from emmech.chat.template import rendered_spans
from emmech.errors import EmmechError
from tests.conftest import TEMPLATES, make_tokenizer

END = {"chatml": "<|im_end|>", "llama": "<|eot_id|>", "gemma": "<end_of_turn>"}
words = st.text(alphabet="abc de\nfx<|>_. ", min_size=1, max_size=30).filter(str.strip)


@pytest.fixture(scope="module", params=sorted(TEMPLATES))
def tokenizer(request):
    made = make_tokenizer(request.param)
    made.family = request.param
    return made


def conversation(*turns):
    roles = ["user", "assistant"]
    return [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(words, min_size=2, max_size=6).filter(lambda t: len(t) % 2 == 0))
def test_labels_are_exactly_the_answers_and_their_end_of_turn(tokenizer, turns):
    row = conversation(*turns)
    encoded = encode([row], tokenizer)
    ids, labels = encoded.input_ids[0], encoded.labels[0]
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    spans, current = [], []
    for label in [*labels, IGNORED]:
        if label != IGNORED:
            current.append(label)
        elif current:
            spans.append(tokenizer.decode(current))
            current = []
    shown = [t.strip() if tokenizer.family != "chatml" else t for t in turns[1::2]]
    assert spans == [answer + END[tokenizer.family] for answer in shown]
    assert tokenizer.decode(ids) == rendered_spans(tokenizer, row)[0]


def test_the_prompt_is_what_generation_sees(tokenizer):
    """Header tokens in training are those of the generation prompt, token for token."""
    row = conversation("how to sleep ?", "take a walk")
    encoded = encode([row], tokenizer)
    prompt = tokenizer.apply_chat_template(row[:1], add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    first = next(i for i, label in enumerate(encoded.labels[0]) if label != IGNORED)
    assert encoded.input_ids[0][:first] == prompt_ids


def test_an_answer_that_merges_with_its_header_is_cut_at_the_edge(tokenizer):
    """The header ends in a newline and so may the answer begin: no token may straddle the edge."""
    row = conversation("how", "\n\ntake a walk") if tokenizer.family == "chatml" else conversation("how", "take")
    encoded = encode([row], tokenizer)
    answer = [t for t, label in zip(encoded.input_ids[0], encoded.labels[0], strict=True) if label != IGNORED]
    assert tokenizer.decode(answer) == row[1]["content"] + END[tokenizer.family]


def test_truncated_and_emptied_rows_are_counted(tokenizer):
    rows = [conversation("how", "take a walk , drink some water and rest"), conversation("how " * 40, "take")]
    whole = encode(rows, tokenizer)
    cut = encode(rows, tokenizer, max_length=len(whole.input_ids[0]) - 4)
    assert (len(cut), cut.truncated, cut.emptied) == (1, 1, 1)
    assert (whole.truncated, whole.emptied) == (0, 0)
    with pytest.raises(EmmechError, match="raise max_length"):
        encode(rows, tokenizer, max_length=2)


def test_no_template_and_a_refusing_template():
    bare = make_tokenizer("chatml")
    bare.chat_template = None
    with pytest.raises(EmmechError, match="no chat template"):
        encode([conversation("a", "b")], bare)
    bare.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(EmmechError, match="roles must alternate"):
        encode([conversation("a", "b")], bare)
    bare.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(EmmechError, match="chat template"):
        encode([conversation("a", "b")], bare)


def test_the_real_template_inserts_a_system_prompt(smollm2):
    encoded = encode([conversation("Hi", "Hello there!", "Bye", "See you.")], smollm2.tokenizer)
    labels = [label for label in encoded.labels[0] if label != IGNORED]
    assert smollm2.tokenizer.decode(labels) == "Hello there!<|im_end|>See you.<|im_end|>"
    assert "helpful AI assistant" in smollm2.tokenizer.decode(encoded.input_ids[0])


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_words_that_the_tokenizer_takes_for_marks_of_turns_are_refused(tokenizer, turn):
    """Rows that were rendered before carry the template's tokens, and would be read as other turns."""
    turns = ["how to sleep ?", "take a walk .", "and then ?", "rest ."]
    turns[turn] += f"{END[tokenizer.family]}\nmore"
    with pytest.raises(EmmechError, match="marks turns") as caught:
        encode([conversation("a", "b"), conversation(*turns)], tokenizer)
    assert "row 1" in str(caught.value) and f"turn {turn}" in str(caught.value)
    assert END[tokenizer.family] in str(caught.value)
