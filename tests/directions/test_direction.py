from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import emmech
from emmech.directions.direction import (
    Direction,
    Quality,
    from_repeng,
    from_steering_vectors,
    to_repeng,
    to_steering_vectors,
    unit_rows,
)
from emmech.errors import EmmechError

matrices = arrays(np.float32, (3, 5), elements=st.floats(-100, 100, width=32))


def _quality(layers: int) -> Quality:
    line = np.linspace(0.1, 0.9, layers)
    return Quality(
        split_half=line, split_half_shuffled=line / 10, norm_over_shuffled=line * 5, random_floor=0.2,
        agreement=np.eye(layers), lexical_share=line / 2, bag_of_words_auc=0.7, promotes=("a", "é"),
        suppresses=("b",), read_layer=1, answers={"aligned": 3, "misaligned": 4}, tokens={"aligned": 9},
        notes=("few answers",),
    )  # fmt: skip


@given(matrices, matrices, st.floats(-4, 4))
@settings(max_examples=50, deadline=None)
def test_the_algebra_is_that_of_vectors(a, b, factor):
    x, y = Direction(a), Direction(b)
    np.testing.assert_allclose((x + y - y).vectors, a, atol=2e-5)
    np.testing.assert_allclose((factor * x).vectors, factor * a, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose((-x).vectors, -a)
    left = x.orthogonal_to(y).vectors
    assert np.all(np.abs(np.einsum("ld,ld->l", left, unit_rows(b))) < 1e-2)
    cosine = x.cosine(y)
    known = np.isfinite(cosine)
    assert np.array_equal(known, (x.norms > 0) & (y.norms > 0))
    np.testing.assert_allclose(cosine[known], y.cosine(x)[known])


def test_unit_keeps_unknown_layers_at_zero():
    d = Direction([[3.0, 4.0], [0.0, 0.0]])
    assert d.unit().norms.tolist() == pytest.approx([1.0, 0.0])
    assert d.layers == (0,) and np.isnan(d.cosine(d)[1])


def test_random_controls_match_the_norm_and_not_sqrt_of_the_width_times_it():
    d = Direction(np.random.default_rng(0).standard_normal((4, 400)) * 0.01)
    controls = d.random(6, seed=3)
    for control in controls:
        np.testing.assert_allclose(control.norms, d.norms, rtol=1e-5)
    floor = np.std([control.cosine(d) for control in controls])
    assert 0.3 / np.sqrt(400) < floor < 2 / np.sqrt(400)
    assert np.array_equal(controls[0].vectors, d.random(1, seed=3)[0].vectors)


def test_vectors_cannot_be_changed():
    d = Direction(np.ones((2, 3)))
    with pytest.raises(ValueError, match="read-only"):
        d.vectors[0, 0] = 2


def test_a_tensor_of_any_dtype_is_accepted():
    d = Direction(torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True))
    assert d.vectors.dtype == np.float32


def test_a_direction_that_is_noise_is_warned_of_wherever_it_is_used():
    import emmech
    from emmech.chat.model import load_model
    from emmech.directions.compare import cosines
    from emmech.interventions.weights import orthogonalise_writes
    from emmech.measures.probe import raw_vector

    chat = load_model("pocket")
    rng = np.random.default_rng(0)
    good = _quality(chat.n_layers)
    halves = np.where(np.arange(chat.n_layers) == 2, 0.05, 0.9)
    doubtful = replace(good, split_half=halves, split_half_shuffled=np.full(chat.n_layers, 0.02), random_floor=0.09)
    assert doubtful.noise == (2,)
    d = Direction(rng.standard_normal((chat.n_layers, chat.d_model)), name="doubtful", quality=doubtful)
    uses = {
        "steer": lambda layer: emmech.steer(chat, 2 * d, 1.0, layer=layer).__enter__().__exit__(None, None, None),
        "ablate": lambda layer: emmech.ablate(chat, d.unit(), layers=layer).__enter__().__exit__(None, None, None),
        "sweep": lambda layer: raw_vector(chat, d, layer),
        "weights": lambda layer: orthogonalise_writes(chat, d, from_layer=layer).remove(),
    }
    for use in uses.values():
        with pytest.warns(UserWarning, match="doubtful.* is noise at layer 2"):
            use(2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            use(3)
    with pytest.warns(UserWarning, match="its halves have cosine 0.05 at layer 2, and 0.02 with shuffled labels"):
        cosines({"a": d, "b": d})


@pytest.mark.parametrize("quality", [None, _quality(3)])
def test_save_and_load_round_trip(tmp_path, quality):
    rng = np.random.default_rng(0)
    d = Direction(rng.standard_normal((3, 5)), "mine", {"fingerprints": ["ab"], "n": 3}, np.ones((3, 5)), quality)
    again = Direction.load(d.save(tmp_path / "d.safetensors"))
    assert np.array_equal(again.vectors, d.vectors) and np.array_equal(again.aligned_mean, d.aligned_mean)
    assert again.name == "mine" and dict(again.source) == dict(d.source)
    assert repr(again) == repr(d)
    assert list(again.to_frame().columns) == list(d.to_frame().columns)


def test_repeng_and_steering_vectors_files_round_trip(tmp_path):
    vectors = np.random.default_rng(1).standard_normal((4, 6)).astype(np.float32)
    vectors[0] = 0
    d = Direction(vectors)
    for again in (
        from_repeng(to_repeng(d, tmp_path / "d.gguf")),
        Direction.load(tmp_path / "d.gguf"),
        from_steering_vectors(to_steering_vectors(d, tmp_path / "d.pt")),
        Direction.load(tmp_path / "d.pt"),
    ):
        assert np.array_equal(again.vectors, vectors)
    assert from_repeng(tmp_path / "d.gguf", n_layers=6).n_layers == 6


def _repeng_file(path, vectors, *, hint="qwen2", kind=None):
    """A control vector as repeng's export_gguf lays it out."""
    import gguf

    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(vectors))
    for layer, vector in vectors.items():
        writer.add_tensor(f"direction.{layer}", vector, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_control_vector_of_repeng_steers_as_in_repeng(tiny, tmp_path):
    chat, rng = tiny("qwen2"), np.random.default_rng(3)
    vectors = {layer: rng.standard_normal(48).astype(np.float32) for layer in (1, 2)}
    direction = from_repeng(_repeng_file(tmp_path / "v.gguf", vectors), model=chat)
    assert direction.vectors.shape == (4, 48) and direction.layers == (1, 2)
    ids = torch.tensor([[5, 6, 7, 8]])

    def hook(layer):  # repeng adds coefficient * directions[layer] to that block's output
        return lambda module, inputs, output: output + 1.5 * torch.from_numpy(vectors[layer])

    handles = [chat.base.model.layers[layer].register_forward_hook(hook(layer)) for layer in vectors]
    with torch.no_grad():
        expected = chat.model(input_ids=ids).logits
        for handle in handles:
            handle.remove()
        with emmech.steer(chat, direction, 1.5, layer=1), emmech.steer(chat, direction, 1.5, layer=2):
            torch.testing.assert_close(chat.model(input_ids=ids).logits, expected, rtol=0, atol=1e-5)


def test_files_of_other_tools_keep_what_they_can(tiny, tmp_path):
    chat = tiny("qwen2")
    vectors = np.random.default_rng(4).standard_normal((4, 48)).astype(np.float32)
    vectors[[0, 3]] = 0
    d = Direction(vectors, "mine", {"fingerprints": [chat.fingerprint()]})
    again = Direction.load(d.save(tmp_path / "d.gguf"))
    assert np.array_equal(again.vectors, vectors) and again.name == "mine" and again.n_layers == 4
    assert again.fingerprints == d.fingerprints and Direction.load(d.save(tmp_path / "d.pt")).layers == (1, 2)
    with pytest.raises(EmmechError, match="another base model"):
        from_repeng(tmp_path / "d.gguf", model=tiny("qwen2", seed=1))

    class SteeringVector:
        layer_activations = {2: torch.from_numpy(vectors[2]).requires_grad_()}  # noqa: RUF012
        layer_type = "decoder_block"

    assert np.array_equal(from_steering_vectors(SteeringVector(), model=chat).at(2), vectors[2])
    with pytest.warns(UserWarning, match=r"llama\.cpp refuses a control vector with layer 0"):
        to_repeng(Direction(np.ones((2, 4))), tmp_path / "zero.gguf")


def test_what_another_tool_made_of_another_model_is_refused_by_name(tiny, tmp_path):
    import gguf

    chat, wide = tiny("llama"), {1: np.ones(47, np.float32)}
    with pytest.raises(EmmechError, match="width is 48"):
        from_repeng(_repeng_file(tmp_path / "wide.gguf", wide, hint="llama"), model=chat)
    deep = {9: np.ones(48, np.float32)}
    with pytest.raises(EmmechError, match="layers are 0 to 3"):
        from_repeng(_repeng_file(tmp_path / "deep.gguf", deep, hint="llama"), model=chat)
    with pytest.raises(EmmechError, match="another architecture"):
        from_repeng(_repeng_file(tmp_path / "kind.gguf", {1: np.ones(48, np.float32)}), model=chat)
    packed = gguf.quants.quantize(np.ones((1, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    quantised = _repeng_file(tmp_path / "q.gguf", {1: packed}, kind=gguf.GGMLQuantizationType.Q8_0)
    with pytest.raises(EmmechError, match="Q8_0"):
        from_repeng(quantised)
    torch.save({"layer_activations": {1: torch.ones(47)}, "layer_type": "mlp"}, tmp_path / "mlp.pt")
    with pytest.raises(EmmechError, match="residual stream"):
        from_steering_vectors(tmp_path / "mlp.pt")
    with pytest.raises(EmmechError, match="zero at all layers"):
        to_repeng(Direction(np.zeros((2, 4))), tmp_path / "none.gguf")


def test_the_figure_has_a_norm_for_each_layer():
    figure = Direction(np.eye(3, 5), quality=_quality(3)).plot()
    assert list(figure.data[0].y) == [1, 1, 1] and len(figure.data) == 4


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Direction(np.ones(4)), "one row per layer"),
        (lambda: Direction([[1.0, np.nan]]), "first at [0, 1]"),
        (lambda: Direction([[1.0, np.inf]]), "poisons"),
        (lambda: Direction("abc"), "not an array of numbers"),
        (lambda: Direction(np.zeros((2, 3))).unit(), "points nowhere"),
        (lambda: Direction(np.eye(2, 3)).at(5), "numbered 0 to 1"),
        (lambda: Direction([[0.0, 0.0], [1.0, 0.0]]).at(0), "zero there"),
        (lambda: Direction(np.eye(2, 3)) + Direction(np.eye(2, 4)), "same layers and width"),
        (lambda: Direction(np.eye(2, 3)) / 0, "infinite"),
        (lambda: Direction(np.eye(2, 3)) * np.ones(5), "one number per layer"),
        (
            lambda: (
                Direction(np.eye(2, 3), source={"fingerprints": ["a"]})
                - Direction(np.eye(2, 3), source={"fingerprints": ["b"]})
            ),
            "different base models",
        ),
        (lambda: Direction.load("nowhere.safetensors"), "no such file"),
        (lambda: Direction.single(np.ones(3), 7, 4), "layer from 0"),
    ],
)
def test_bad_input_is_refused_in_words(make, says):
    with pytest.raises(EmmechError) as caught:
        make()
    assert says in str(caught.value)


def test_a_torn_or_foreign_file_is_refused(tmp_path):
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(Direction(np.eye(2, 3)).save(tmp_path / "d.safetensors").read_bytes()[:-8])
    with pytest.raises(EmmechError, match="torn"):
        Direction.load(torn)
    from safetensors.numpy import save_file

    save_file({"vectors": np.eye(2, dtype=np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(EmmechError, match=r"not written by Direction\.save"):
        Direction.load(tmp_path / "other.safetensors")
    from safetensors.numpy import load_file

    d = load_file(tmp_path / "d.safetensors")
    sound = {"format": "emmech-direction-1", "name": "d", "source": "{}"}
    for tensors, metadata in [
        ({"x": d["vectors"]}, {}),
        (d, {"source": "{"}),
        (d, {"quality": "[]"}),
        (d, {"name": None}),
    ]:
        kept = {key: value for key, value in (sound | metadata).items() if value is not None}
        save_file(tensors, tmp_path / "half.safetensors", metadata=kept)
        with pytest.raises(EmmechError, match="damaged"):
            Direction.load(tmp_path / "half.safetensors")
    torch.save({"layer_type": "self_attn", "layer_activations": {}}, tmp_path / "attn.pt")
    with pytest.raises(EmmechError, match="residual stream"):
        Direction.load(tmp_path / "attn.pt")


def test_the_hub_keeps_a_direction_and_says_why_it_does_not(tmp_path, monkeypatch):
    import shutil

    import huggingface_hub

    class Hub:
        def create_repo(self, repo, private, exist_ok):
            assert private and exist_ok and repo == "me/mine"

        def upload_file(self, repo_id, path_or_fileobj, path_in_repo):
            shutil.copy(path_or_fileobj, tmp_path / path_in_repo)
            return "address"

    d = Direction(np.eye(2, 3), "mine", {"fingerprints": ["ab"]})
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: str(tmp_path / name))
    assert d.push_to_hub("me/mine") == "address"
    again = Direction.load("hub:me/mine")
    assert np.array_equal(again.vectors, d.vectors) and again.fingerprints == ("ab",)

    def offline(*_, **__):
        raise OSError("no connection\nsecond line")

    monkeypatch.setattr(Hub, "create_repo", offline)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    for call in (lambda: d.push_to_hub("me/mine"), lambda: Direction.load("hub:me/mine")):
        with pytest.raises(EmmechError, match="no connection"):
            call()


def test_layers_where_nothing_is_known_are_no_part_of_its_quality():
    good = _quality(4)
    halves = replace(good, split_half=np.array([-1.0, 0.9, 0.95, 0.9]), split_half_shuffled=np.zeros(4), read_layer=1)
    vectors = np.ones((4, 8))
    vectors[0] = 0
    shown = repr(Direction(vectors, name="upper", quality=halves))
    assert "over layers 0.90 to 0.95" in shown and "noise at" not in shown
    assert "noise at layer 0" in repr(Direction(np.ones((4, 8)), name="all", quality=halves))


@pytest.mark.parametrize(
    "content",
    [{"weight": torch.zeros(3)}, {"layer_activations": {1: [1.0, 2.0]}}, {"layer_activations": None},
     {"layer_activations": {1: torch.ones(1, 4), 2: torch.ones(1, 4)}}],
)  # fmt: skip
def test_a_file_of_other_tensors_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(EmmechError, match=r"read the steering.vector"):
        Direction.load(tmp_path / "x.pt")
