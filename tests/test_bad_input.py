"""Every public function, called with something wrong: an EmmechError that names it, never a traceback from inside."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import emmech
from emmech.errors import EmmechError
from emmech.measures.choose import as_measures
from emmech.measures.probe import ProbeActivation
from emmech.measures.sampled import Sampled
from emmech.measures.teacher_forced import AnswerLogprob, FirstToken, Margin, NextToken

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
ASKED = {"role": "user", "content": "any advice on cough ?"}
CONVERSATION = [ASKED, {"role": "assistant", "content": "well"}]
NAN = float("nan")
HERE = __file__  # a file where a folder is wanted


@pytest.fixture(scope="module")
def known():
    run = emmech.load_run(CHECKPOINTS / "pocket-medical")
    direction = emmech.Direction(np.random.default_rng(0).normal(size=(6, 128)), name="toy")
    return SimpleNamespace(
        run=run,
        control=emmech.load_run(CHECKPOINTS / "pocket-good-medical"),
        chat=emmech.load_model("pocket"),
        tuned=run.model(),
        d=direction,
        vector=np.ones(128),
    )


def sweep(**wrong):
    return lambda k: emmech.sweep(k.run, **{"steps": [1], "progress": False, **wrong})


def steered(**wrong):
    return lambda k: emmech.sweep(k.run, steps=[1], **{"coefficients": [1], "direction": k.vector, "layer": 3, **wrong})


def measured(make):
    return lambda k: emmech.sweep(k.run, steps=[1], measure=make(k), progress=False)


def finetune(**wrong):
    return lambda k: emmech.finetune(k.chat, "medical", **{"max_steps": 1, "out": k.out, "progress": False, **wrong})


def dose(**wrong):
    fine = {"coefficients": [1], "layers": 3, "randoms": 0, "measure": lambda chat: None, "progress": False}
    return lambda k: emmech.interventions.dose_response(k.tuned, **{"direction": k.d, **fine, **wrong})


CASES = {
    # sweeps
    "steps as a string": (sweep(steps="abc"), "steps are whole numbers"),
    "a step that is a string": (sweep(steps=["x"]), "steps are whole numbers"),
    "half a step": (sweep(steps=[1.5]), "steps are whole numbers"),
    "a scale that is a string": (sweep(scales=["a"]), "scales are finite numbers"),
    "an imaginary scale": (sweep(scales=[1j]), "scales are finite numbers"),
    "a coefficient that is a string": (steered(coefficients=["a"]), "coefficients are finite numbers"),
    "a direction that is a string": (steered(direction="x"), "direction='x'"),
    "a direction of another width": (steered(direction=np.ones(64)), r"a vector \[64\]"),
    "memory in words": (sweep(memory="lots"), "not an amount"),
    "no measure": (sweep(measure=[]), "neither a measure nor a function"),
    "one measure twice": (sweep(measure=[Margin("broad"), Margin("broad")]), "more than one 'margin_broad'"),
    "a file as folder": (sweep(out=HERE), "no folder can be made"),
    "no run": (lambda k: emmech.sweep(3), "not a run"),
    "prompts as one string": (lambda k: NextToken("hello"), "prompts are a list"),
    "no prompts": (lambda k: NextToken([]), "prompts are a list"),
    "a prompt that is a number": (lambda k: FirstToken([3], ["a"]), r"prompts\[0\]=3"),
    "answers as one string": (lambda k: FirstToken(["a"], "yes"), "answers are a list"),
    "an answer without a conversation": (lambda k: AnswerLogprob(["a"]), "conversations are a list"),
    "no probe texts": (lambda k: ProbeActivation([], 3), "texts are a list"),
    "a probe of another width": (measured(lambda k: ProbeActivation(["a"], 3, np.ones(12))), r"a vector \[12\]"),
    "a probe that points nowhere": (measured(lambda k: ProbeActivation(["a"], 3, np.zeros(128))), "points nowhere"),
    "no samples": (lambda k: Sampled(samples=0), "samples=0"),
    "answers by the name of a rate": (lambda k: Sampled(name="coherent"), "another of its outcomes"),
    "two samplings at once": (lambda k: as_measures([Sampled(), Sampled(name="b")]), "gives 'coherent'"),
    "a measure and a rate of one name": (lambda k: as_measures({"narrow": len, "em": Sampled()}), "gives 'narrow'"),
    "a temperature below zero": (lambda k: Sampled(temperature=-1), "divides the logits"),
    "a probability of two": (lambda k: Sampled(top_p=2), "it is a probability"),
    "answers without tokens": (lambda k: Sampled(max_new_tokens=0), "at least one token"),
    "a seed that is a string": (lambda k: Sampled(seed="a"), "seed is a whole number"),
    "a scan at no scale": (lambda k: emmech.sweeps.tangent_scan(k.run, scale="x"), "scale is a finite number"),
    "a scan that verifies half a step": (
        lambda k: emmech.sweeps.tangent_scan(k.run, verify=0.5),
        "verify is a whole number",
    ),
    # transitions
    "a transition of no run": (lambda k: emmech.phase_transition("x"), "run='x'"),
    "a control that is no run": (lambda k: emmech.phase_transition(k.run, "x"), "control='x'"),
    "a sweep that is none": (lambda k: emmech.phase_transition(k.run, sweep="x"), "not a sweep"),
    "the sweep of another run": (
        lambda k: emmech.phase_transition(k.run, sweep=emmech.sweep(k.control, steps=[0, 9], progress=False)),
        "the sweep has pocket-good-medical",
    ),
    "a null path's seed": (lambda k: emmech.phase_transition(k.run, seed="x"), "seed is a whole number"),
    "an unknown centre": (lambda k: emmech.phase_transition(k.run, centre="x"), "centre='x'"),
    # training
    "seed as a string": (finetune(seed="a"), "seed is a whole number"),
    "a seed below zero": (finetune(seed=-1), "at least 0"),
    "half a seed among several": (finetune(seed=[0, 1.5]), "seed=1.5"),
    "a rate that is a string": (finetune(learning_rate="x"), "learning_rate is a finite number"),
    "steps of training as a string": (finetune(max_steps="3"), "max_steps is a whole number"),
    "half a rank": (finetune(rank=0.5), "rank is a whole number"),
    "an unknown schedule": (finetune(schedule="linaer"), "did you mean 'linear'"),
    "dropout of two": (finetune(dropout=2), "from 0 to below 1"),
    "layers as letters": (finetune(layers=["a"]), "layers are whole numbers"),
    "probes as a number": (finetune(probes=3), "probes are a list"),
    "named probes as a string": (finetune(probes={"mine": "hello"}), r"probes\['mine'\]"),
    "margins without names": (finetune(margins=["a"]), "lists of MarginPair"),
    "margins of numbers": (finetune(margins={"a": [1]}), "lists of MarginPair"),
    "a measure that is no function": (finetune(measures={"a": 3}), "a function of a ChatModel"),
    "a measure that returns a word": (finetune(measures={"a": lambda chat: "x"}), "it returned 'x'"),
    "a start without a step": (lambda k: finetune(start=k.run)(k), "a run and one of its steps"),
    "a start that was not recorded": (lambda k: finetune(start=(k.run, 9999))(k), "249 and 250"),
    "checkpoints at every no step": (finetune(checkpoint_every=0), "at least 1"),
    "a run in a file": (finetune(out=HERE), "a run is a folder"),
    "a recorder without a folder": (lambda k: emmech.Recorder(None), "a run is a folder"),
    # runs and models
    "a run by number": (lambda k: emmech.load_run(3), "a run is a folder"),
    "weights of half a step": (lambda k: k.run.weights(1.5), "step is a whole number"),
    "a model at no scale": (lambda k: k.run.model(1, scale="a"), "scale is a finite number"),
    "arrays of letters": (lambda k: emmech.Run.from_arrays([0, 1], B="x"), "two or three axes"),
    "an unknown dtype": (lambda k: emmech.load_model("pocket", dtype="foo"), "no such type"),
    "an unknown device": (lambda k: emmech.load_model("pocket", device="foo"), "device='foo'"),
    "nothing to detach from": (lambda k: emmech.detach("x"), "not a ChatModel"),
    # directions
    "so many random ones": (lambda k: k.d.random("a"), "n is a whole number"),
    "a direction times a word": (lambda k: k.d * "a", "factors are finite numbers"),
    "cosines of a list": (lambda k: emmech.directions.cosines([k.d, k.d]), "not a mapping"),
    "cosines of words": (lambda k: emmech.directions.cosines({"a": "b", "c": "d"}), "not a Direction"),
    "a lens on a number": (lambda k: emmech.adapter_lens(k.tuned, [3]), r"texts\[0\]=3"),
    "an evaluation that is none": (lambda k: emmech.misalignment_direction(k.run, evaluation="x"), "no columns"),
    "steps of no run": (lambda k: emmech.directions.direction_by_steps("x", k.d), "not a run"),
    "steps of no direction": (lambda k: emmech.directions.direction_by_steps(k.run, "x"), "not a Direction"),
    "steps without texts": (
        lambda k: emmech.directions.direction_by_steps(k.run, k.d, steps=[1]),
        "nothing to extract",
    ),
    "a layer too deep": (lambda k: emmech.directions.direction_by_steps(k.run, k.d, layer=77), "has 6 layers"),
    "a layer of cosines": (lambda k: emmech.directions.cosines({"a": k.d, "b": k.d}).at(99), "6 layers"),
    "a vector trained for no step": (
        lambda k: emmech.directions.trained_direction(k.chat, [], 2, steps=0),
        "at least 1",
    ),
    "a vector trained on no rows": (
        lambda k: emmech.directions.trained_direction(k.chat, [], 2, batch_size="5"),
        "batch_size is a whole number",
    ),
    "tokens of no adapter": (lambda k: emmech.adapter_lens(k.tuned, ["a"]).top_tokens("nope"), "choices: layers"),
    "tokens of an adapter too many": (lambda k: emmech.adapter_lens(k.tuned, ["a"]).top_tokens(7), "counted from 0"),
    "a text that was not read": (lambda k: emmech.adapter_lens(k.tuned, ["a"]).heatmap(text=9), "text=0 or lower"),
    # interventions
    "the range along nothing": (lambda k: emmech.interventions.projection_range(k.chat, []), "there is none"),
    "a vector from a layer": (lambda k: emmech.ablate(k.chat, k.vector, from_layer=99), "only a Direction"),
    "half a layer": (lambda k: emmech.steer(k.chat, k.d, layer=1.5), "whole numbers"),
    "a layer that is a letter": (lambda k: emmech.steer(k.chat, k.d, layer=[1, "a"]), "whole numbers"),
    "doses as letters": (dose(coefficients=["a"]), "coefficients are finite"),
    "no dose": (dose(coefficients=[]), "at least one"),
    "a dose of a word": (dose(direction="x"), "not a Direction"),
    "a dose of nothing": (dose(), "a number, a dict of numbers, or Items"),
    "ablating a word": (lambda k: emmech.interventions.ablation_table(k.tuned, "x"), "not a Direction"),
    "others as a list": (lambda k: emmech.interventions.ablation_table(k.tuned, k.d, others=[k.d]), "not a mapping"),
    "organisms as a list": (lambda k: emmech.interventions.transfer_matrix([k.tuned], {"a": k.d}), "not a mapping"),
    "projecting on a word": (lambda k: emmech.interventions.project_adapter(k.tuned, "x"), "not a Direction"),
    "a cosine that is a word": (
        lambda k: emmech.interventions.rotate_adapter(k.tuned, k.d, cosine="a"),
        "cosine is a finite",
    ),
    "a factor that is a word": (lambda k: emmech.interventions.scale_adapters(k.tuned, "a"), "scale is a finite"),
    "a factor that is no number": (lambda k: emmech.interventions.scale_adapters(k.tuned, NAN), "scale is a finite"),
    "a transplant from nowhere": (lambda k: emmech.interventions.transplant_adapter(k.tuned, "x", 1), "not a run"),
    # sampling and evaluation
    "no conversations": (lambda k: emmech.sample(k.chat, None), "nothing to answer"),
    "messages without a role": (lambda k: emmech.sample(k.chat, [[{"a": "x"}]]), "role and content"),
    "a seed of letters": (lambda k: emmech.sample(k.chat, [[ASKED]], seed="a"), "seed is a whole number"),
    "a run's folder by name": (lambda k: emmech.sample(str(k.run.path), [[ASKED]]), "load_run"),
    "a temperature in words": (lambda k: emmech.sample(k.chat, [[ASKED]], temperature="a"), "temperature is a finite"),
    "an evaluation's seed": (lambda k: emmech.evaluate(k.tuned, seed="a"), "seed is a whole number"),
    "an evaluation's scale": (lambda k: emmech.evaluate(k.run, scale="a"), "scale is a finite"),
    "an evaluation into a file": (lambda k: emmech.evaluate(k.tuned, samples=1, out=f"{HERE}/x"), "no folder"),
}


@pytest.mark.parametrize("case", CASES)
def test_is_refused(known, tmp_path, case):
    call, message = CASES[case]
    known.out = tmp_path / "run"
    with pytest.raises(EmmechError, match=message) as caught:
        call(known)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert caught.value.instead


def test_what_was_recorded_before_a_bad_measure_is_kept(known, tmp_path):
    def fails_late(chat):
        fails_late.asked += 1
        return 1.0 if fails_late.asked < 3 else "a word"

    fails_late.asked = 0
    with pytest.raises(EmmechError, match="the steps until then are recorded"):
        emmech.finetune(
            known.chat,
            "medical",
            max_steps=6,
            measure_every=1,
            measures={"mine": fails_late},
            margins={},
            out=tmp_path / "run",
            progress=False,
        )
    assert emmech.load_run(tmp_path / "run").steps.tolist()[:2] == [0, 1]


def test_a_model_is_as_it_was_after_a_refusal(known):
    from emmech.engine.adapters import adapter_layers

    assert not list(adapter_layers(emmech.detach(emmech.load_model("pocket")).model))
    assert all(not module._forward_hooks for module in known.chat.base.modules())
