"""``make bench-gpu`` at a tiny size on the processor, so that it runs at the first try on a card."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks import gpu


@pytest.mark.slow
def test_the_table_is_made_at_a_tiny_size(tmp_path, capsys):
    rows = gpu.main(["--shape", "tiny", "--device", "cpu", "--repeats", "1", "--out", str(tmp_path)])
    assert len(rows) >= 4 and all(row.ratio > 0 and "GFLOP" in row.bound and row.equality for row in rows)
    assert len(json.loads((tmp_path / "benchmarks-gpu.json").read_text())) == len(rows)
    page = (tmp_path / "benchmarks-gpu.md").read_text()
    assert all(row.work in page for row in rows) and "GFLOP/s" in capsys.readouterr().out


def test_the_large_shape_is_that_of_the_published_configuration():
    config = gpu.QWEN14.config
    maps = config["hidden_size"] * (config["hidden_size"] * 2 + 2 * 1024 + 3 * config["intermediate_size"])
    weights = config["num_hidden_layers"] * maps + 2 * config["vocab_size"] * config["hidden_size"]
    assert weights == pytest.approx(14.77e9, rel=0.01)


def test_without_a_card_the_command_says_what_runs(capsys):
    if gpu.torch.cuda.is_available():
        pytest.skip("there is a card here")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--shape tiny --device cpu" in capsys.readouterr().err
