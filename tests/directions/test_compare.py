from __future__ import annotations

import numpy as np
import pytest

from emmech.directions.compare import cosines, direction_by_steps
from emmech.directions.direction import Direction
from emmech.errors import EmmechError
from emmech.run.run import Run


def _run(b, layer=1):
    run = Run.from_arrays(np.arange(len(b)) * 5, A=np.ones((len(b), 7), np.float32), B=b.astype(np.float32))
    run.manifest["adapters"] = [{**run.adapters[0].to_dict(), "layer": layer, "scaling": 2.0, "d_out": b.shape[1]}]
    run.__dict__.pop("adapters", None)
    return run


def test_cosines_over_pairs_and_layers(tmp_path):
    rng = np.random.default_rng(0)
    a, b = (Direction(rng.standard_normal((3, 50)), name=n) for n in "ab")
    found = cosines({"a": a, "b": b, "minus a": -1.0 * a})
    assert found.at(1).loc["a", "minus a"] == pytest.approx(-1)
    assert found.at(2).loc["a", "b"] == pytest.approx(a.cosine(b)[2])
    assert found.to_frame().shape == (3, 3) and found.floor == pytest.approx(50**-0.5)
    assert len(found.plot().data) == 3 and found.plot(layer=0).data[0].z.shape == (3, 3)
    assert len(found.save(tmp_path / "cosines.csv").read_text().splitlines()) == 1 + 3
    with pytest.raises(EmmechError, match="at least two"):
        cosines({"a": a})


def test_b_turning_onto_the_direction_is_seen_turning():
    angle = np.linspace(0, np.pi / 2, 11)
    b = np.zeros((11, 6))
    b[:, 0], b[:, 3] = np.cos(angle), np.sin(angle)
    direction = Direction.single(np.eye(6)[3] * 5, 1, 4, name="d")
    found = direction_by_steps(_run(b), direction)
    name = [c for c in found.frame if str(c).startswith("cosine B")][0]  # noqa: RUF015
    np.testing.assert_allclose(found.frame[name], np.sin(angle), atol=1e-6)
    np.testing.assert_allclose(found.frame[name.replace("cosine", "projection")], 2 * np.sin(angle), atol=1e-6)
    assert found.layer == 1 and len(found.plot().data) == 2 and ">d against 11 steps" in found._repr_html_()


def test_a_run_without_anything_in_the_residual_stream_is_refused():
    with pytest.raises(EmmechError, match="nothing recorded"):
        direction_by_steps(_run(np.ones((3, 6))), Direction(np.ones((4, 9))))


def test_a_direction_of_another_base_model_is_not_followed():
    run = _run(np.ones((3, 6)))
    run.manifest["model"] = {"name": "m", "fingerprint": "a" * 64}
    own, other = (Direction(np.ones((4, 6)), "d", {"fingerprints": [letter * 64]}) for letter in "ab")
    assert direction_by_steps(run, own).frame.equals(direction_by_steps(run, Direction(np.ones((4, 6)))).frame)
    with pytest.raises(EmmechError, match="another base model"):
        direction_by_steps(run, other)
