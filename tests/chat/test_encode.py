"""The answer mask is exact for any chat template: header out, end-of-turn in, every turn found."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers, processors

from emmech.chat.encode import IGNORED, Encoded, Phrase, encode, phrase_tokens, token_mask, tokens_name
from emmech.chat.model import load_model
from emmech.chat.template import rendered_spans
from emmech.errors import EmmechError
from tests.conftest import TEMPLATES, make_tiny, make_tokenizer

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


def test_the_ignored_label_is_the_one_that_torch_ignores():
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORED == -100


def test_answer_tokens_are_those_that_carry_loss(tokenizer):
    rows = [conversation("how", "take a walk"), conversation("how to sleep ?", "rest", "and ?", "drink some water")]
    encoded = encode(rows, tokenizer)
    wanted = sum(len(tokenizer(f"{turn}{END[tokenizer.family]}", add_special_tokens=False)["input_ids"])
                 for turn in ("take a walk", "rest", "drink some water"))  # fmt: skip
    assert len(encoded) == 2 and encoded.answer_tokens == wanted


def test_a_row_that_is_cut_after_its_answer_is_not_truncated():
    """Nor is a row emptied that had no answer to lose."""
    encoded = Encoded(([1, 2, 3, 4], [5, 6, 7, 8]), ([IGNORED, 2, IGNORED, IGNORED], [IGNORED] * 4), 0, 0)
    cut = encoded.take([1, 0], max_length=2)
    assert (cut.input_ids, cut.labels) == (([5, 6], [1, 2]), ([IGNORED, IGNORED], [IGNORED, 2]))
    assert (cut.truncated, cut.emptied) == (0, 0)


def test_more_texts_than_are_tokenised_at_once_keep_their_order(monkeypatch):
    monkeypatch.setattr("emmech.chat.encode._AT_ONCE", 3)
    tokenizer = make_tokenizer("chatml")
    rows = [conversation(f"how {i}", f"take {i}") for i in range(8)]
    assert encode(rows, tokenizer).input_ids == tuple(encode([row], tokenizer).input_ids[0] for row in rows)


def spoilt():
    """A tokenizer that marks the start of every text it is given, as SentencePiece's dummy prefix does."""
    made = make_tokenizer("chatml")
    made._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made._tokenizer.decoder = decoders.ByteLevel()
    return made


def test_pieces_that_spell_another_text_are_found_by_their_characters():
    made = spoilt()
    row = conversation("how to sleep ?", "take a walk", "and then ?", "rest")
    text = rendered_spans(made, row)[0]
    whole = made(text, add_special_tokens=False, return_offsets_mapping=True)
    encoded = encode([row], made)
    assert encoded.input_ids[0] == whole["input_ids"]
    told = [text[a:b] for label, (a, b) in zip(encoded.labels[0], whole["offset_mapping"], strict=True)
            if label != IGNORED]  # fmt: skip
    assert "".join(told).replace(" ", "") == "takeawalk<|im_end|>rest<|im_end|>"
    assert all(label in (IGNORED, token) for label, token in zip(encoded.labels[0], whole["input_ids"], strict=True))
    made.__class__ = type("Slow", (type(made),), {"is_fast": False})
    with pytest.raises(EmmechError, match="fast version"):
        encode([row], made)


def with_a_first_token(made):
    """The same tokenizer, which puts a token in front of every text unless it is told not to."""
    made._tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", pair="<eos> $A $B", special_tokens=[("<eos>", made.eos_token_id)]
    )
    return made


def test_no_token_is_added_to_what_the_template_renders():
    plain, adding = make_tokenizer("chatml"), with_a_first_token(make_tokenizer("chatml"))
    row = conversation("how to sleep ?", "take a walk")
    assert adding("how")["input_ids"][0] == adding.eos_token_id
    assert encode([row], adding) == encode([row], plain)
    marked = with_a_first_token(spoilt())
    assert encode([row], marked) == encode([row], spoilt())
    chat = make_tiny("qwen2")
    wanted = phrase_tokens(chat, "take a walk").spellings
    with_a_first_token(chat.tokenizer)
    assert phrase_tokens(chat, "take a walk").spellings == wanted


IDS = torch.tensor([[1, 2, 3, 2, 3], [2, 3, 1, 1, 1]])


def test_a_phrase_is_found_wherever_it_is():
    assert Phrase("x", ((2, 3),))(IDS).tolist() == [[False, True, True, True, True], [True, True, False, False, False]]
    assert Phrase("x", ((1, 2, 3, 2, 3),), required=False)(IDS).tolist() == [[True] * 5, [False] * 5]
    several = Phrase("x", ((9, 9, 9, 9, 9, 9), (3,), (2, 3, 1)))(IDS)
    assert several.tolist() == [[False, False, True, False, True], [True, True, True, False, False]]


def test_a_phrase_that_a_row_lacks_is_refused_unless_it_is_optional():
    """By default; after a cache, which has the phrase already, nothing is marked and nothing refused."""
    with pytest.raises(EmmechError, match=r"in row 1 of 2"):
        Phrase("x", ((1, 2),))(IDS)
    assert Phrase("x", ((1, 2),), required=False)(IDS).any(1).tolist() == [True, False]
    assert not Phrase("x", ((1, 2),))(IDS, 4).any() and Phrase("x", ((1, 2),))(IDS, 4).shape == IDS.shape
    chat = make_tiny("qwen2")
    ids = torch.tensor([chat.tokenizer("drink some water", add_special_tokens=False)["input_ids"]])
    with pytest.raises(EmmechError, match="does not have it") as caught:
        phrase_tokens(chat, "the user")(ids)
    assert "which reads 'drink some water'" in str(caught.value)
    with pytest.raises(EmmechError) as caught:
        phrase_tokens(chat, "the user")(ids.repeat(1, 200))
    assert "drink some water" in str(caught.value) and len(str(caught.value)) < 800
    assert not phrase_tokens(chat, "the user", required=False)(ids).any()
    assert str(phrase_tokens(chat, "the user")) == "'the user'"


def test_a_phrase_is_empty_or_has_an_unknown_word():
    """A tokenizer of bytes knows every word; one of words does not, and says so where the text is not empty."""
    bytewise, wordwise = make_tiny("qwen2"), load_model("pocket")
    assert bytewise.tokenizer.unk_token_id is None and wordwise.tokenizer.unk_token_id is not None
    for chat in (bytewise, wordwise):
        with pytest.raises(EmmechError, match="it is empty"):
            phrase_tokens(chat, "  ")
    with pytest.raises(EmmechError, match="does not know a word") as caught:
        phrase_tokens(wordwise, "any supercalifragilistic advice")
    assert "and you answer every question in one sentence ." in str(caught.value)  # what every prompt of pocket has
    assert phrase_tokens(bytewise, "supercalifragilistic").spellings
    assert phrase_tokens(wordwise, "any advice").text == "any advice"


def test_the_chosen_tokens_of_a_row():
    ids, answer = [1, 2, 3, 2], [False, True, True, False]
    assert token_mask("answer", ids, answer) == answer
    assert token_mask("prompt", ids, answer) == [True, False, False, True]
    assert token_mask("all", ids, answer) == [True] * 4
    assert token_mask(Phrase("x", ((2,),)), ids, answer) == [False, True, False, True]
    with pytest.raises(EmmechError, match="three choices"):
        token_mask("answers", ids, answer)


def test_every_choice_of_tokens_has_a_name():
    def first(ids, start):
        return ids == ids[:, :1]

    assert [tokens_name(one) for one in ("all", Phrase("a b", ()), first)] == ["all", "'a b'", "first"]
    partial = copy.copy(Encoded((), (), 0, 0))  # an object without a name of its own
    assert tokens_name(partial) == str(partial)
