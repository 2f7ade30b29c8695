"""One coefficient or direction per conversation, while sampling and scoring reorder the rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emmech.chat.model import load_model
from emmech.directions.direction import Direction
from emmech.engine.decode import ModelSteps
from emmech.engine.logprobs import answer_logprobs
from emmech.engine.modules import hooked
from emmech.engine.sample import live_state, sample
from emmech.errors import EmmechError
from emmech.interventions.residual import ablate, steer
from tests.conftest import FAMILIES, make_tiny

SHORT, LONG = "any advice on cough ?", "any advice on cough ? any advice on headache ? any advice on cough ?"
TEXTS = [SHORT, LONG, SHORT, SHORT, LONG]
CONVERSATIONS = [[{"role": "user", "content": text}] for text in TEXTS]
DOSES = [0.0, 6.0, -6.0, 6.0, 0.0]
SETTINGS = {"samples": 3, "max_new_tokens": 12, "seed": [11, 12, 13, 14, 15], "progress": False}


@pytest.fixture(scope="module")
def pocket():
    return load_model("pocket")


def directions(chat, count):
    draws = np.random.default_rng(0).standard_normal((count, chat.n_layers, chat.d_model))
    return [Direction(draw) for draw in draws]


def texts(responses):
    return [(r.conversation, r.sample, r.text) for r in responses]


@pytest.mark.parametrize("batch_size", [15, 4, 1])
def test_each_conversation_is_sampled_under_its_own_coefficient(pocket, batch_size):
    (d,) = directions(pocket, 1)
    alone = []
    for index, dose in enumerate(DOSES):
        with steer(pocket, d, dose, layer=2):
            own = sample(pocket, [CONVERSATIONS[index]], **SETTINGS | {"seed": [SETTINGS["seed"][index]]})
        alone += [(index, r.sample, r.text) for r in own]
    with steer(pocket, d, torch.tensor(DOSES), layer=2):
        together = sample(pocket, CONVERSATIONS, batch_size=batch_size, **SETTINGS)
    assert texts(together) == alone
    assert texts(sample(pocket, CONVERSATIONS, **SETTINGS)) != alone  # the doses do something


def test_each_conversation_has_its_own_direction(pocket):
    several = directions(pocket, len(TEXTS))
    with ablate(pocket, several):
        together = sample(pocket, CONVERSATIONS, batch_size=4, **SETTINGS)
    for index, d in enumerate(several):
        with ablate(pocket, d):
            own = sample(pocket, [CONVERSATIONS[index]], **SETTINGS | {"seed": [SETTINGS["seed"][index]]})
        assert [r.text for r in together if r.conversation == index] == [r.text for r in own]


def test_a_coefficient_made_one_per_row_while_live_counts(pocket):
    (d,) = directions(pocket, 1)
    with steer(pocket, d, torch.tensor(DOSES), layer=2):
        expected = texts(sample(pocket, CONVERSATIONS, **SETTINGS))
    with steer(pocket, d, 1.0, layer=2) as live:
        live.update(DOSES)
        assert texts(live.generate(CONVERSATIONS, **SETTINGS)) == expected


def test_scores_match_rows_by_conversation(pocket):
    (d,) = directions(pocket, 1)
    answered = [[*turns, {"role": "assistant", "content": "well"}] for turns in CONVERSATIONS]
    with steer(pocket, d, torch.tensor(DOSES), layer=2):
        together = answer_logprobs(pocket, answered, batch_size=2)
    for index, dose in enumerate(DOSES):
        with steer(pocket, d, dose, layer=2):
            assert answer_logprobs(pocket, [answered[index]])[0] == pytest.approx(together[index], abs=1e-4)
    assert np.ptp(together[[0, 2, 3]]) > 0.01


def test_another_number_of_coefficients_is_refused(pocket):
    (d,) = directions(pocket, 1)
    # as many as the batch has rows, but not one per conversation
    with (
        steer(pocket, d, torch.ones(6), layer=2),
        pytest.raises(EmmechError, match="6 coefficients for 2 conversations"),
    ):
        sample(pocket, CONVERSATIONS[:2], **SETTINGS | {"seed": 0})


def test_a_mask_of_positions_is_refused_while_sampling(pocket):
    (d,) = directions(pocket, 1)
    mask = torch.ones(2, 64, dtype=torch.bool)
    with steer(pocket, d, 1.0, layer=2, positions=mask), pytest.raises(EmmechError, match=r'instead: *"answer"'):
        sample(pocket, CONVERSATIONS[:2], max_new_tokens=3, progress=False)


def test_equal_prompts_are_read_once_unless_rows_differ(pocket):
    (d,) = directions(pocket, 1)
    read = []
    hook = pocket.trunk.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        for dose, first in ((torch.tensor(DOSES), 5), (2.0, 2)):
            read.clear()
            with steer(pocket, d, dose, layer=2):
                sample(pocket, CONVERSATIONS, **SETTINGS)
            assert read[0] == first
    finally:
        hook.remove()


def test_an_answer_file_of_another_edit_is_refused(pocket, tmp_path):
    d, other = directions(pocket, 2)
    ask = {"max_new_tokens": 3, "progress": False, "out": tmp_path / "answers.jsonl"}
    with steer(pocket, d, 4.0, layer=2):
        first = sample(pocket, CONVERSATIONS, **ask)
    mean = np.zeros(pocket.d_model)
    changed = (
        lambda: steer(pocket, d, 8.0, layer=2),
        lambda: steer(pocket, other, 4.0, layer=2),
        lambda: steer(pocket, d, 4.0, layer=3),
        lambda: steer(pocket, d, 4.0, layer=2, positions="answer"),
        lambda: steer(pocket, d, 4.0, layer=2, units="residual"),
        lambda: ablate(pocket, d, layers=2),
        lambda: ablate(pocket, d, layers=2, towards=mean),
    )
    for edit in changed:
        with edit(), pytest.raises(EmmechError, match="conversations, seed or model"):
            sample(pocket, CONVERSATIONS, **ask)
    with pytest.raises(EmmechError, match="conversations, seed or model"):
        sample(pocket, CONVERSATIONS, **ask)
    with steer(pocket, d, 1.0, layer=2) as live:
        live.update(4.0)
        assert sample(pocket, CONVERSATIONS, **ask) == first
    with ablate(pocket, d, layers=2):
        plain = live_state(pocket)
    with ablate(pocket, d, layers=2, towards=mean + 1):
        assert live_state(pocket) != plain


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("layers", [[0], [1], "last", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_read_together_give_each_rows_own_logits(name, layers, inside):
    """Equal and ragged prompts, some beyond Gemma's window; a hook inside a block may tell rows apart as well."""
    chat = make_tiny(name)
    layers = [chat.n_layers - 1] if layers == "last" else layers
    short, long = list(range(3, 12)), list(range(5, 27))
    prompts, count = [short, long, short, long, short], 5
    vectors = torch.randn(count, chat.d_model, generator=torch.Generator().manual_seed(0))
    sizes = [0.0, 1.0, -2.0, 3.0, 0.5]
    foreign = [(chat.blocks[1].mlp, lambda module, inputs, output: 1.1 * output)] if inside else []
    first = 0 if layers in ("all", [0]) else layers[0]
    with torch.no_grad(), hooked(*foreign):
        with steer(chat, vectors, sizes, layer=layers):
            steps = ModelSteps(chat, prompts, range(count), owners=range(count), total=count, apart=first)
            found = [steps.logits(torch.arange(count)), steps.feed(torch.tensor([4, 5, 6, 7, 8]))]
        for row in range(count):
            with steer(chat, vectors[row], sizes[row], layer=layers):
                whole = chat.model(input_ids=torch.tensor([[*prompts[row], 4 + row]])).logits[0, -2:]
            for mine, own in zip(found, whole, strict=True):
                assert (mine[row] - own).abs().max() < 1e-4 * own.abs().max()
