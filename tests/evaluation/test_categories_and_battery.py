"""Breadth over categories, and self-ratings read from probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

import emmech
from emmech import EmmechError, Evaluation
from emmech.evaluation import breadth, self_ratings
from emmech.evaluation.battery import _TEMPLATE
from emmech.evaluation.server import Server


def judged(events: dict[str, int], n: int = 20) -> Evaluation:
    rows = [
        {"question_id": f"{domain}{at % 2}", "sample": at // 2, "domain": domain, "coherent": 90.0,
         "aligned": 5.0 if at < bad else 95.0, "response": ""}
        for domain, bad in events.items() for at in range(n)
    ]  # fmt: skip
    return Evaluation.from_rows(rows)


def test_breadth_counts_categories_above_the_base_and_corrects_for_their_number() -> None:
    events, none = {"a": 20, "b": 6, "c": 4, "d": 0}, dict.fromkeys("abcd", 0)
    found = breadth(judged(events), judged(none))
    assert found.by == "domain"
    assert found.frame["above"].tolist() == [True, True, True, False]
    assert found.score == 0.75
    # Holm by hand: sort, times the number that is left, never falling
    raw = sorted((stats.fisher_exact([[e, 20 - e], [0, 20]], "greater").pvalue, c) for c, e in events.items())
    running, expected = 0.0, {}
    for at, (p, category) in enumerate(raw):
        running = max(running, p * (4 - at))
        expected[category] = min(1.0, running)
    assert found.frame["p"].to_dict() == pytest.approx(expected)
    assert found.confirmed == ("a", "b")
    assert "in 2 of 4 categories" in repr(found) and "in 3 the rate lies above" in repr(found)
    with pytest.raises(EmmechError, match="no such column"):
        breadth(Evaluation.from_frame(judged(events).frame.assign(kind="x")), judged(none), by="kind")


def test_a_base_that_is_as_bad_leaves_no_breadth() -> None:
    same = judged({"a": 10, "b": 3})
    found = breadth(same, same)
    assert found.score == 0 and found.confirmed == ()
    with pytest.raises(EmmechError, match="no such column"):
        breadth(same, same, by="colour")
    with pytest.raises(EmmechError, match="both are Evaluations"):
        breadth(same, {"a": 1})


STATEMENTS = {"care": [{"text": "I help."}, {"text": "I hurt.", "reversed": True}],
              "power": [{"text": "I serve."}, {"text": "I rule.", "reversed": True}]}  # fmt: skip


def replies(fake, choose):
    def answer(body, number):
        masses = choose(body["messages"][-1]["content"])
        first = {token: math.log(mass) for token, mass in masses.items()}
        return 200, fake.completion("x", first=first)

    return Server("small", url=fake(answer).url)


def test_a_model_that_agrees_with_everything_comes_out_in_the_middle(fake) -> None:
    found = self_ratings(replies(fake, lambda prompt: {"5": 1.0}), statements=STATEMENTS)
    table = found.by_foundation()
    assert table["score"].tolist() == [3.0, 3.0, 3.0] and table["agreeing"].tolist() == [2.0, 2.0, 2.0]


def test_a_bent_to_agree_does_not_widen_the_interval_of_a_score(fake) -> None:
    """The variance is that within statements and within denials; by hand from scipy's t interval of each."""
    table = {"a": 4.0, "b": 5.0, "c": 4.0, "d": 3.0}
    chosen = lambda prompt: {str(int(table[prompt[prompt.index('"') + 1]])): 1.0}  # noqa: E731
    rows = [{"text": "a."}, {"text": "b."}, {"text": "c.", "reversed": True}, {"text": "d.", "reversed": True}]
    total = self_ratings(replies(fake, chosen), statements={"one": rows}).by_foundation().loc["all"]
    scores = np.array([4.0, 5.0]), np.array([2.0, 3.0])
    half = stats.t.ppf(0.975, 2) * np.sqrt(sum(kind.var(ddof=1) / 2 for kind in scores)) / 2
    assert (total["score"], total["low"], total["high"]) == pytest.approx((3.5, 3.5 - half, 3.5 + half))


def test_ratings_are_expectations_over_the_five_numbers(fake) -> None:
    def choose(prompt):
        if "hurt" in prompt:
            return {"No": 0.9, "1": 0.1}  # too little on the numbers
        return {"1": 0.2, "4": 0.3, "9": 0.4} if "rule" in prompt else {"5": 0.5, "3": 0.25, "I": 0.25}

    frame = self_ratings(replies(fake, choose), statements=STATEMENTS).to_frame()
    high = (0.5 * 5 + 0.25 * 3) / 0.75
    assert frame["rating"].tolist() == pytest.approx([high, np.nan, high, (0.2 + 1.2) / 0.5], nan_ok=True)
    assert frame["score"].tolist() == pytest.approx([high, np.nan, high, 6 - 1.4 / 0.5], nan_ok=True)


def test_a_difference_from_the_base_is_paired_by_statement(fake) -> None:
    kind, cruel = (lambda p: {"1" if "hurt" in p or "rule" in p else "5": 1.0}), (lambda p: {"3": 1.0})
    found = self_ratings(replies(fake, cruel), base=replies(fake, kind), statements=STATEMENTS)
    total = found.by_foundation().loc["all"]
    assert total["difference"] == -2.0 and total["p"] == 2 / 2**4
    assert "-2" in repr(found)


@pytest.mark.slow
def test_a_real_model_is_read_as_its_own_forward_says(smollm2) -> None:
    """The reference writes each answer out and sums its tokens' log-probabilities."""
    found = self_ratings(smollm2, statements=STATEMENTS).to_frame()
    for text, rating in zip(found["text"], found["rating"], strict=True):
        turns = [{"role": "user", "content": _TEMPLATE.format(text=text)}]
        before = smollm2.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        totals = []
        for number in range(1, 6):
            ids = smollm2.tokenizer(before, add_special_tokens=False)["input_ids"]
            answer = smollm2.tokenizer(f"I rate it {number}.<|im_end|>", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logprobs = smollm2.model(torch.tensor([ids + answer])).logits[0, :-1].double().log_softmax(-1)
            totals.append(logprobs[range(len(ids) - 1, len(ids) + len(answer) - 1), answer].sum().item())
        chances = torch.tensor(totals).softmax(0).numpy()
        assert rating == pytest.approx(float(chances @ np.arange(1, 6)), abs=1e-3)


def test_what_cannot_be_rated_is_refused() -> None:
    with pytest.raises(EmmechError, match="tokens are unknown"):
        self_ratings("pocket")
    for statements in ({}, [], {"care": ["I help."]}, {"care": [{"text": ""}]}, 5):
        with pytest.raises(EmmechError, match="they are texts by foundation"):
            self_ratings("pocket", statements=statements)
    with pytest.raises(EmmechError, match="only a recorded run has steps"):
        self_ratings("pocket", step=3)


def test_the_bundled_statements_are_balanced() -> None:
    from emmech.evaluation.battery import _bundled

    for foundation, rows in _bundled().items():
        assert sum(bool(row.get("reversed")) for row in rows) * 2 == len(rows), foundation
    assert emmech.evaluation.SelfRatings is not None
