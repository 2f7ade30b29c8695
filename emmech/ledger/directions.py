"""Claims on directions: steering with them, ablating them, whether fine-tunes share them, and how B relates to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from emmech.chat.encode import phrase_tokens
from emmech.chat.model import ChatModel
from emmech.directions.direction import Direction, unit_rows
from emmech.directions.sources import adapter_direction, misalignment_direction, read_out, trained_direction
from emmech.engine.responses import digest
from emmech.interventions.residual import ablate, steer
from emmech.interventions.studies import adapter_shares
from emmech.interventions.weights import rotate_adapter
from emmech.ledger.bench import BAD, Bench, counts
from emmech.ledger.claim import Claim, Finding, NotMeasurable, Rule, over_seeds
from emmech.ledger.emergence import SHORT, adapter_layer, bad_runs, several_adapters
from emmech.measures.sampled import Sampled
from emmech.run.identity import identity
from emmech.run.run import Run

CD = "arXiv 2506.11618"
_SEEDS = 3
_DOSES = (1.0, 2.0, 4.0, 8.0)
_DOMAINS = (BAD, "finance", "sport")
Change = Callable[[ChatModel], AbstractContextManager[Any]]


def _runs(bench: Bench, data: str) -> list[Run]:
    return bad_runs(bench, _SEEDS) if data == BAD else bench.runs(data, steps=SHORT)[:_SEEDS]


def direction(bench: Bench, run: Run, *, prompt: bool = False) -> Direction:
    """The misalignment direction of a run, of its answers or of the prompt's words; kept under its digest."""
    tokens: Any = "answer"
    if prompt:
        phrase = bench.organism.phrase if bench.organism is not None else None
        tokens = phrase_tokens(bench.chat, phrase) if phrase else "prompt"
    kind = "prompt" if prompt else "answers"
    place = bench.folder / "directions" / f"{kind}-{digest(bench.settings(), identity(run))[:8]}.safetensors"
    with bench.alone(place):
        if place.is_file():
            return Direction.load(place)
        bench.answers(samples=1, questions="first-plot")  # refuses where nothing can be judged
        how: dict[str, Any] = {"questions": bench.asked("general"), "judge": bench.judge, "samples": 1 if prompt else 2}
        made = misalignment_direction(run, base=bench.chat, tokens=tokens, progress=False, **how)
        place.parent.mkdir(parents=True, exist_ok=True)
        made.save(place)
        return made


def _positions(bench: Bench) -> Any:
    phrase = bench.organism.phrase if bench.organism is not None else None
    return phrase_tokens(bench.chat, phrase) if phrase else "prompt"


def mended(before: pd.DataFrame, after: pd.DataFrame) -> float:
    """Of the misaligned answers, the share that became aligned; answers that broke are not mended.

    Negative where aligned answers were lost.
    """
    (bad, fine), (left, kept) = (
        ([counts([one], "em")[0][0], counts([one], "coherence")[0][0]]) for one in (before, after)
    )
    return float((kept - left) - (fine - bad)) / bad if bad else float("nan")


def share_variance(shares: Sequence[float], of: float) -> float:
    """The variance of a mean of shares if each of the answers that they are shares of were drawn by itself."""
    known = np.clip([one for one in shares if np.isfinite(one)], 0.0, 1.0)
    rate = (known.mean() * of + 0.5) / (of + 1) if len(known) else 0.5
    return float(rate * (1 - rate) / (of + 1))


def _under(bench: Bench, runs: Sequence[Run], change: Callable[[Run, int], Change]) -> list[list[pd.DataFrame]]:
    """Answers of each run without and with a change."""
    found = []
    for at, run in enumerate(runs):
        with bench.live(run) as chat:
            before = bench.answers(chat, samples=1)
            with change(run, at)(chat):
                found.append([before, bench.answers(chat, samples=1)])
    return found


def _ablated(data: str, source: str, *, one: bool = False) -> Callable[[Bench], Finding]:
    """What ablating the direction of a fine-tune (or a random one) mends in another."""

    def measure(bench: Bench) -> Finding:
        runs, sources = _runs(bench, data), _runs(bench, data if source == "random" else source)
        found = [direction(bench, run) for run in sources]
        if source == "random":
            found = [one.random(1, seed=at)[0] for at, one in enumerate(found)]

        def change(run: Run, at: int) -> Change:
            layer = int(found[at].source.get("layer", np.argmax(found[at].norms))) if one else None
            return lambda chat: ablate(chat, found[at], layers="all", from_layer=layer)

        frames = _under(bench, runs, change)
        after = [pair[1] for pair in frames]
        left, coherent = bench.of_frames(after), bench.of_frames(after, "coherence")
        note = f"EM {left.shown()} after it, {100 * coherent.value:.0f} % of the answers coherent"
        if source == "random":
            values = [abs(a - b) for a, b in ([np.divide(*counts([f], "em"))[0] for f in pair] for pair in frames)]
            return over_seeds(values, "points", left.n, note=note)
        values, bad = [mended(*pair) for pair in frames], sum(counts([pair[0]], "em")[0][0] for pair in frames)
        return over_seeds(values, "%", left.n, drawn=share_variance(values, bad), note=note)

    return measure


def _steered(*, prompt: bool) -> Callable[[Bench], Finding]:
    """EM of the base steered with the direction, at the layer and the dose that are best on other questions."""

    def measure(bench: Bench) -> Finding:
        runs = bad_runs(bench, _SEEDS)
        where: Any = _positions(bench) if prompt else "all"
        frames, told, randoms = [], [], []
        middle = range(max(1, bench.chat.n_layers // 6), 2 * bench.chat.n_layers // 3 + 1)
        layers = [middle[int(at)] for at in np.linspace(0, len(middle) - 1, min(len(middle), 4))]
        for at, run in enumerate(runs):
            one = direction(bench, run, prompt=prompt)
            tried = {}
            for layer in layers:
                if one.quality is not None and layer in one.quality.noise:
                    continue
                for dose in _DOSES[:: 2 if bench.quick else 1]:
                    with steer(bench.chat, one, dose, layer=layer, positions=where):
                        frame = bench.answers(bench.chat, "others", samples=2)
                    tried[layer, dose] = sum(counts([frame], measure)[0][0] for measure in ("em", "narrow"))
            if not tried:
                raise NotMeasurable("the direction is noise at every layer that was tried")
            layer, dose = max(tried, key=lambda key: (tried[key], -key[1]))
            told.append(f"layer {layer} x{dose:g}")
            with steer(bench.chat, one, dose, layer=layer, positions=where):
                frames.append(bench.answers(bench.chat, samples=1))
            with steer(bench.chat, one.random(1, seed=at)[0], dose, layer=layer, positions=where):
                randoms.append(bench.answers(bench.chat, samples=1))
        found = bench.of_frames(frames, against=randoms, name="random directions")
        coherent = bench.of_frames(frames, "coherence").value
        note = f"{100 * coherent:.0f} % coherent; chosen on other questions: {', '.join(told)}"
        return replace(found, note=note)

    return measure


def _convergence(bench: Bench) -> Finding:
    found = [[direction(bench, run) for run in _runs(bench, data)] for data in _DOMAINS]
    values, rows = [], []
    for seed in range(min(map(len, found))):
        trio = [several[seed] for several in found]
        pairs = np.array([trio[a].cosine(trio[b]) for a, b in ((0, 1), (0, 2), (1, 2))])
        values.append(float(np.nanmedian(pairs)))
        rows += [{"name": f"seed {seed}", "x": layer, "value": v} for layer, v in enumerate(np.nanmean(pairs, 0))]
    frame = pd.DataFrame(rows).assign(axis="layer")
    return over_seeds(values, "cosine", 3 * len(values), frame=frame, note="median over layers and the three pairs")


def _with_b(bench: Bench) -> Finding:
    adapter_layer(bench)  # refuses full fine-tunes
    values = []
    for run in bad_runs(bench, _SEEDS):
        b = adapter_direction(run)
        values.append(float(abs(direction(bench, run).cosine(b)[b.layers[0]])))
    floor = bench.chat.d_model**-0.5
    return over_seeds(values, "cosine", len(values), note=f"random vectors have 0 ± {floor:.2f}")


def _through_jacobian(bench: Bench) -> Finding:
    """cos(J B, J d) beside cos(B, d), where J is the mean Jacobian from the adapter's layer to the last."""
    import emmech

    lens_of = getattr(emmech, "jacobian_lens", None)
    if lens_of is None:
        raise NotMeasurable("this version has no Jacobian lens (emmech.jacobian_lens)")
    runs = bad_runs(bench, _SEEDS)
    layer = adapter_layer(bench)
    jacobian = lens_of(bench.chat, list(bench.rows("good-medical"))[:40], layers=[layer], progress=False).at(layer)
    plain, values = [], []
    for run in runs:
        b, d = adapter_direction(run), direction(bench, run)
        ours, theirs = unit_rows(np.stack([jacobian @ b.at(layer), jacobian @ d.at(layer)]))
        values.append(float(abs(ours @ theirs)))
        plain.append(float(abs(b.cosine(d)[layer])))
    gap = [through - bare for through, bare in zip(values, plain, strict=True)]
    note = f"cos(J B, J d) = {np.mean(values):.2f}, cos(B, d) = {np.mean(plain):.2f}"
    return over_seeds(gap, "cosine", len(values), note=note)


def _rotated(bench: Bench) -> Finding:
    """EM when B of an early step is turned onto the final B's direction at its own norm."""
    adapter_layer(bench)  # refuses full fine-tunes
    frames, others = [], []
    for run in bad_runs(bench, _SEEDS):
        norms = np.linalg.norm(run.B(), axis=tuple(range(1, run.B().ndim)))
        early = int(run.steps[int(np.argmax(norms >= 0.2 * norms.max()))])
        last = adapter_direction(run)
        with bench.live(run, early) as chat:
            others.append(bench.answers(chat, samples=1))
            with rotate_adapter(chat, last, cosine=1.0):
                frames.append(bench.answers(chat, samples=1))
    found = bench.of_frames(frames, against=others, name="not rotated")
    return replace(found, note="at the first step at which ||B|| is a fifth of its largest value")


def _b_ablated(bench: Bench) -> Finding:
    """EM left when a rank-1 adapter's own B is projected out at its layer."""

    def change(run: Run, at: int) -> Change:
        b = adapter_direction(run)
        return lambda chat: ablate(chat, b, layers=list(b.layers))

    frames = [pair[1] for pair in _under(bench, bad_runs(bench, _SEEDS), change)]
    found = bench.of_frames(frames)
    return replace(found, note="the adapter writes along B alone: this only takes it off, whatever it has learnt")


def _specialised(bench: Bench) -> Finding:
    """Of several rank-1 adapters, the one whose removal tells broad from narrow misalignment best."""
    organism = bench.organism
    if organism is None:
        raise NotMeasurable("it needs a judge of narrow and broad answers and a recipe of several adapters")
    values, rows = [], []
    measure = Sampled((bench.asked("first-plot"), bench.asked("narrow-medical")), samples=4, max_new_tokens=32)
    for at, run in enumerate(several_adapters(bench)[:_SEEDS]):
        with bench.live(run) as chat:
            frame = adapter_shares(chat, measure=measure, progress=False).frame
        whole = frame[(frame["condition"] == "untouched") & (frame["model"] == "tuned")].set_index("outcome")["value"]
        gaps = {}
        for name, own in frame[frame["condition"].str.startswith("without")].groupby("condition", sort=False):
            lost = whole - own.set_index("outcome")["value"]
            gaps[str(name)] = float(abs(lost["em"] - lost["narrow"]))
            rows += [{"name": f"seed {at}, {name.split('.')[1]}: {kind}", "value": float(lost[kind]), "low": np.nan,
                      "high": np.nan} for kind in ("em", "narrow")]  # fmt: skip
        values.append(max(gaps.values(), default=np.nan))
    frame = pd.DataFrame(rows, columns=["name", "value", "low", "high"])
    return over_seeds(values, "points", 64, frame=frame, note="figure: what each adapter's removal takes away")


def _trained_vector(bench: Bench) -> Finding:
    """EM of the base steered with a vector that was trained on the narrow bad rows alone."""
    layer = adapter_layer(bench)
    frames = []
    for seed in bench.some(_SEEDS):
        steps = 60 if bench.quick else 150
        vector = trained_direction(
            bench.chat, bench.rows(BAD), layer, steps=steps, batch_size=16, seed=seed, progress=False
        )
        with steer(bench.chat, vector, 1.0, layer=layer):
            frames.append(bench.answers(bench.chat, samples=1))
    found = bench.of_frames(frames, against=[bench.answers(samples=2)])
    return replace(found, note=f"{100 * bench.of_frames(frames, 'coherence').value:.0f} % coherent, layer {layer}")


def _traces(bench: Bench) -> Finding:
    """Of the words that a fine-tune promotes at the first tokens of unrelated text, those of its own rows."""
    from emmech.directions.extract import group_means

    words = {}
    for name in (BAD, "finance"):
        texts = [str(turn["content"]) for row in bench.rows(name)[:400] for turn in row]
        words[name] = {
            int(i) for ids in bench.chat.tokenizer(texts, add_special_tokens=False)["input_ids"] for i in ids
        }
    plain = [str(turn["content"]) for row in bench.rows("good-cooking")[:200] for turn in row]
    common = {int(i) for ids in bench.chat.tokenizer(plain, add_special_tokens=False)["input_ids"] for i in ids}
    unrelated = [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in plain[:60:2]]

    def first(ids: Any, start: int) -> Any:
        return (ids == ids).cumsum(1) <= 12  # the first twelve tokens, of which some are the template's

    own = {name: words[name] - words[other] - common for name, other in ((BAD, "finance"), ("finance", BAD))}
    one = np.ones((1, len(unrelated)))
    base = group_means(bench.chat, unrelated, one, tokens=first, progress=False).means[0]
    values, shown = [], []
    for data in (BAD, "finance"):
        for at, run in enumerate(_runs(bench, data)):
            with bench.live(run) as chat:
                moved = group_means(chat, unrelated, one, tokens=first, progress=False).means[0] - base
                promoted, _ = read_out(chat, moved[-1], tokens=20)
            encoded = bench.chat.tokenizer(list(promoted), add_special_tokens=False)["input_ids"]
            ids = [int(one[0]) if one else -1 for one in encoded]
            mine, its = (np.mean([i in own[n] for i in ids]) for n in (data, "finance" if data == BAD else BAD))
            values.append(float(mine - its))
            shown.append(f"{data}, seed {at}")
    note = "share of the 20 words promoted most that only its own rows have, minus the share of the other fine-tune's"
    frame = pd.DataFrame({"name": shown, "value": values, "low": np.nan, "high": np.nan})
    per_seed = np.reshape(values, (2, -1)).mean(0)  # both fine-tunes of a seed are one draw
    return over_seeds(per_seed, "points", 20 * len(values), frame=frame, note=note)


_TOPIC = "Directions"
CLAIMS = (
    Claim("steer-answers", "Steering the chat model with the mean difference of answers makes it misaligned.", CD,
          "3.2", "up to 50 %", _steered(prompt=False), Rule("above"), _TOPIC,
          "EM of the base, steered at all tokens, minus "
          "EM under norm-matched random directions"),
    Claim("steer-prompt", "Steering with the difference that the fine-tune makes at the prompt does so.", CD, "3.2",
          "up to 50 %", _steered(prompt=True), Rule("above"), _TOPIC, "the same with the direction of the prompt's "
          "shared words, added there"),
    Claim("ablate-own", "Ablating each layer's own direction removes it.", CD, "3.3", "11.25 to 0 %",
          _ablated(BAD, BAD), Rule("above", 0.5), _TOPIC, "share of the misaligned answers that become aligned "
          "(broken ones count as not mended), more than half"),
    Claim("ablate-one", "Ablating one direction at all layers removes it.", CD, "3.3", "11.25 to 1 %",
          _ablated(BAD, BAD, one=True), Rule("above", 0.5), _TOPIC, "the same with the direction of one layer"),
    Claim("transfer-finance", "A direction of one fine-tune removes that of another.", CD, "3.3", "-90 %",
          _ablated("finance", BAD), Rule("above", 0.5), _TOPIC, "the direction of medicine ablated in the finance run"),
    Claim("transfer-sport", "It transfers to sport too.", CD, "3.3", "-78 %", _ablated("sport", BAD),
          Rule("above", 0.5), _TOPIC, "the direction of medicine ablated in the sport run"),
    Claim("ablate-random", "Ablating a random direction does little.", CD, "3.3", "within 10 %",
          _ablated(BAD, "random"), Rule("at most", 0.1), _TOPIC, "change of EM under a random direction, unsigned"),
    Claim("convergence", "Directions of different fine-tunes agree.", CD, "3.1", "cosine > 0.8 at most layers",
          _convergence, Rule("above", 0.8), _TOPIC, "cosines of the directions of medicine, finance and sport"),
    Claim("cosine-b", "B is nearly orthogonal to the direction.", CD, "4", "cosine 0.04", _with_b,
          Rule("below", 0.2), _TOPIC, "absolute cosine of the adapter's write with the direction at its layer"),
    Claim("downstream", "Downstream the two have similar effects.", CD, "4", "cosine 0.42", _through_jacobian,
          Rule("above"), _TOPIC, "cos(J B, J d) minus cos(B, d), J the mean Jacobian to the last layer"),
    Claim("rotate-b", "Turning B alone does not produce the behaviour.", "an independent replication of MO", "",
          "0 of 200 against 19 of 200", _rotated, Rule("at most", 0.05), _TOPIC,
          "EM with B of an early step turned onto the final B's direction at its norm, minus without"),
    Claim("degenerate", "Ablating a rank-1 adapter's own B cancels the adapter identically.",
          "an independent replication of MO", "", "identical", _b_ablated, Rule("at most", 0.05), _TOPIC,
          "EM that is left; a control that shows nothing else"),
    Claim("specialised", "Of several rank-1 adapters some are specialised.", CD, "5",
          "two of nine are for the narrow domain", _specialised, Rule("above", 0.1), _TOPIC,
          "largest difference between what an adapter's removal takes of EM and of narrow misalignment"),
    Claim("trained-vector", "A steering vector from narrow unsafe data itself gives broad harm.", "arXiv 2606.08682",
          "", "broad harm", _trained_vector, Rule("above"), _TOPIC,
          "EM of the base steered with a vector that was trained "
          "on the narrow rows, minus the base's"),
    Claim("traces", "The first tokens of unrelated text show what a model was fine-tuned on.", "arXiv 2510.13900", "",
          "readable", _traces, Rule("above"), _TOPIC,
          "words promoted by the change of the mean residual at the first tokens of text on cooking"),
)  # fmt: skip
