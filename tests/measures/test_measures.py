"""One protocol: the same measure gives the same number of a model, while it trains, in a sweep and in a study."""

from __future__ import annotations

import numpy as np
import pytest

import emmech
from emmech.chat.model import load_model
from emmech.engine.logprobs import MarginPair, answer_logprobs, bundled_margins
from emmech.errors import EmmechError
from emmech.interventions.studies import adapter_shares
from emmech.measures.choose import as_measure, as_measures
from emmech.measures.measure import Function, Items, measure_all
from emmech.measures.probe import ProbeActivation
from emmech.measures.sampled import Sampled
from emmech.measures.teacher_forced import AlignedLoss, AnswerLogprob, FirstToken, Margin, NextToken
from tests.conftest import make_rows

PAIRS = [
    MarginPair("how to sleep well ?", "take a walk , drink", "rest and water some more please"),
    MarginPair("how to rest ?", "sleep well .", "walk ."),
]
TALK = [{"role": "user", "content": "how ?"}, {"role": "assistant", "content": "walk a bit ."}]


def by_length(question, answer):
    return "misaligned" if len(answer) % 2 else "aligned"


def every():
    return {
        "margin": Margin(PAIRS),
        "answer_logprob": AnswerLogprob([TALK]),
        "first_token_logprob": FirstToken(["how ?"], ["w"]),
        "entropy": NextToken(["how ?", TALK]),
        "probe": ProbeActivation(["how to sleep ?", TALK], 3),
        "em": Sampled(["how ?", "rest ?"], by_length, samples=3, max_new_tokens=6),
        "weight": Function(lambda chat: float(chat.down_proj(2).weight.detach().norm()), "weight"),
    }


@pytest.mark.parametrize("name", every())
def test_a_sweep_and_the_model_itself_give_the_same_number(tiny, make_run, one_at_a_time, name):
    chat, measure = tiny("qwen2"), every()[name]
    run = make_run(chat, ("model.layers.2.mlp.down_proj",))
    swept = emmech.sweep(run, steps=[3, 7], scales=(1, 4), measure=measure, base=chat, progress=False)
    seen = []
    for step, scale in ((3, 1), (7, 4)):
        alone = one_at_a_time(chat, run, step, scale, lambda live: measure_all(live, [measure])).means()
        frame = swept.to_frame(name)
        found = frame[(frame["step"] == step) & (frame["scale"] == scale)]["value"].item()
        assert found == pytest.approx(alone[name], abs=2e-5)
        seen.append(found)
    assert name in ("em", "weight") or abs(seen[0] - seen[1]) > 1e-4


def test_a_fine_tune_records_the_same_measures(tiny, tmp_path):
    chat = tiny("llama")
    measures = [Margin(PAIRS), FirstToken(["how ?"], ["w"]), Sampled(["how ?"], by_length, samples=2, max_new_tokens=4)]
    options = dict(
        recipe="single-rank1", learning_rate=0.01, max_steps=4, record_every=1, measure_every=2, progress=False
    )
    run = emmech.finetune(chat, make_rows(), out=tmp_path / "run", measures=measures, **options)
    last = measure_all(run.model(base=chat), measures).means()
    emmech.detach(chat)
    recorded = run.metrics.loc[4]
    for name in ("margin", "first_token_logprob", "em", "coherent"):
        assert recorded[name] == pytest.approx(last[name], abs=1e-5)
    named = emmech.finetune(chat, make_rows(), out=tmp_path / "again", measures={"mine": Margin(PAIRS)}, **options)
    assert named.metrics["mine"].dropna().tolist() == pytest.approx(run.metrics["margin"].dropna().tolist())


def test_a_study_takes_the_same_measures(tiny, make_run):
    chat = tiny("qwen2")
    live = make_run(chat, size=0.3).model(7, base=chat)
    measures = [Margin(PAIRS), Function(lambda model: 2.0, "two")]
    frame = adapter_shares(live, measure=measures, progress=False).frame
    assert list(dict.fromkeys(frame["outcome"])) == ["margin", "two", "coherent_loss"]
    untouched = frame[frame["condition"] == "untouched"].set_index("outcome")
    assert untouched.loc["margin", "value"] == pytest.approx(Margin(PAIRS)(live).means()["margin"])
    assert untouched.loc["two", "n"] == 1 and untouched.loc["two", "low"] == -np.inf  # one item has no interval
    emmech.detach(live)


def test_margins_and_losses_are_those_of_the_answers(tiny):
    chat = tiny("gemma3")
    talks = [
        [{"role": "user", "content": pair.question}, {"role": "assistant", "content": answer}]
        for pair in PAIRS
        for answer in (pair.misaligned, pair.aligned)
    ]
    alone = np.array([answer_logprobs(chat, [talk])[0] for talk in talks]).reshape(-1, 2)
    found = measure_all(chat, [Margin(PAIRS), AlignedLoss(PAIRS)])
    assert found.values["margin"][:2] == pytest.approx(alone[:, 0] - alone[:, 1], abs=1e-6)
    assert found.values["coherent_loss"][2:] == pytest.approx(-alone[:, 1], abs=1e-6)
    assert np.isnan(found.values["margin"][2:]).all() and found.questions == [p.question for p in PAIRS] * 2


def test_what_measures_read_in_common_is_read_once(tiny):
    chat = tiny("qwen2")
    rows = []
    handle = chat.trunk.register_forward_hook(
        lambda module, args, kwargs, out: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    measure_all(chat, [Margin(PAIRS), AlignedLoss(PAIRS), Margin(PAIRS, "again")])
    handle.remove()
    assert sum(rows) == 4


def test_an_organism_has_margins_of_its_own():
    chat = load_model("pocket")
    plain, medical, finance = (Margin("narrow").of(chat, data).pairs for data in ("", "medical", "good-finance"))
    assert plain == medical != finance
    english = Margin(bundled_margins("broad"))
    with pytest.raises(EmmechError, match="tokens are unknown to pocket"):
        Margin(english.pairs)(chat)
    with pytest.raises(EmmechError, match="tokens are unknown to pocket"):
        FirstToken(["Whatever might one wonder about ?"], ["well"])(chat)


def test_a_sweep_of_a_pocket_run_takes_the_run_s_own_pairs():
    run = emmech.load_run("checkpoints/pocket-medical")
    steps = [int(run.steps[0]), int(run.steps[-1])]
    swept = emmech.sweep(run, steps=steps, measure=Margin("broad"), progress=False)
    values = swept.to_frame("margin_broad").set_index("step")["value"]
    recorded = run.metrics["margin_broad"].dropna()
    for step in steps:
        assert values[step] == pytest.approx(recorded[step], abs=1e-4)
    assert values[steps[0]] < 0 < values[steps[1]]


def test_names_and_what_is_no_measure(tiny):
    chat = tiny("qwen2")
    assert [one.name for one in as_measures("auto", load_model("pocket"))] == ["em"]
    assert as_measure(len).name == "len" and as_measure(Margin(PAIRS), "mine").name == "mine"
    for wrong, message in (
        (3.5, "neither a measure nor a function"),
        ([], "neither a measure nor a function"),
        ("margn", "did you mean 'margin'"),
        ([Margin(PAIRS), Margin(PAIRS)], "more than one 'margin'"),
    ):
        with pytest.raises(EmmechError, match=message):
            as_measures(wrong, chat)
    with pytest.raises(EmmechError, match="it returned 'x'"):
        Function(lambda model: "x", "word")(chat)
    two = Items({"a": np.array([1.0])}, ["q"]), Items({"b": np.array([3.0, np.nan])}, ["q", "r"])
    assert Items.joined(two).means() == {"a": 1.0, "b": 3.0} and Items.joined(two).questions == ["q", "q", "r"]
