"""A study on a Ray cluster of two nodes, of which one dies."""

from __future__ import annotations

import importlib.util
import json
import os
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import emmech
from emmech import EmmechError
from emmech.studies.study import journal

RAY = importlib.util.find_spec("ray") is not None


@pytest.mark.skipif(RAY, reason="Ray is installed")
def test_without_ray_a_cluster_is_refused_by_name(tmp_path):
    spec = {"models": "pocket", "data": "medical"}
    with pytest.raises(EmmechError, match="Ray is not installed"):
        emmech.study(spec, out=tmp_path / "study", cluster="local", progress=False)


@pytest.fixture
def cluster(monkeypatch):
    if not RAY:
        pytest.skip('Ray is not installed: pip install "emmech[ray]"')
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))
    for name, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("RAY_raylet_start_wait_time_s", "300")):
        monkeypatch.setenv(name, value)
    import ray
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield started
    ray.shutdown()
    started.shutdown()


@pytest.mark.slow
def test_a_node_that_dies_loses_nothing_and_nothing_is_done_twice(cluster, tmp_path):
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    rows = emmech.organism.data("medical", n=60)
    data, out = tmp_path / "few.jsonl", tmp_path / "study"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"max_steps": 60, "margins": {}, "batch_size": 1, "accumulation": 1, "checkpoint_every": 5}
    spec = {"models": "pocket", "data": str(data), "seeds": [0, 1, 2, 3], "train": options, "evaluate": {"samples": 1}}
    found: list = []
    done = threading.Thread(
        target=lambda: found.append(emmech.study(spec, out=out, cluster=cluster.address, progress=False))
    )
    done.start()

    def begun() -> list[dict]:
        return journal(out) if (out / "study.json").is_file() else []

    until = time.monotonic() + 400
    while time.monotonic() < until:  # both nodes have work, and some of it is done
        now = begun()
        ended = {row["digest"] for row in now if row["event"] == "ended"}
        open_ = [row for row in now if row["event"] == "began" and row["digest"] not in ended
                 and row["place"] == second.node_id]  # fmt: skip
        if ended and open_:
            break
        time.sleep(0.2)
    else:
        pytest.fail(f"the second node never had work: {begun()}")
    cluster.remove_node(second, allow_graceful=False)
    done.join(timeout=400)
    assert not done.is_alive() and len(found) == 1
    (table,) = found
    assert table.meta["done"] == table.meta["pieces"] == 8 and (table.frame["status"] == "done").all()
    ended = Counter(row["digest"] for row in journal(out) if row["event"] == "ended")
    assert len(ended) == 8 and set(ended.values()) == {1}  # nothing is lost, and nothing done twice
    began = Counter(row["digest"] for row in journal(out) if row["event"] == "began")
    assert all(count == 1 for digest, count in began.items() if digest not in {row["digest"] for row in open_})
    for folder in table.frame["run"]:
        run = emmech.load_run(out / folder)
        assert run.manifest["status"] == "complete" and len(run.steps) == 61 and not run.damaged
    again = emmech.study(spec, out=out, progress=False)
    assert again.frame.equals(table.frame)
