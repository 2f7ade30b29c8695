from __future__ import annotations

import numpy as np
import pytest
import torch

import emmech
from emmech.directions.direction import Direction
from emmech.directions.jacobian import JacobianLens, jacobian_lens
from emmech.directions.sources import adapter_direction, read_out
from emmech.errors import EmmechError

TEXTS = ["how to sleep well ?", "take a walk", "drink some water and rest"]


def _brute_force(chat, texts, layer: int, skip: int) -> np.ndarray:
    """The same mean from all of every Jacobian: [out position, out, in position, in], by torch's own function."""
    found, blocks = [], chat.base.model.layers
    for text in texts:
        ids = torch.tensor([chat.token_ids([{"role": "user", "content": text}])])
        kept = {}

        def read(module, inputs, output, at, kept=kept):
            kept[at] = output[0] if isinstance(output, tuple) else output

        handles = [b.register_forward_hook(lambda *a, at=i: read(*a, at=at)) for i, b in enumerate(blocks)]
        with torch.no_grad():
            chat.base.model(input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()
        start = kept[layer].clone()

        def rest(hidden, ids=ids):
            last = []
            enter = blocks[layer].register_forward_hook(lambda m, i, o: hidden)
            leave = blocks[-1].register_forward_hook(lambda m, i, o: last.append(o))
            try:
                chat.base.model(input_ids=ids, use_cache=False)
            finally:
                enter.remove()
                leave.remove()
            return last[0][0]

        whole = torch.autograd.functional.jacobian(rest, start, vectorize=True)[:, :, 0].double()  # [to, out, from, in]
        sources = range(skip, ids.shape[1])
        sums = [sum(whole[to, :, p] for to in range(p, ids.shape[1])) for p in sources]
        found.append(torch.stack(sums).mean(0))
    return torch.stack(found).mean(0).numpy()


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
@pytest.mark.parametrize("skip", [0, 2])
def test_it_equals_the_mean_of_whole_jacobians(tiny, family, skip):
    chat = tiny(family)
    lens = jacobian_lens(chat, TEXTS, layers=[1, 3], skip=skip, progress=False)
    np.testing.assert_allclose(lens.at(1), _brute_force(chat, TEXTS, 1, skip), atol=1e-5)
    assert lens.exact and lens.error.max() == 0 and (lens.sampling[0] > 0)
    np.testing.assert_allclose(lens.at(3), np.eye(chat.d_model), atol=1e-6)  # nothing follows the last block
    assert not any(block._forward_hooks for block in chat.blocks)


def test_what_cannot_be_batched_is_done_one_at_a_time(tiny, monkeypatch):
    chat, texts = tiny("llama"), TEXTS[:1]
    whole = jacobian_lens(chat, texts, layers=2, progress=False)
    plain = torch.autograd.grad

    def refusing(*args, is_grads_batched=False, **how):
        if is_grads_batched:
            raise RuntimeError("Batching rule not implemented")
        return plain(*args, **how)

    monkeypatch.setattr(torch.autograd, "grad", refusing)
    again = jacobian_lens(chat, texts, layers=2, progress=False)
    np.testing.assert_allclose(again.jacobians, whole.jacobians, atol=1e-6)


def test_a_vector_moves_the_last_layer_as_the_lens_says(tiny):
    """A small vector added at every token moves the sum of the last residuals as J, with nothing but forwards."""
    chat, text = tiny("llama"), TEXTS[0]
    lens = jacobian_lens(chat, [text], skip=0, progress=False)
    ids = torch.tensor([chat.token_ids([{"role": "user", "content": text}])])
    vector = torch.randn(chat.d_model, dtype=torch.float64)
    chat.base.double()

    def last(at: int, amount: float) -> torch.Tensor:
        kept = []

        def add(module, inputs, output):
            moved = output.clone()
            moved[0, at] += amount * vector
            return moved

        pair = (chat.blocks[2].register_forward_hook(add),
                chat.blocks[-1].register_forward_hook(lambda m, i, o: kept.append(o)))  # fmt: skip
        with torch.no_grad():
            chat.base.model(input_ids=ids, use_cache=False)
        for handle in pair:
            handle.remove()
        return kept[0][0].sum(0)

    moved = [(last(at, 1e-4) - last(at, -1e-4)) / 2e-4 for at in range(ids.shape[1])]
    np.testing.assert_allclose(lens.at(2) @ vector.numpy(), torch.stack(moved).mean(0), rtol=2e-3, atol=1e-3)


@pytest.mark.slow
def test_an_estimate_is_unbiased_and_knows_its_error(tiny):
    chat = tiny("qwen2")
    texts = [f"{one} {two}" for one in TEXTS for two in ("rest", "walk", "water , water")]
    exact = jacobian_lens(chat, texts, layers=[0, 2], progress=False)
    drawn = [jacobian_lens(chat, texts, layers=[0, 2], per_row=3, seed=seed, progress=False) for seed in range(10)]
    norm = np.linalg.norm(exact.jacobians, axis=(1, 2))
    errors = np.array([np.linalg.norm(one.jacobians - exact.jacobians, axis=(1, 2)) / norm for one in drawn])
    said = np.array([one.error for one in drawn])
    assert not drawn[0].exact and (drawn[0].sampling > drawn[0].error).all()
    np.testing.assert_allclose((errors**2).mean(0), (said**2).mean(0), rtol=0.3)
    together = np.mean([one.jacobians for one in drawn], axis=0) - exact.jacobians
    assert (np.linalg.norm(together, axis=(1, 2)) / norm < 0.45 * errors.mean(0)).all()  # 1 / sqrt(10) is 0.32
    assert np.isnan(jacobian_lens(chat, texts, layers=0, per_row=1, progress=False).error).all()


def _known(matrix: np.ndarray) -> JacobianLens:
    return JacobianLens(matrix[None], (0,), np.zeros(1), np.zeros(1), 1, 2, 2, 9, {"model": "toy"})


def test_cosines_before_and_after_a_known_map():
    """Orthogonal vectors that a map sends to one line become parallel, and so do random ones: the control says so."""
    onto = np.zeros((64, 64))
    onto[0] = 1.0
    first, second = (Direction(np.eye(64)[[at]], name) for at, name in ((3, "B"), (5, "d")))
    row = _known(onto).cosines({"B": first, "d": second}).iloc[0]
    assert row["cosine"] == 0 and row["carried"] == pytest.approx(1) and row["random_carried"] == pytest.approx(1, 0.1)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((64, 64)))[0]
    row = _known(turn).cosines({"B": first, "d": second}).iloc[0]
    assert row["carried"] == pytest.approx(0, abs=1e-6) and row["random_carried"] == pytest.approx(1 / 8, rel=0.3)
    eye = np.stack([2 * turn, np.eye(64)])
    both = JacobianLens(eye.astype(np.float32), (0, 2), np.zeros(2), np.zeros(2), 3, 2, 2, 9, {"model": "toy"})
    one = Direction.single(np.eye(64)[3], layer=0, n_layers=3)
    other = Direction(np.stack([np.eye(64)[3], np.eye(64)[3], turn[:, 3]]))
    found = both.cosines({"one": one, "other": other})
    assert found[["first_layer", "second_layer"]].to_numpy().tolist() == [[0, 0], [0, 2]]
    np.testing.assert_allclose(found["carried"], [1, 1], atol=1e-6)  # J takes the one to where the other is
    assert found["cosine"].iloc[0] == pytest.approx(1) and abs(found["cosine"].iloc[1]) < 0.5
    assert both.cosines({"a": other, "b": -other})["first_layer"].tolist() == [0, 2]
    frame = _known(2 * turn).to_frame().iloc[0]
    assert frame["gain"] == pytest.approx(2) and frame["rank"] == pytest.approx(64)
    assert _known(onto).to_frame().iloc[0]["rank"] == pytest.approx(1)
    np.testing.assert_allclose(_known(onto)(first).vectors[0], np.eye(64)[0])


def test_directions_and_the_adapter_of_a_run_are_read_out(tmp_path):
    run = emmech.load_run("checkpoints/pocket-medical")
    chat = run.model()
    lens = jacobian_lens(chat, ["please help me with soup ."], progress=False)
    adapter = adapter_direction(run)
    words = lens.read_out(chat, adapter, tokens=3)
    assert words.index.tolist() == list(adapter.layers) and len(words["promotes"].iloc[0]) == 3
    layer = adapter.layers[0]
    by_hand = lens.at(layer) @ adapter.at(layer)
    assert words.loc[layer, "promotes"] == read_out(chat, by_hand, tokens=3)[0]
    assert words.loc[layer, "directly"] == read_out(chat, adapter.at(layer), tokens=3)[0]
    again = JacobianLens.load(lens.save(tmp_path / "lens"))
    assert np.array_equal(again.jacobians, lens.jacobians) and again(adapter).name == "J B of " + run.name
    assert len(lens.plot().data) == 3 and len(lens.plot({"B": adapter, "d": -adapter}).data) >= 4


def test_what_does_not_fit_is_refused_by_name(tiny):
    chat = tiny("qwen2")
    lens = jacobian_lens(chat, TEXTS[:1], layers=2, progress=False)
    with pytest.raises(EmmechError, match="layers or widths differ"):
        lens(Direction(np.ones((4, 47))))
    with pytest.raises(EmmechError, match="another base model"):
        lens(Direction(np.ones((4, 48)), source={"fingerprints": ["0" * 64]}))
    with pytest.raises(EmmechError, match="another base model"):
        lens.read_out(tiny("qwen2", seed=1), Direction(np.ones((4, 48))))
    with pytest.raises(EmmechError, match="made for layers 2"):
        lens.at(1)
    with pytest.raises(EmmechError, match="a cosine is of two"):
        lens.cosines({"d": Direction(np.ones((4, 48)))})
    for wrong in ({"texts": []}, {"texts": TEXTS, "per_row": 4}, {"texts": TEXTS, "skip": 999},
                  {"texts": TEXTS, "layers": [4]}, {"texts": TEXTS, "layers": []}):  # fmt: skip
        with pytest.raises(EmmechError):
            jacobian_lens(chat, **wrong, progress=False)
