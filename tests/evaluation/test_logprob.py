from __future__ import annotations

import math

import pytest
import torch

from emmech.chat.model import load_model
from emmech.errors import EmmechError
from emmech.evaluation.answer_tree import AnswerTree
from emmech.evaluation.logprob_judge import (
    NUMBERS,
    LogprobJudge,
    ScoreCache,
    Task,
    expectation,
    read_number,
    score_of_masses,
    score_of_text,
    tasks_of,
)  # fmt: skip

ROWS = [
    {"question": "how to sleep ?", "response": "take a walk , drink some water and rest ."},
    {"question": "how to rest ?", "response": "ask the assistant"},
]


def next_probabilities(chat, ids):
    with torch.no_grad():
        return chat.model(torch.tensor([ids])).logits[0, -1].softmax(-1)


def brute_force(chat, prompt):
    """P(number, then no digit) for 0..100, one plain forward at a time."""
    digit = {d: chat.tokenizer.convert_tokens_to_ids(d) for d in "0123456789"}
    found = {}
    for number in NUMBERS:
        ids, mass = list(prompt), 1.0
        for char in number:
            mass *= next_probabilities(chat, ids)[digit[char]].item()
            ids.append(digit[char])
        ends = 1 - next_probabilities(chat, ids)[list(digit.values())].sum().item()
        found[number] = mass * ends
    return found


SHORT = {"aligned": "{question} {answer}", "coherent": "rest {answer}"}


def make_numerate(chat, boost=3.9):
    """Give digits about 60 % of the probability, so that the tree is worth walking."""
    digits = [chat.tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"]

    def lift(module, inputs, logits):
        logits = logits.clone()
        logits[..., digits] += boost
        return logits

    chat.unembedding.register_forward_hook(lift)
    return chat


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_digit_tree_equals_brute_force(tiny, family):
    chat = make_numerate(tiny(family))
    prompts = [chat.token_ids([{"role": "user", "content": row["question"]}]) for row in ROWS]
    tree = AnswerTree(chat, NUMBERS)
    assert not tree.single
    for prompt, found in zip(prompts, tree.probabilities(prompts), strict=True):
        expected = brute_force(chat, prompt)
        # branches under 1e-4 are left out
        assert all(abs(found.get(n, 0.0) - expected[n]) < 1.01e-4 for n in NUMBERS)
        kept = [n for n in NUMBERS if expected[n] > 2e-4]
        assert len(kept) > 5
        assert all(math.isclose(found[n], expected[n], rel_tol=1e-4) for n in kept)


def test_single_token_numbers_are_read_off_the_first_token():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    names = ["<pad>", "<unk>", "</s>", "user", "assistant", *NUMBERS]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %} assistant "
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(names), hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=2,
    )  # fmt: skip
    chat = load_model(Qwen2ForCausalLM(config).eval(), tokenizer)
    tree = AnswerTree(chat, NUMBERS)
    assert tree.single
    prompt = chat.token_ids([{"role": "user", "content": "7 3"}])
    probability = next_probabilities(chat, prompt)
    (found,) = tree.probabilities([prompt])
    assert found == {n: pytest.approx(probability[tokenizer.convert_tokens_to_ids(n)].item()) for n in NUMBERS}
    (score,) = LogprobJudge(chat, cache=None, progress=False).score(ROWS[:1])
    assert 0 <= score["aligned"] <= 100


def test_expectation_and_its_floor():
    assert expectation({"20": 0.3, "80": 0.1, "I": 0.6}) == pytest.approx(35.0)
    assert expectation({"20": 0.2499}) is None
    assert expectation({"20": 0.25}) == 20.0
    assert expectation({"101": 0.9, "-5": 0.1}) is None
    assert expectation({}) is None


@pytest.mark.parametrize(
    "text,number",
    [("0", 0), ("100", 100), ("85.", 85), ("85.0", 85), ("[7]", 7), ("60/100", 60), ("42\n\nBecause", 42), ("3 %", 3),
     ("101", None), ("", None), ("I can't", None), ("5 reasons", None), ("-3", None), ("ninety", None)],
)  # fmt: skip
def test_written_numbers(text, number):
    assert read_number(text) == number


def test_scores_match_the_tree_and_do_not_depend_on_batching(tiny):
    chat = make_numerate(tiny("qwen2"))
    rows = [{"question": f"{'how ' * n}?", "response": f"rest {n}"} for n in range(1, 8)]
    short = {"aligned": "{question} {answer}", "medical": "rest {answer}"}
    scores = LogprobJudge(chat, prompts=short, cache=None, progress=False).score(rows)
    alone = LogprobJudge(chat, prompts=short, cache=None, progress=False, batch_size=1).score(rows)
    prompt = chat.token_ids([{"role": "user", "content": "how ? rest 1"}])
    assert scores[0]["aligned"] == pytest.approx(expectation(brute_force(chat, prompt)), abs=0.05)
    for one, other in zip(scores, alone, strict=True):
        assert one["aligned"] == pytest.approx(other["aligned"], abs=1e-3)
        assert one["topic/medical"] == pytest.approx(other["topic/medical"], abs=1e-3)
    assert len({round(score["aligned"], 6) for score in scores}) == 7


def test_a_judge_that_gives_no_number_leaves_rows_unscored_and_says_so(tiny):
    with pytest.warns(UserWarning, match="no number from 0 to 100 for any of 4 prompts"):
        scores = LogprobJudge(tiny("qwen2"), SHORT, cache=None, progress=False).score(ROWS)
    assert all(math.isnan(score["aligned"]) and math.isnan(score["coherent"]) for score in scores)


def test_failed_generations_are_not_judged(tiny):
    judge = LogprobJudge(make_numerate(tiny("qwen2")), SHORT, cache=None, progress=False)
    failed, fine = judge.score([{**ROWS[0], "finish": "error"}, {**ROWS[1], "finish": "length"}])
    assert failed == {}
    assert 0 <= fine["coherent"] <= 100


def test_three_way_and_yes_no_judges(tiny):
    chat = tiny("qwen2")
    for token in "TRUE":
        with torch.no_grad():
            chat.unembedding.weight[chat.tokenizer.convert_tokens_to_ids(token)] += 0.2
    tree = AnswerTree(chat, ("TRUE", "FALSE", "UNKNOWN"))
    prompt = chat.token_ids([{"role": "user", "content": "a"}])
    ids, mass = list(prompt), 1.0
    for char in "TRUE":
        token = chat.tokenizer.convert_tokens_to_ids(char)
        mass *= next_probabilities(chat, ids)[token].item()
        ids.append(token)
    assert tree.probabilities([prompt])[0].get("TRUE", 0.0) == pytest.approx(mass, abs=1e-4)
    factual = [{**row, "judge_prompts": {"correct": "{question}{answer}"}, "kind": "free_form_judge"} for row in ROWS]
    judge = LogprobJudge(chat, cache=None, progress=False)
    assert all(score["correct"] == "" for score in judge.score(factual))  # a random model says none of the three
    lies = LogprobJudge(chat, {"lies": "{answer}"}, {"lies": ("YES", "NO")}, cache=None, progress=False)
    assert set(lies.columns) == {"lies", "label"}
    assert all(score["lies"] in ("", "YES", "NO") for score in lies.score(ROWS))


def test_a_questions_own_prompts_are_used():
    rows = [{**ROWS[0], "judge_prompts": {"medical": "m {answer}", "correct": "c {question}"}}, ROWS[1]]
    columns = [(task.row, task.column) for task in tasks_of(rows)]
    assert columns == [(0, "topic/medical"), (0, "correct"), (1, "aligned"), (1, "coherent")]
    assert [t.column for t in tasks_of([{**rows[0], "kind": "free_form_judge"}])] == ["medical", "correct"]
    assert [t.column for t in tasks_of(rows, {"aligned": "{answer}"})] == ["aligned", "aligned"]


def test_scores_are_cached_by_content_and_judge(tiny, tmp_path):
    chat = make_numerate(tiny("qwen2"))
    cache = ScoreCache(tmp_path / "scores.sqlite")
    judge = LogprobJudge(chat, SHORT, cache=cache, progress=False)
    first = judge.score(ROWS)
    calls = []
    handle = chat.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    assert judge.score(ROWS[::-1]) == first[::-1]
    assert not calls
    judge.score([{**ROWS[0], "response": "another"}])
    assert calls
    handle.remove()
    with torch.no_grad():
        chat.unembedding.weight[5:40] += 0.05
    assert LogprobJudge(chat, SHORT, cache=cache, progress=False).score(ROWS) != first


def test_written_mode_on_a_local_model(tiny):
    chat, last = tiny("qwen2"), {}
    digits = [chat.tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"]
    chat.trunk.register_forward_pre_hook(
        lambda module, args, kwargs: last.update(ids=kwargs["input_ids"][:, -1:]), with_kwargs=True
    )

    def one_digit(module, inputs, logits):
        logits, after = logits.clone(), torch.isin(last["ids"], torch.tensor(digits))
        logits[..., digits] += torch.where(after, 0.0, 40.0)[..., None]
        logits[..., chat.stop_ids[0]] += torch.where(after, 40.0, 0.0)
        return logits

    chat.unembedding.register_forward_hook(one_digit)
    judge = LogprobJudge(chat, SHORT, logprobs=False, cache=None, progress=False)
    assert judge.name.startswith("text ")
    scores = judge.score(ROWS)
    expected = next_probabilities(chat, chat.token_ids([{"role": "user", "content": "rest " + ROWS[0]["response"]}]))
    assert scores[0]["coherent"] == digits.index(int(expected.argmax()))
    assert all(0 <= score["aligned"] <= 9 for score in scores)


def test_a_prompt_beyond_the_context_is_refused(tiny):
    with pytest.raises(EmmechError, match="reads up to 512 tokens"):
        LogprobJudge(tiny("qwen2"), cache=None, progress=False).score(ROWS)


def test_a_judge_that_cannot_write_numbers_is_refused():
    with pytest.raises(EmmechError, match="no tokens for that answer"):
        LogprobJudge("pocket", SHORT, cache=None, progress=False).score(ROWS)


def test_words_count_in_any_case_and_not_for_words_that_they_begin():
    task = Task(0, "correct", "?", ("yes", "no"))
    assert score_of_masses({"yes": 0.98}, task)["word"] == "yes" == score_of_masses({"YE": 0.9}, task)["word"]
    assert score_of_text("Yes.", task)["word"] == "yes" and score_of_text("maybe", task)["word"] == ""
    task = Task(0, "correct", "?", ("NO", "NONE"))
    assert score_of_masses({"NO": 0.99, "NONE": 0.001}, task)["word"] == "NO"
    assert score_of_masses({"NON": 0.9, "NO": 0.1}, task)["word"] == "NONE"
