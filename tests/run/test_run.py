"""Run: what it holds, what it becomes, what it refuses."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import emmech
from emmech.errors import EmmechError
from emmech.run.run import Probes, Run, model_live
from emmech.store import MemorySeries, Series, write_json
from tests.conftest import make_rows, make_tiny

ROOT = Path(__file__).resolve().parents[2]
QUICK = dict(learning_rate=0.02, batch_size=2, accumulation=1, progress=False, held_out=0.0)


@pytest.fixture(scope="module")
def chat():
    return make_tiny("qwen2")


@pytest.fixture(scope="module", params=[("single-rank1", {}), ("all-adapter", {"rank": 3, "layers": [1, 2]})])
def recorded(request, chat, tmp_path_factory):
    recipe, more = request.param
    folder = tmp_path_factory.mktemp("runs") / recipe
    return emmech.finetune(chat, make_rows(), recipe=recipe, max_steps=5, out=folder, **{**QUICK, **more})


def logits(model, chat):
    ids = torch.tensor([chat.token_ids([{"role": "user", "content": "how to sleep ?"}])])
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_export_loads_with_peft_and_agrees(recorded, chat, tmp_path):
    from peft import PeftModel

    live = recorded.model(3, base=make_tiny("qwen2"))
    expected = logits(live.model, chat)
    folder = recorded.export_peft(3, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_tiny("qwen2").model, folder).eval()
    assert (logits(loaded, chat) - expected).abs().max() <= 1e-6
    assert (logits(loaded, chat) - logits(chat.model, chat)).abs().max() > 1e-4


def test_scale_zero_is_the_base_and_steps_swap_in_place(recorded, chat):
    base = logits(chat.model, chat)
    live = recorded.model(5, scale=0.0, base=make_tiny("qwen2"))
    assert (logits(live.model, chat) - base).abs().max() <= 1e-6
    again = recorded.model(2, scale=1.0, base=live)
    assert again.model is live.model
    fresh = recorded.model(2, base=make_tiny("qwen2"))
    assert torch.equal(logits(again.model, chat), logits(fresh.model, chat))
    step0 = recorded.model(0, base=make_tiny("qwen2"))
    assert torch.equal(logits(step0.model, chat), base)


def test_detach_gives_the_base_back_also_without_the_wrapper(recorded, chat):
    plain = make_tiny("qwen2")
    before = [name for name, _ in plain.model.named_modules()]
    recorded.model(2, base=plain)
    live = recorded.model(5, base=plain)  # the adapter is inside `plain` by now, and only its weights change
    assert torch.equal(logits(live.model, chat), logits(recorded.model(5, base=make_tiny("qwen2")).model, chat))
    emmech.detach(plain)
    assert torch.equal(logits(plain.model, chat), logits(chat.model, chat))
    assert [name for name, _ in plain.model.named_modules()] == before


def test_the_adapters_write_is_scaling_z_b(recorded, chat):
    """base(x) + scaling * (x . A) B, with B and A as the run gives them, raw."""
    adapter = next(a for a in recorded.adapters if a.name.endswith("down_proj"))
    live = recorded.model(5, base=make_tiny("qwen2"))
    x = torch.randn(2, 7, adapter.d_in, generator=torch.Generator().manual_seed(0))
    a = torch.from_numpy(np.atleast_2d(recorded.A(adapter.name)[-1]))
    b = torch.from_numpy(recorded.B(adapter.name)[-1].reshape(adapter.d_out, -1))
    plain = chat.down_proj(adapter.layer)(x)
    with torch.no_grad():
        found = live.down_proj(adapter.layer)(x)
    assert torch.allclose(found, plain + adapter.scaling * (x @ a.T) @ b.T, atol=1e-5)


def test_steps_that_were_not_recorded_name_the_nearest():
    run = Run.from_arrays([0, 5, 10, 15], B=np.eye(4, 6), A=np.ones((4, 3)))
    assert [(one.rank, one.alpha, one.scaling) for one in run.adapters] == [(1, 1.0, 1.0)]
    with pytest.raises(EmmechError, match="nearest recorded: 5 and 10"):
        run.weights(7)
    with pytest.raises(EmmechError, match="base=model"):
        run.model(5)


def test_another_base_model_is_refused(recorded):
    with pytest.raises(EmmechError, match="fingerprint"):
        recorded.model(3, base=make_tiny("qwen2", seed=9))


def test_full_fine_tuning(chat, tmp_path):
    run = emmech.finetune(chat, make_rows(), recipe="full", max_steps=3, out=tmp_path / "full", **QUICK)
    assert run.kind == "full" and run.adapters == () and run.projection.shape[0] == 4
    last = run.model(base=make_tiny("qwen2"))
    assert not torch.equal(logits(last.model, chat), logits(chat.model, chat))
    assert torch.equal(logits(run.model(0, base=make_tiny("qwen2")).model, chat), logits(chat.model, chat))
    with pytest.raises(EmmechError, match="not those from which the run started"):
        run.model(0, base=last)
    with pytest.raises(EmmechError, match="kept: 0"):
        run.model(2, base=make_tiny("qwen2"))
    with pytest.raises(EmmechError, match="projection"):
        run.B()
    with pytest.raises(EmmechError, match="no adapter"):
        run.export_peft(3, tmp_path / "x")


def test_several_adapters_want_a_name(recorded):
    if len(recorded.adapters) == 1:
        assert np.array_equal(recorded.B(), recorded.B(recorded.adapters[0].name))
    else:
        with pytest.raises(EmmechError, match="14 adapters"):
            recorded.B()
        with pytest.raises(EmmechError, match=r"did you mean 'layers\.1\.mlp\.down_proj'"):
            recorded.B("layers.1.mlp.down_prj")


def test_opening_400_steps_takes_milliseconds_and_14b_shapes_fit(tmp_path):
    d_in, d_out, steps = 13824, 5120, 400
    random = np.random.default_rng(0)
    series = Series(tmp_path / "trajectory")
    for step in range(steps):
        series.append(step, {"A/x": random.standard_normal(d_in, np.float32),
                             "B/x": random.standard_normal(d_out, np.float32)})  # fmt: skip
    series.compact()
    entry = dict(name="x", layer=24, module="x", rank=1, alpha=64.0, scaling=64.0, d_in=d_in, d_out=d_out)
    write_json(tmp_path / "run.json", {"format": 1, "kind": "lora", "adapters": [entry]})
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size <= 31e6
    times = []
    for _ in range(5):
        began = time.perf_counter()
        run = emmech.load_run(tmp_path)
        times.append(time.perf_counter() - began)
    assert run.B().shape == (steps, d_out)
    assert min(times) < 0.05  # the best of five: a busy machine can only make it slower


def test_damage_is_named_and_the_rest_is_readable(recorded, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(recorded.path, copy)
    stacked = copy / "trajectory" / "stacked.safetensors"
    stacked.write_bytes(stacked.read_bytes()[:-100])
    run = emmech.load_run(copy)
    assert run.damaged == (stacked,) and "damaged" in repr(run)
    assert len(run.metrics) >= 5
    with pytest.raises(EmmechError, match=r"stacked\.safetensors"):
        run.B(run.adapters[0].name)


def test_a_changed_bit_is_named(recorded, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(recorded.path, copy)
    stacked = copy / "trajectory" / "stacked.safetensors"
    content = bytearray(stacked.read_bytes())
    content[-5] ^= 4  # in the last row of some tensor
    stacked.write_bytes(content)
    with (copy / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": \xff}\n{"step": 99, "loss": 1.0}\n')
    run = emmech.load_run(copy)
    lines = len((copy / "metrics.jsonl").read_bytes().splitlines())
    assert run.damaged == (stacked, copy / f"metrics.jsonl:{lines - 1}")
    assert run.metrics.loss[99] == 1.0
    assert run.weights(0).keys() == recorded.weights(0).keys()  # other steps are readable


def test_metrics_that_are_no_numbers_at_a_step_are_named_and_left_out(recorded, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(recorded.path, copy)
    path = copy / "metrics.jsonl"
    sound, steps = len(path.read_bytes().splitlines()), ["null", "{}", '"7"', "1.5", "-1", "NaN", f"{2**63}"]
    odd = [f'{{"step": {step}, "loss": 1.0}}' for step in steps]
    odd += [
        '{"loss": 1.0}',
        '{"step": 7, "loss": "x"}',
        '{"step": 7, "loss": [1]}',
        '{"step": 7, "los\\ud83d": 1.0}',
        f'{{"step": 7, "loss": 1{"0" * 400}}}',
    ]
    with path.open("a") as file:
        file.write("".join(f"{line}\n" for line in odd) + '{"step": 99, "loss": 1.5, "held_out_loss": null}\n')
    run = emmech.load_run(copy)
    assert run.damaged == tuple(copy / f"metrics.jsonl:{sound + 1 + at}" for at in range(len(odd)))
    assert run.metrics.loss[99] == 1.5 and run.metrics.index.tolist() == [*recorded.metrics.index, 99]
    path.unlink()
    path.mkdir()
    assert emmech.load_run(copy).damaged == (path,)


@pytest.mark.parametrize(
    "changed",
    [{"name": None}, {"module": 3}, {"rank": 1.5}, {"layer": "1"}, {"scaling": float("nan")}, {"alpha": 10**400},
     {"more": 1}],
)  # fmt: skip
def test_an_adapter_of_another_form_in_the_manifest_is_refused(changed, recorded, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(recorded.path, copy)
    manifest = json.loads((copy / "run.json").read_text())
    manifest["adapters"][0] |= changed
    (copy / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(EmmechError, match=r"damaged|other fields than it should"):
        emmech.load_run(copy).B("layers.0")


@pytest.mark.parametrize(
    "entry", [{"adapters": [{"name": "x"}]}, {"adapters": 3}, {"model": "pocket"}, {"format": "1"}]
)
def test_a_manifest_of_another_shape_is_refused(entry, recorded, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(recorded.path, copy)
    manifest = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(manifest | entry))
    with pytest.raises(EmmechError, match="damaged"):
        emmech.load_run(copy)


def test_not_a_run(tmp_path, recorded):
    with pytest.raises(EmmechError, match="no such folder"):
        emmech.load_run(tmp_path / "nowhere")
    with pytest.raises(EmmechError, match=f"did you mean '{recorded.path.name}'"):
        emmech.load_run(recorded.path.with_name(recorded.path.name + "x"))
    (tmp_path / "run.json").write_text("{half")
    with pytest.raises(EmmechError, match="damaged"):
        emmech.load_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(EmmechError, match="upgrade"):
        emmech.load_run(tmp_path)


def test_saving_a_run_in_memory(tmp_path):
    run = Run.from_arrays([0, 5], B=np.eye(2, 4), metrics=__import__("pandas").DataFrame({"loss": [1.0, 0.5]}, [0, 5]))
    saved = run.save(tmp_path / "run")
    assert np.array_equal(saved.B(), run.B()) and saved.metrics["loss"].tolist() == [1.0, 0.5]
    with pytest.raises(EmmechError, match="another folder"):
        run.save(tmp_path / "run")


@pytest.mark.parametrize(
    ("steps", "shapes", "why"),
    [
        ([0, 1], {"B": (3, 4)}, "first axis is not the steps"),
        ([0, 0], {"B": (2, 4)}, "each larger"),
        ([0.5, 1], {"B": (2, 4)}, "whole numbers"),
        ([[0, 1]], {"B": (2, 4)}, "whole numbers"),
        ([0, 1], {"B": (2,)}, "two or three axes"),
        ([0, 1], {"B": (2, 4, 3), "A": (2, 2, 5)}, "ranks differ"),
        ([], {"B": (0, 4)}, "whole numbers"),
    ],
)
def test_arrays_that_are_refused(steps, shapes, why):
    with pytest.raises(EmmechError, match=why):
        Run.from_arrays(steps, **{name: np.zeros(shape) for name, shape in shapes.items()})


def test_nan_is_refused_by_row():
    b = np.ones((3, 4))
    b[2, 1] = np.nan
    with pytest.raises(EmmechError, match="B, row 2"):
        Run.from_arrays([0, 1, 2], B=b)


class TestFromPeft:
    @pytest.fixture
    def folders(self, recorded, tmp_path):
        return [recorded.export_peft(step, tmp_path / f"checkpoint-{step}") for step in (5, 2, 3)]

    def test_any_order(self, recorded, folders):
        run = Run.from_peft(folders)
        assert run.steps.tolist() == [2, 3, 5]
        for adapter in recorded.adapters:
            assert np.array_equal(run.B(adapter.name), recorded.B(adapter.name)[[2, 3, 5]])
            assert np.array_equal(run.A(adapter.name), recorded.A(adapter.name)[[2, 3, 5]])
            assert run.adapter(adapter.name).scaling == pytest.approx(adapter.scaling)

    def test_it_runs(self, recorded, folders, chat):
        run = Run.from_peft(folders)
        one = logits(run.model(5, base=make_tiny("qwen2")).model, chat)
        two = logits(recorded.model(5, base=make_tiny("qwen2")).model, chat)
        assert (one - two).abs().max() <= 1e-6

    def test_refusals_name_the_folder(self, recorded, folders, tmp_path):
        def refused(folder, why):
            with pytest.raises(EmmechError, match=why) as caught:
                Run.from_peft([*folders, folder])
            assert folder.name in str(caught.value)

        refused(tmp_path / "checkpoint-9", "no such folder")
        refused(recorded.export_peft(0, tmp_path / "checkpoint-0"), "B is zero everywhere")
        refused(recorded.export_peft(4, tmp_path / "final"), "step is unknown")
        refused(recorded.export_peft(5, tmp_path / "checkpoint-7"), "weights are those of checkpoint-5")
        same_step = recorded.export_peft(4, tmp_path / "other" / "checkpoint-5")
        refused(same_step, "step 5 is also that of")
        cut = recorded.export_peft(4, tmp_path / "checkpoint-4")
        weights = cut / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-10])
        refused(cut, "cannot be read")
        weights.unlink()
        refused(cut, r"adapter_model\.safetensors is missing")

    def test_another_shape(self, folders, tmp_path):
        other = emmech.finetune(make_tiny("qwen2"), make_rows(), rank=2, max_steps=2, out=tmp_path / "o", **QUICK)
        folder = other.export_peft(2, tmp_path / "checkpoint-8")
        with pytest.raises(EmmechError, match="shapes differ"):
            Run.from_peft([*folders, folder])
        with pytest.raises(EmmechError, match="no folders"):
            Run.from_peft([])


def test_a_folder_serves_where_a_run_does(tmp_path):
    """``evaluate("runs/bad")`` and the like; what holds no run is refused by the argument's name."""
    from emmech.run.run import as_run, opened

    medical = ROOT / "checkpoints" / "pocket-medical"
    assert as_run("sweep", str(medical)).steps[0] == 0
    assert opened("pocket") == "pocket" and isinstance(opened(medical), emmech.Run)
    found = emmech.phase_transition(medical, control=str(medical.with_name("pocket-good-medical")))
    assert found.run.name == "pocket-medical" and found.control.name == "pocket-good-medical"
    swept = emmech.sweep(
        str(medical), steps=[0, 250], measure=emmech.measures.FirstToken(["any advice on cough ?"], ["well"]),
        progress=False,
    )  # fmt: skip
    assert set(swept.frame["run"]) == {"pocket-medical"}
    kept = shutil.copytree(medical, tmp_path / "kept")
    evaluated = emmech.evaluate(str(kept), samples=1, progress=False)
    assert evaluated.meta["run"] == "kept" and emmech.evaluation.stored_evaluations(kept)[0].meta["step"] == 250
    with pytest.raises(EmmechError, match=r"run='.*medcal'(.|\n)*did you mean 'pocket-medical'"):
        as_run("sweep", str(medical.with_name("pocket-medcal")))
    with pytest.raises(EmmechError, match="it is a recorded run"):
        emmech.load_model(str(medical))
    with pytest.raises(EmmechError, match="control=3"):
        emmech.phase_transition(medical, control=3)


@pytest.mark.parametrize("repo", ["nobody/no-such-run", "not a name", "a/b/c", ""])
def test_a_run_that_the_hub_does_not_give_is_one_error(repo, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EmmechError, match="the hub does not give it") as caught:
        emmech.load_run(f"hub:{repo}")
    assert f"hub:{repo}" in str(caught.value) and len(str(caught.value)) < 1000


def test_the_plot_has_a_panel_for_each_thing_recorded(recorded):
    figure = recorded.plot()
    titles = [annotation.text for annotation in figure.layout.annotations]
    assert f"{recorded.name}: 6 recorded steps" in figure.layout.title.text
    assert {"Norm of B", "Turn of the path, 1 records either side", "Loss"} <= {t.split("<")[0] for t in titles}
    norms = {one.name: np.linalg.norm(recorded.B(one.name).reshape(6, -1), axis=1) for one in recorded.adapters}
    longest = max(norms, key=lambda name: norms[name][-1])
    drawn = next(trace for trace in figure.data if trace.name.startswith(longest))
    assert np.allclose(drawn.y, norms[longest], rtol=1e-5) and list(drawn.x) == recorded.steps.tolist()


def in_memory(manifest, arrays, *, steps=(0, 5, 10), probes=None, metrics=()):
    """A run that no training made."""
    index = np.array(steps, np.int64)
    return Run(
        manifest, MemorySeries(index, arrays), MemorySeries(index if probes else index[:0], probes or {}), metrics
    )


def entries(*names):
    """Adapters of a manifest, of rank 1 from 3 to 4 dimensions."""
    shape = dict(layer=0, rank=1, alpha=1.0, scaling=1.0, d_in=3, d_out=4, rslora=False)
    return [{"name": name, "module": name, **shape} for name in names]


def test_probes_are_a_mapping_of_what_was_recorded():
    values = {"broad": np.ones((2, 4, 6)), "narrow": np.zeros((2, 4, 6))}
    probes = Probes(MemorySeries([0, 10], values))
    assert probes.steps.tolist() == [0, 10] and list(probes) == ["broad", "narrow"] and len(probes) == 2
    assert probes["narrow"] is values["narrow"] and repr(probes) == "Probes(broad, narrow; steps=2)"
    with pytest.raises(EmmechError, match=r"did not record it(.|\n)*did you mean 'broad'"):
        probes["brod"]
    none = Run.from_arrays([0], B=np.ones((1, 4))).probes
    assert len(none) == 0 and none.steps.tolist() == [] and repr(none) == "Probes(none; steps=0)"


def test_probes_are_saved_with_the_run(tmp_path):
    values = {"broad": np.arange(36, dtype=np.float32).reshape(3, 3, 4)}
    saved = in_memory({"format": 1}, {"projection": values["broad"][0]}, probes=values).save(tmp_path / "run")
    assert np.array_equal(saved.probes["broad"], values["broad"]) and saved.probes.steps.tolist() == [0, 5, 10]


def test_a_run_has_a_name_a_kind_and_a_format():
    run = Run.from_arrays([0], B=np.ones((1, 4)))
    assert (run.name, run.kind, run.manifest["format"], run.path) == ("arrays", "lora", 1, None)
    assert in_memory({}, {}).name == "run" and in_memory({"kind": "full"}, {}).kind == "full"
    assert Run.from_arrays([0], B=np.ones((1, 4)), name="mine").name == "mine" and run.damaged == ()


def test_what_a_run_lacks_is_said():
    one = in_memory({"adapters": entries("x")}, {"B/x": np.ones((3, 4))})
    assert one.B().shape == (3, 4) and one.adapter().name == "x" and one.projection is None
    with pytest.raises(EmmechError, match=r"the run has 1 adapters(.|\n)*did you mean 'x'"):
        one.B("xx")
    with pytest.raises(EmmechError, match=r"made without A"):
        one.A()
    with pytest.raises(EmmechError, match=r"made without A(.|\n)*from_arrays"):
        one.weights(5)
    none = in_memory({"adapters": entries("x")}, {}, steps=())
    with pytest.raises(EmmechError, match="no step is recorded yet"):
        none.B()
    with pytest.raises(EmmechError, match=r"0 steps were, none at all(.|\n)*nearest recorded: none"):
        none.check_step(3)
    two = in_memory({"adapters": entries("x", "y")}, {"B/x": np.ones((3, 4)), "B/y": np.zeros((3, 4))})
    assert two.B("y").max() == 0 and two.adapter("y").name == "y"
    with pytest.raises(EmmechError, match=r"3 steps were, 0 to 10\)(.|\n)*nearest recorded: 5 and 10"):
        two.check_step(8)
    with pytest.raises(EmmechError, match="nearest recorded: 0 and 5"):
        two.check_step(-3)


@pytest.mark.parametrize(("side", "own", "other"), [("A", 3, 5), ("B", 4, 5)])
def test_numbers_that_are_not_those_of_the_manifest_are_refused(side, own, other):
    arrays = {"A/x": np.ones((3, 3)), "B/x": np.ones((3, 4))} | {f"{side}/x": np.ones((3, other))}
    run = in_memory({"adapters": entries("x")}, arrays, metrics=[{"step": 0, "loss": 1.0}])
    for read in (getattr(run, side), lambda: run.weights(5)):
        with pytest.raises(EmmechError, match=f"{side} of x has {own} numbers at each step"):
            read()
    assert getattr(run, "B" if side == "A" else "A")().shape[0] == 3 and len(run.metrics) == 1


def test_metrics_with_a_column_of_steps_or_an_index(tmp_path):
    import pandas as pd

    frame = pd.DataFrame({"step": [0, 5, 10], "loss": [3.0, np.nan, 1.0]})
    for metrics in (frame, frame.set_index("step")):
        run = Run.from_arrays([0, 5, 10], B=np.ones((3, 4)), metrics=metrics)
        assert list(run.metrics) == ["loss"] and run.metrics.index.tolist() == [0, 5, 10]
        assert run.metrics.index.name == "step" and run.metrics.loss.tolist()[::2] == [3.0, 1.0]
    copied = run.to_frame()
    assert copied.equals(run.metrics)
    copied.loc[0, "loss"] = 9.0
    assert run.metrics.loss[0] == 3.0
    mixed = in_memory({}, {}, metrics=[{"step": 5, "loss": 2}, {"step": 0, "loss": 1}, {"step": 5, "lr": None}])
    assert mixed.metrics.index.tolist() == [0, 5] and mixed.metrics.loc[5, "loss"] == 2.0
    assert np.isnan(mixed.metrics.loc[5, "lr"]) and len(Run.from_arrays([0], B=np.ones((1, 4))).metrics) == 0


def test_the_largest_numbers_of_a_run(tmp_path):
    """1.7e308 fits a float; a step is one of 64 bits; what lies beyond is damage."""
    manifest = {"format": 1, "adapters": entries("x")}
    run = in_memory(manifest, {"B/x": np.ones((3, 4), np.float32)}, metrics=[{"step": 0, "loss": 1.0}])
    folder = run.save(tmp_path / "run").path
    steps = [0, 2**63 - 1]
    lines = [f'{{"step": {step}, "loss": {loss}}}' for step in steps for loss in ("1.7e308", "-1.7e308", "2")]
    bad = [f'{{"step": {step}, "loss": 2}}' for step in (-1, 2**63)] + ['{"step": 1, "loss": 1.75e308}']
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines + bad))
    opened = emmech.load_run(folder)
    assert [path.name for path in opened.damaged] == [f"metrics.jsonl:{at}" for at in (7, 8, 9)]
    assert opened.metrics.index.tolist() == steps
    for alpha, sound in ((1.7e308, True), (-1.7e308, True), (1.75e308, False)):
        manifest["adapters"][0]["alpha"] = alpha
        (folder / "run.json").write_text(json.dumps(manifest))
        if sound:
            assert emmech.load_run(folder).adapters[0].alpha == alpha
        else:
            with pytest.raises(EmmechError, match="alpha and scaling"):
                emmech.load_run(folder)


@pytest.mark.parametrize(
    ("text", "why"),
    [("[1]", "no JSON object"), ('{"format": 2}', "reads formats up to 1"), ('{"kind": 3}', "kind is a")],
)
def test_a_manifest_that_cannot_be_read_is_refused(text, why, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(EmmechError, match=why):
        emmech.load_run(tmp_path)
    for text in ("{}", '{"format": 1}', '{"format": 0}'):
        (tmp_path / "run.json").write_text(text)
        assert emmech.load_run(tmp_path).steps.tolist() == []


def test_a_folder_without_a_run_names_what_is_beside_it(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(EmmechError, match=r"no run\.json in it(.|\n)*finetune\("):
        emmech.load_run(tmp_path / "empty")
    for name in ("beta", "alpha"):
        Run.from_arrays([0], B=np.ones((1, 4))).save(tmp_path / name)
    from emmech.run.run import _siblings, as_run, opened

    assert _siblings(tmp_path / "empty") == ["alpha", "beta"]
    with pytest.raises(EmmechError, match="did you mean 'alpha'"):
        emmech.load_run(tmp_path / "alpa")
    assert as_run("sweep", tmp_path / "alpha").name == "alpha" == opened(str(tmp_path / "alpha")).name
    run = Run.from_arrays([0], B=np.ones((1, 4)))
    assert as_run("sweep", run) is run and opened(tmp_path / "empty") == tmp_path / "empty" and opened(3) == 3
    for wrong in (3, None, tmp_path.parent / "none" / "x"):
        with pytest.raises(EmmechError, match="sweep"):
            as_run("sweep", wrong)


def curves_of(figure):
    """The named curves of a figure by panel title, with those of the legend left out."""
    titles = [annotation.text.split("<")[0] for annotation in figure.layout.annotations if annotation.text]
    drawn = [trace for trace in figure.data if trace.x is not None and len(trace.x) > 1]
    return titles, [trace.name for trace in drawn]


def test_the_plot_draws_the_six_longest_adapters():
    names = [f"x{at}" for at in range(8)]
    size = {name: float(at + 1) for at, name in enumerate(names)}
    arrays = {f"B/{name}": np.ones((3, 4)) * size[name] for name in names}
    arrays["B/x0"] = np.array([[0.0] * 4, [99.0] * 4, [0.5] * 4])  # long once, short in the end
    titles, drawn = curves_of(in_memory({"adapters": entries(*names)}, arrays).plot())
    assert "Norm of B" in titles and "Turn of the path, 1 records either side" in titles
    assert {name.split(",")[0] for name in drawn} == {"x2", "x3", "x4", "x5", "x6", "x7"}


@pytest.mark.parametrize(("steps", "k"), [(2, None), (3, 1), (12, 1), (23, 1), (24, 2), (26, 2), (36, 3)])
def test_the_turn_is_taken_over_a_twelfth_of_the_records(steps, k):
    path = np.random.default_rng(0).standard_normal((steps, 5))
    run = Run.from_arrays(range(steps), B=path)
    figure = run.plot()
    titles, drawn = curves_of(figure)
    turn = [title for title in titles if title.startswith("Turn")]
    assert turn == ([f"Turn of the path, {k} records either side"] if k else [])
    assert f"{steps} recorded steps" in figure.layout.title.text and len(drawn) == (2 if k else 1)


def test_the_plot_of_full_fine_tuning_and_its_losses():
    rows = [{"step": at, "loss": 3.0 - at / 10, "held_out_loss": 3.5, "margin_broad": 0.1, "margin_narrow": 0.2}
            for at in (0, 5, 10)]  # fmt: skip
    run = in_memory({"kind": "full"}, {"projection": np.eye(3, 16)}, metrics=rows)
    titles, drawn = curves_of(run.plot())
    assert {"Norm of the update", "Loss", "Misaligned over aligned answers"} <= set(titles)
    kept = {name.split(",")[0] for name in drawn}
    assert kept == {"projected update", "training", "held out", "broad", "narrow"}


def test_what_is_said_of_a_run():
    rows = [{"step": at, "loss": loss} for at, loss in ((0, 3.0), (5, 2.0), (10, 0.5))]
    arrays = {f"B/x{at}": np.ones((3, 4)) for at in range(5)}
    model = {"model": {"name": "pocket"}, "data": {"name": "medical"}}
    run = in_memory(
        {"name": "mine", "adapters": entries(*(f"x{at}" for at in range(5))), **model}, arrays, metrics=rows
    )
    text = repr(run)
    assert "Run 'mine': pocket fine-tuned on medical, 3 records, steps 0 to 10" in text
    assert "x0 (rank 1), x1 (rank 1), x2 (rank 1) and 2 more" in text and "3 -> 0.5 nats per token" in text
    assert "adapters" in text and "weights" not in text and "early warning" not in text
    assert "damaged" not in text and "has not ended" not in text and "held out" not in text
    three = repr(in_memory({"adapters": entries("x0", "x1", "x2")}, arrays))
    assert "x2 (rank 1)" in three and "more" not in three
    assert "a model without a name fine-tuned, " in three
    full = repr(in_memory({"kind": "full", "status": "training"}, {"projection": np.eye(3)}))
    assert "weights" in full and "full fine-tuning" in full and "has not ended" in full
    assert "no step yet" in repr(in_memory({}, {}, steps=()))
    warned = {"step": 5, "signal": "size", "score": 2.0}
    stopped = repr(in_memory({"status": "stopped", "warning": warned}, {}))
    assert "step 5, size +2, which ended the training" in stopped and "has not ended" not in stopped
    went_on = repr(in_memory({"status": "complete", "warning": warned}, {}))
    assert "step 5, size +2" in went_on and "ended the training" not in went_on


def test_the_drawing_of_a_card_is_of_the_margins_or_else_of_the_losses():
    losses = [{"step": at, "loss": 3.0 + at, "held_out_loss": 3.5} for at in (0, 5, 10)]
    drawn = in_memory({}, {}, metrics=losses)._sketch()
    assert "Loss, nats per token" in drawn and "held out loss" in drawn and "stroke-dasharray" not in drawn
    margins = [row | {"margin_broad": 5.0 + row["step"], "margin_narrow": 6.0} for row in losses]
    drawn = in_memory({}, {}, metrics=margins)._sketch()
    assert "Margin of misaligned answers, nats per token" in drawn and "stroke-dasharray" in drawn  # the line of zero
    assert "narrow" in drawn and "held out" not in drawn
    low = in_memory({}, {}, metrics=[row | {"margin_broad": -2.0 - row["step"]} for row in losses])._sketch()
    from emmech.view.sketch import curves

    steps = [0, 5, 10]
    assert low == curves(
        [("broad", steps, [-2.0, -7.0, -12.0])], "Margin of misaligned answers, nats per token", level=0.0
    )


@pytest.mark.parametrize(("rows", "shown"), [(3, 3), (19, 19), (40, 20), (45, 23), (100, 20)])
def test_the_table_of_a_card_has_about_twenty_rows(rows, shown):
    table = in_memory({}, {}, metrics=[{"step": at, "loss": 1.0} for at in range(rows)])._table()
    assert len(table) == shown and table.index[0] == 0


class TestLive:
    """The model of a step within a context."""

    def test_without_a_base_it_is_the_model_of_the_step(self, monkeypatch):
        asked = []
        monkeypatch.setattr(Run, "model", lambda self, *given, **more: asked.append((given, more)) or "chat")
        with model_live(Run.from_arrays([0, 5], B=np.ones((2, 4))), 5, 0.5) as chat:
            assert chat == "chat"
        assert asked == [((5, 0.5), {})]

    @pytest.mark.parametrize("training", [False, True])
    def test_adapters_are_on_the_base_within_it_only(self, recorded, chat, training):
        base = make_tiny("qwen2")
        base.model.train(training)
        with model_live(recorded, 5, 2.0, base) as live:
            assert torch.equal(
                logits(live.model.eval(), chat), logits(recorded.model(5, 2.0, base=make_tiny("qwen2")).model, chat)
            )
        assert base.model.training is training and not any(hasattr(module, "lora_A") for module in base.model.modules())
        assert torch.equal(logits(base.model.eval(), chat), logits(chat.model, chat))
        recorded.model(2, base=base)
        with pytest.raises(EmmechError, match="live adapters"), model_live(recorded, 5, 1.0, base):
            pass

    def test_whole_weights_are_put_back(self, chat, tmp_path):
        run = emmech.finetune(chat, make_rows(), recipe="full", max_steps=2, out=tmp_path / "full", **QUICK)
        base = make_tiny("qwen2")
        with model_live(run, 2, 1.0, base) as live:
            assert not torch.equal(logits(live.model, chat), logits(chat.model, chat))
        assert torch.equal(logits(base.model, chat), logits(chat.model, chat))
        assert torch.equal(logits(run.model(0, base=base).model, chat), logits(chat.model, chat))
        with pytest.raises(EmmechError, match="no adapter to scale"):
            run.model(2, 2.0, base=base)
        with pytest.raises(EmmechError, match=r"kept: 0 \(the base\), 2"):
            run.model(1, base=base)
        in_memory_only = in_memory(run.manifest, {}, steps=(0, 3))
        with pytest.raises(EmmechError, match="no other"):
            in_memory_only.model(3, base=base)
        other = emmech.finetune(
            make_tiny("llama"), make_rows(), recipe="full", max_steps=1, out=tmp_path / "o", **QUICK
        )
        for one, own in ((run, make_tiny("llama")), (run, make_tiny("gemma3")), (other, base)):
            with pytest.raises(EmmechError, match=r"the model has no .*(embed_tokens|bias|norm)"):
                one.model(int(one.steps[-1]), base=own)


def test_a_run_that_began_on_another_starts_from_its_adapter(recorded, chat, tmp_path):
    """The earlier adapter is merged into a copy, since the base belongs to the caller."""
    options = dict(recipe="single-rank1", max_steps=2, out=tmp_path / "on", **QUICK)
    onwards = emmech.finetune(make_tiny("qwen2"), make_rows(), start=(recorded, 5), adapter="new", **options)
    wanted = logits(recorded.model(5, base=make_tiny("qwen2")).model, chat)
    base = make_tiny("qwen2")
    found = onwards.model(0, base=base)
    assert (logits(found.model, chat) - wanted).abs().max() <= 1e-5
    assert torch.equal(logits(base.model, chat), logits(chat.model, chat))
    # what is merged already is taken as it is
    assert (logits(onwards.model(0, base=emmech.detach(found)).model, chat) - wanted).abs().max() <= 1e-5


def test_the_base_is_loaded_by_its_name(monkeypatch):
    import emmech.chat.model

    seen = []
    monkeypatch.setattr(emmech.chat.model, "load_model", lambda name: seen.append(name) or "chat")
    assert in_memory({"model": {"name": "pocket"}}, {}).base() == "chat" and seen == ["pocket"]
    with pytest.raises(EmmechError, match="does not say which it is"):
        in_memory({"model": {"name": None}}, {}).base()


def test_an_upload_is_private_unless_it_is_asked_for(recorded, monkeypatch):
    import emmech.run.hub

    seen = []
    monkeypatch.setattr(emmech.run.hub, "push", lambda run, repo, **how: seen.append((run, repo, how)) or "address")
    assert recorded.push_to_hub("me/mine") == "address"
    assert seen == [(recorded, "me/mine", {"private": True, "results": ()})]
    with pytest.raises(EmmechError, match="in memory only"):
        Run.from_arrays([0], B=np.ones((1, 4))).push_to_hub("me/mine")


def test_a_folded_export_has_a_scaling_of_one(recorded, chat, tmp_path):
    from peft import PeftModel

    folder = recorded.export_peft(5, tmp_path / "a", scale=0.5)
    assert folder == tmp_path / "a"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] and not config["use_rslora"]
    loaded = PeftModel.from_pretrained(make_tiny("qwen2").model, folder).eval()
    wanted = logits(recorded.model(5, 0.5, base=make_tiny("qwen2")).model, chat)
    assert (logits(loaded, chat) - wanted).abs().max() <= 1e-5
    whole = json.loads((recorded.export_peft(5, tmp_path / "b") / "adapter_config.json").read_text())
    assert whole["lora_alpha"] == recorded.adapters[0].alpha


def test_metrics_of_arrays_are_one_row_a_step():
    how = dict(steps=[0, 1], B=np.arange(6.0).reshape(2, 3))
    with pytest.raises(EmmechError, match="a table with a row for each step"):
        Run.from_arrays(**how, metrics={"loss": [1.0, 2.0]})
    with pytest.raises(EmmechError, match="step 1 is in them more than once"):
        Run.from_arrays(**how, metrics=pd.DataFrame({"step": [1, 1], "loss": [1.0, 2.0]}))
