"""Run: what it holds, what it becomes, what it refuses."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import emmech
from emmech.errors import EmmechError
from emmech.run.run import Run
from emmech.store import Series, write_json
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


@pytest.mark.parametrize("changed", [{"d_in": 7}, {"d_out": 5}, {"rank": 2}])
def test_sizes_that_are_not_those_of_the_manifest_are_refused(changed, recorded, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(recorded.path, copy)
    manifest = json.loads((copy / "run.json").read_text())
    manifest["adapters"][0] |= changed
    (copy / "run.json").write_text(json.dumps(manifest))
    run, side = emmech.load_run(copy), "A" if "d_in" in changed else "B"
    for read in (lambda: run.weights(5), lambda: getattr(run, side)(run.adapters[0].name)):
        with pytest.raises(EmmechError, match=r"by run\.json"):
            read()
    assert len(run.metrics)


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
