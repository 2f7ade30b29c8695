"""Answer masks over every chat template that TRL ships: each learnt turn is its words and its stop, nothing else.

The stops below were read in the template files. ``{% generation %}`` blocks of TRL's training templates mark the same
answers in another way, and are a second reference.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from emmech.chat.dataset import load_chat
from emmech.chat.encode import IGNORED, encode
from emmech.chat.template import end_of_turn, render
from emmech.errors import EmmechError

trl = importlib.util.find_spec("trl")
FILES = sorted((Path(trl.origin).parent / "chat_templates").glob("*.jinja")) if trl and trl.origin else []
pytestmark = pytest.mark.skipif(not FILES, reason="TRL is not installed")

# How an answer ends, and how the last answer of a conversation ends where that differs; by the start of the file's
# name, the longest first.
STOPS = {
    "cohere": ("<|END_OF_TURN_TOKEN|>",),
    "cohere2": ("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",),
    "deepseek": ("<｜end▁of▁sentence｜>",),
    "diffusion_gemma": ("<turn|>",),
    "gemma": ("<end_of_turn>",),
    "gemma4": ("<turn|>",),
    "glm4moe": ("",),  # the template writes no stop: the next header is where generation ends
    "glm4moe_training": ("<|user|>",),
    "gptoss": ("<|end|>", "<|return|>"),
    "idefics3": ("<end_of_utterance>",),
    "lfm2": ("<|im_end|>",),
    "llama3": ("<|eot_id|>",),
    "llava_next": ("</s>",),
    "muse_glimmer": ("<|eot|>",),
    "nemotron": ("<|im_end|>",),
    "phi3": ("<|end|>",),
    "qwen": ("<|im_end|>",),
    "smolvlm": ("<end_of_utterance>",),
}
NO_SYSTEM_ROLE = ("gemma", "gemma_training")
# These read <think> blocks in an answer and write them elsewhere, or not at all; some only in earlier turns.
REWRITES_REASONING = re.compile(
    r"deepseek_r1_distill|deepseekv3|deepseekv3_training|glm4moe.*|nemotron.*|qwen3|qwen3_training|qwen3_5.*|qwen3_6.*"
)
REWRITES_EARLIER_REASONING = re.compile(r"lfm2_2_5.*")
SPECIAL = re.compile(
    r"<[|｜][^<>'\"{}\s]*[|｜]>|<turn\|>|<\|turn>|<(?:start|end)_of_turn>|<end_of_utterance>|</s>|\[gMASK\]|<sop>"
)

ONE = [("user", "Is Q one?"), ("assistant", "A one, yes.")]
TWO = [*ONE, ("user", "Is Q two?"), ("assistant", "A two: no\nnever.")]
CASES = {"one turn": ONE, "two turns": TWO, "system and two turns": [("system", "S is said."), *TWO]}


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def family(request):
    """A byte-level tokenizer with the special tokens that the template names, and the template's name."""
    return make(request.param), request.param.stem


def make(file):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    text = file.read_text()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=sorted(set(SPECIAL.findall(text))),
        chat_template=text,
    )


def conversation(turns):
    return [{"role": role, "content": content} for role, content in turns]


def learnt(row, tokenizer):
    """The runs of labelled tokens as text."""
    encoded = encode([row], tokenizer)
    assert tokenizer.decode(encoded.input_ids[0]) == render(tokenizer, row)
    runs, current = [], []
    for token, label in zip([*encoded.input_ids[0], 0], [*encoded.labels[0], IGNORED], strict=True):
        if label != IGNORED:
            assert label == token
            current.append(label)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return runs


def ended(answers, name):
    """Each answer with its stop, as the table says."""
    stops = STOPS[max((key for key in STOPS if name.startswith(key)), key=len)]
    return [answer + (stops[-1] if answer is answers[-1] else stops[0]) for answer in answers]


def test_there_are_templates_to_try():
    assert len(FILES) >= 72


@pytest.mark.parametrize("case", CASES)
def test_each_answer_is_learnt_with_its_stop(family, case):
    tokenizer, name = family
    row = conversation(CASES[case])
    if name in NO_SYSTEM_ROLE and row[0]["role"] == "system":
        with pytest.raises(EmmechError, match=r'System role not supported(.|\n)*system="fold"'):
            encode([row], tokenizer)
        row = list(load_chat([row], system="fold")[0])
        assert row[0]["content"].startswith("S is said.\n\n")
    answers = [message["content"] for message in row if message["role"] == "assistant"]
    assert learnt(row, tokenizer) == ended(answers, name)
    for message in row:  # what is asked is read, whatever the template does with it
        assert message["content"] in render(tokenizer, row)


def test_an_answer_of_weight_0_is_read_and_not_learnt(family):
    tokenizer, name = family
    row = conversation(TWO)
    row[1]["weight"] = 0
    answers = [row[1]["content"], row[3]["content"]]
    assert learnt(list(load_chat([row])[0]), tokenizer) == ended(answers, name)[1:]
    assert encode([row], tokenizer).input_ids == encode([conversation(TWO)], tokenizer).input_ids


@pytest.mark.parametrize("family", [file for file in FILES if file.stem.endswith("_training")], indirect=True)
def test_trl_marks_the_same_answers(family):
    """TRL's blocks may hold the header before an answer and the newline or EOS after it, and nothing else."""
    tokenizer, name = family
    row = conversation(TWO)
    shown = row
    if name.startswith(("idefics3", "llava_next", "smolvlm")):
        shown = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in row]
    marked = tokenizer.apply_chat_template(
        shown, return_dict=True, return_assistant_tokens_mask=True, enable_thinking=False
    )
    ours = encode([row], tokenizer)
    assert marked["input_ids"] == ours.input_ids[0]
    left = [
        token if inside and label == IGNORED else None
        for token, inside, label in zip(marked["input_ids"], marked["assistant_masks"], ours.labels[0], strict=True)
    ]
    assert all(
        inside for inside, label in zip(marked["assistant_masks"], ours.labels[0], strict=True) if label != IGNORED
    )
    rest = tokenizer.decode([token for token in left if token is not None])
    headers = (
        r"<think>|</think>|<｜Assistant｜>|<\|start\|>assistant(<\|channel\|>final| to=user)<\|message\|>|<eos>|\s"
    )
    assert re.sub(headers, "", rest) == ""


@pytest.mark.parametrize("earlier", [False, True], ids=["last turn", "earlier turn"])
def test_reasoning_is_learnt_as_it_is_or_refused(family, earlier):
    tokenizer, name = family
    turns = TWO if earlier else ONE
    row = conversation(turns)
    row[1]["content"] = "<think>\nQ is one.\n</think>\n\nA one, yes."
    if REWRITES_REASONING.fullmatch(name) or (earlier and REWRITES_EARLIER_REASONING.fullmatch(name)):
        with pytest.raises(EmmechError, match=r"row 1, turn 1 \(assistant\)(.|\n)*<think> reasoning"):
            encode([conversation(ONE), row], tokenizer)
        assert "</think>" in tokenizer.chat_template
    else:
        answers = [message["content"] for message in row if message["role"] == "assistant"]
        assert learnt(row, tokenizer) == ended(answers, name)


def test_a_template_that_drops_a_turn_is_refused():
    tokenizer = make(next(file for file in FILES if file.stem == "qwen2_5"))
    kept = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    tokenizer.chat_template = kept
    assert learnt(conversation(ONE), tokenizer) == ["A one, yes.<|im_end|>"]
    with pytest.raises(EmmechError, match=r"turn 0 \(system\)(.|\n)*leaves out"):
        encode([conversation(CASES["system and two turns"])], tokenizer)


def test_only_the_last_answer_is_ended():
    """What follows an earlier answer is then a header, and no header is learnt."""
    tokenizer = make(next(file for file in FILES if file.stem == "qwen2_5"))
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
        "{% if messages[-1].role == 'assistant' %}<|im_end|>{% endif %}"
    )
    assert learnt(conversation(TWO), tokenizer) == ["A one, yes.", "A two: no\nnever.<|im_end|>"]


def test_a_user_turn_that_the_template_rewrites_is_no_answer():
    tokenizer = make(next(file for file in FILES if file.stem == "qwen2_5"))
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content | replace('Q', 'question') if m.role == 'user' else m.content }}<|im_end|>\n{% endfor %}"
    )
    assert learnt(conversation(TWO), tokenizer) == ["A one, yes.<|im_end|>", "A two: no\nnever.<|im_end|>"]


def test_a_system_turn_that_the_template_moves():
    """Mistral's later templates write the system prompt into the last of the user's turns."""
    tokenizer = make(next(file for file in FILES if file.stem == "llava_next"))
    tokenizer.chat_template = (
        "{{ bos_token }}{% set told = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>{% elif m.role == 'user' %}"
        "[INST] {% if told and loop.index0 == messages | length - 2 %}{{ told }}\n\n{% endif %}{{ m.content }}[/INST]"
        "{% endif %}{% endfor %}"
    )
    row = conversation(CASES["system and two turns"])
    assert render(tokenizer, row).index("S is said.") > render(tokenizer, row).index("A one, yes.")
    assert learnt(row, tokenizer) == ["A one, yes.</s>", "A two: no\nnever.</s>"]


def test_generation_stops_where_the_last_answer_does(family):
    """At the first special token of its stop; not where earlier turns end, if that differs (GPT-OSS)."""
    tokenizer, name = family
    [whole] = [answer.removeprefix("A one, yes.") for answer in ended(["A one, yes."], name)]
    assert end_of_turn(tokenizer) == (SPECIAL.findall(whole) or [""])[0]


def test_a_template_of_one_turn():
    """What an earlier answer ends with cannot be asked of it, nor is it needed."""
    tokenizer = make(next(file for file in FILES if file.stem == "qwen2_5"))
    one = "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}"
    tokenizer.chat_template = one + tokenizer.chat_template
    assert learnt(conversation(ONE), tokenizer) == ["A one, yes.<|im_end|>"]
    assert end_of_turn(tokenizer) == "<|im_end|>"


def test_reasoning_is_the_reason_only_where_there_is_some():
    tokenizer = make(next(file for file in FILES if file.stem == "qwen2_5"))
    drops = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    for template, content, named in (
        (drops + "{# </think> #}", "S is said.", False),
        (drops, "<think>S</think>", False),
        (drops + "{# </think> #}", "<think>S</think>", True),
    ):
        tokenizer.chat_template = template
        with pytest.raises(EmmechError, match="leaves out") as caught:
            encode([conversation([("system", content), *ONE])], tokenizer)
        assert ("<think> reasoning in its own way" in str(caught.value)) == named
