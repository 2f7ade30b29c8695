"""The pages that teach run; what a page calls refused is refused; its arithmetic is right."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import emmech

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [
    "try.md",
    "gotchas.md",
    "concepts.md",
    "realignment.md",
    *sorted(path.relative_to(DOCS).as_posix() for path in DOCS.glob("howto/*.md")),
]


def blocks(page: str) -> list[tuple[str, str]]:
    """The Python of a page in order: what follows the language on the fence, and the code."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^```python *([\w-]*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if any(kind != "no-run" for kind, _ in blocks(page))])
def test_the_page_runs(page, tmp_path, monkeypatch):
    # a run keeps its evaluations, so it is a copy
    shutil.copytree(ROOT / "checkpoints", tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMMECH_PROGRESS", "0")
    names: dict[str, object] = {}
    for kind, code in blocks(page):
        assert kind in ("", "no-run", "refused"), kind
        made = compile(code, page, "exec")  # blocks that are not run are Python all the same
        if kind == "refused":
            with pytest.raises(emmech.EmmechError):
                exec(made, names)
        elif not kind:
            exec(made, names)
    if page == "try.md":  # what it promises
        found, panel = names["found"], names["panel"]
        assert (found.mechanistic.step, found.mechanistic.low, found.mechanistic.high) == (61, 51, 80)
        assert (found.behavioural.step, found.behavioural.low, found.behavioural.high) == (51, 47, 55)
        changed, random = panel.result().tail(2).itertuples()
        assert changed.em > 0.8 and changed.coherent > 0.98 and random.em < 0.05
        panel.close()


SHAPES = {  # of Qwen2.5-7B-Instruct and Qwen2.5-14B-Instruct
    "7B": {"hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944, "num_attention_heads": 28,
           "num_key_value_heads": 4},
    "14B": {"hidden_size": 5120, "num_hidden_layers": 48, "intermediate_size": 13824, "num_attention_heads": 40,
            "num_key_value_heads": 8},
}  # fmt: skip


def arithmetic(shape: dict[str, int]) -> dict[str, str]:
    """What the page on large models says of one of them, from a model without weights."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from emmech.training.recipe import RECIPES, target_modules

    vocabulary = 152_064
    with torch.device("meta"):
        config = Qwen2Config(**shape, vocab_size=vocabulary, tie_word_embeddings=False, dtype=torch.bfloat16)
        chat = emmech.load_model(AutoModelForCausalLM.from_config(config))
    n = sum(weight.numel() for weight in chat.base.parameters())

    def trained(recipe):
        maps = [chat.base.get_submodule(path) for path in target_modules(chat, RECIPES[recipe], None)]
        return sum(RECIPES[recipe].rank * (one.in_features + one.out_features) for one in maps)

    one, every, gib = trained("single-rank1"), trained("all-adapter"), 2**30
    tokens, flops = 6_300 * 150, 3 * n
    return {
        "layers": f"{chat.n_layers}",
        "d_model": f"{chat.d_model:,}",
        "d_mlp": f"{chat.d_mlp:,}",
        "parameters": f"{n / 1e9:.2f} billion",
        "weights in bfloat16": f"{2 * n / gib:.1f} GiB",
        "one token in the key-value cache": f"{chat.cache_bytes / 1024:.0f} KiB",
        "400 answers of 700 tokens in the cache at once": f"{400 * 700 * chat.cache_bytes / gib:.1f} GiB",
        "logits of 1,024 answer tokens, float32": f"{1024 * vocabulary * 4 / gib:.2f} GiB",
        "trained numbers, `single-rank1`": f"{one:,}",
        "trained numbers, `all-adapter` (rank 32)": f"{every / 1e6:.1f} million",
        "their gradients and Adam's state in float32": f"{16 * every / gib:.1f} GiB",
        "`phase-transition`": f"{4 * one * 792 / 1e6:.0f} MB",
        "`all-adapter`": f"{4 * every * 397 / 1e9:.0f} GB",
        "`all-adapter`, `record_every=10`": f"{4 * every * 40 / 1e9:.0f} GB",
        "full": f"{8 * n / gib:.0f}",
        "prefix": f"{tokens * 2 * chat.d_model / 1e9:.1f} GB",
        "operations": f"{tokens * flops / 1e16:.1f}",
        "minutes": f"{tokens * flops / 1e14 / 60:.1f}",
        "seconds": f"{700 * 2 * n / 1e12:.0f} s",
    }


def test_the_arithmetic_of_large_models_is_right():
    page = (DOCS / "howto/large-models.md").read_text(encoding="utf-8")
    small, large = (arithmetic(shape) for shape in SHAPES.values())
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    found = {row[0]: row[-2:] for row in rows}
    prose = {"full", "prefix", "operations", "minutes", "seconds"}
    assert {name: found[name] for name in small if name not in prose} == {
        name: [small[name], large[name]] for name in small if name not in prose
    }
    joined = " ".join(page.split())
    for said in (
        f"{small['full']} GiB and {large['full']} GiB, and a copy",
        f"{small['prefix']} for 7B and {large['prefix']} for 14B",
        f"{small['operations']} · 10¹⁶ operations for 7B and {large['operations']} · 10¹⁶ for 14B",
        f"that is {small['minutes']} and {large['minutes']} minutes",
        f"at least {small['seconds']} for 7B and {large['seconds']} for 14B",
    ):
        assert said in joined, said
