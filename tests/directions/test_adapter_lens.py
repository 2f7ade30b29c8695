from __future__ import annotations

import numpy as np
import pytest
import torch

from emmech.chat.encode import encode
from emmech.chat.model import load_model
from emmech.directions.adapter_lens import adapter_lens, token_significance
from emmech.engine.adapters import adapter_layers
from emmech.errors import EmmechError


def _adapted(chat, layers=(1, 2), rank=1):
    from peft import LoraConfig, get_peft_model

    modules = [f"model.layers.{layer}.mlp.down_proj" for layer in layers]
    config = LoraConfig(r=rank, lora_alpha=4, use_rslora=True, target_modules=modules, task_type="CAUSAL_LM")
    model = get_peft_model(chat.model, config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".lora_" in name:  # PEFT draws A from the process's own generator, which is wherever it is
                value.copy_(0.4 * torch.randn(value.shape, generator=generator))
    return load_model(model, chat.tokenizer)


def test_scalars_are_a_times_the_input_of_down_proj(any_tiny, rows, tmp_path):
    chat = _adapted(any_tiny)
    talks = [row["messages"] for row in rows[:5]]
    found = adapter_lens(chat, talks, batch_size=3)
    for index, talk in enumerate(talks):
        ids = torch.tensor(encode([talk], chat.tokenizer).input_ids)
        for column, (_, layer, name) in enumerate(adapter_layers(chat.model)):
            seen = []
            hook = layer.register_forward_pre_hook(lambda m, x, seen=seen: seen.append(x[0]))
            with torch.no_grad():
                chat.model(input_ids=ids)
            hook.remove()
            expected = (seen[0] @ layer.lora_A[name].weight[0])[0].detach().numpy()
            np.testing.assert_allclose(found.values[found.text == index, column], expected, atol=1e-5)
    assert found.answer.any() and not found.answer.all()
    assert found.to_frame().shape == (len(found.tokens), 5)
    assert len(found.save(tmp_path / "lens.csv").read_text().splitlines()) > len(found.tokens)
    assert len(found.top_tokens(0)) > 2
    assert "<script" not in found.heatmap() and found.heatmap().count("<span") == (found.text == 0).sum()


def test_heatmaps_escape_what_a_text_says(tiny):
    chat = _adapted(tiny("qwen2"))
    html = adapter_lens(chat, ["<b>bold</b> & so on"]).heatmap()
    assert "<b>" not in html and "&lt;" in html and "&amp;" in html


def test_the_probe_is_scored_on_texts_it_has_not_seen(tiny):
    chat = _adapted(tiny("qwen2"))
    words = ["sleep", "walk", "water", "rest", "drink", "well"]
    talks, labels = [], []
    for index in range(40):
        word = "drink drink" if index % 2 else "rest rest"
        talks.append([{"role": "user", "content": words[index % 6]}, {"role": "assistant", "content": word}])
        labels.append(bool(index % 2))
    found = adapter_lens(chat, talks)
    table = found.probe(labels)
    assert table["adapter"].tolist()[-1] == "all together" and table["auc"].max() > 0.9
    with pytest.raises(EmmechError, match="of both classes"):
        found.probe([True] * 40)


def test_significance_is_the_derivative_of_the_kl_by_finite_differences(tiny, rows):
    chat = _adapted(tiny("qwen2"))
    chat.base.double()
    talk = rows[0]["messages"]
    found = token_significance(chat, talk)
    ids = torch.tensor([chat.token_ids(talk, generate=False)])
    answer = torch.tensor(found["answer"].to_numpy())[1:]

    def kl(column, token, factor):
        layer, name = [(layer, n) for _, layer, n in adapter_layers(chat.model)][column]
        scales = torch.ones(1, ids.shape[1], 1)
        scales[0, token] = factor
        hook = layer.lora_A[name].register_forward_hook(lambda m, i, out: out * scales)
        with torch.no_grad():
            tuned = chat.base(input_ids=ids).logits[0, :-1][answer].log_softmax(-1)
        hook.remove()
        with torch.no_grad(), chat.model.disable_adapter():
            base = chat.base(input_ids=ids).logits[0, :-1][answer].log_softmax(-1)
        return float((tuned.exp() * (tuned - base)).sum())

    assert found.attrs["kl"] == pytest.approx(kl(0, 0, 1.0), rel=1e-3)
    for column, token in ((0, 4), (1, len(found) - 3), (0, len(found) - 4)):
        slope = (kl(column, token, 1.05) - kl(column, token, 0.95)) / 0.1
        assert found.iloc[token, 2 + column] == pytest.approx(slope, rel=0.05, abs=2e-5)


def test_what_has_no_scalar_is_refused(tiny):
    with pytest.raises(EmmechError, match="one scalar per token"):
        adapter_lens(_adapted(tiny("qwen2"), rank=2), ["hello"])
    with pytest.raises(EmmechError, match="one scalar per token"):
        adapter_lens(tiny("qwen2"), ["hello"])
    with pytest.raises(EmmechError, match="at least one"):
        adapter_lens(_adapted(tiny("qwen2")), [])
    with pytest.raises(EmmechError, match="no adapter"):
        token_significance(tiny("qwen2"), "hello")
