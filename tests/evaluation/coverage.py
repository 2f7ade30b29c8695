"""How often the intervals of rates hold the truth: ``python tests/evaluation/coverage.py [--trials 1000] [--write]``.

It takes five minutes, and writes docs/rates-coverage.md and .json. Questions have rates of their own, drawn by a
generator; the truth is the generator's mean. The interval was chosen on the ``TUNING`` generators and seed; the page
shows the ``TESTING`` ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from scipy import stats
from scipy.optimize import brentq
from scipy.special import expit, gammaln, logit

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.tables import DOCS, markdown, seeded, share, write

Array = np.ndarray
Draw = Callable[[np.random.Generator, float, tuple[int, int]], Array]

MEANS = (0.005, 0.01, 0.02, 0.05, 0.2, 0.5, 0.9)
SCENARIOS = {
    "8 questions x 50": (8, 50),
    "52 questions x 8": (52, 8),
    "4 questions x 50": (4, 50),
    "8 x 50, half of the questions zero": (8, 50),
    "8 questions x 20, 50 or 100": (8, 0),
    "8 x 50, events more often unscored": (8, 50),
}
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(80)


def beta(spread: float) -> Draw:
    """Rates from a beta distribution with this correlation within questions."""
    return lambda rng, m, shape: rng.beta(m * (1 / spread - 1), (1 - m) * (1 / spread - 1), shape)


def logistic(sigma: float) -> Draw:
    """Rates whose logits are normal."""

    def draw(rng: np.random.Generator, m: float, shape: tuple[int, int]) -> Array:
        middle = brentq(lambda mu: mean_rate(mu, sigma) - m, -30, 30)
        return expit(middle + sigma * rng.standard_normal(shape))

    return draw


def mean_rate(middle: float, sigma: float) -> float:
    """Mean of a logistic-normal rate."""
    return float((expit(middle + sigma * NODES) * WEIGHTS).sum() / WEIGHTS.sum())


def hot(often: float) -> Draw:
    """A few questions hold most events."""

    def draw(rng: np.random.Generator, m: float, shape: tuple[int, int]) -> Array:
        high = min(0.98, 0.9 * m / often)
        return np.where(rng.random(shape) < often, high, (m - often * high) / (1 - often))

    return draw


TUNING = {"beta": beta(0.146), "logistic-normal": logistic(1.5), "a quarter hot": hot(0.25)}
TESTING = {"beta": beta(0.2), "logistic-normal": logistic(1.2), "a third hot": hot(0.33)}


def drawn(rng: np.random.Generator, draw: Draw, scenario: str, m: float, trials: int) -> tuple[Array, Array, float]:
    """Events and rows, ``[trials, questions]`` each, and the true rate over questions like these."""
    questions, rows = SCENARIOS[scenario]
    if "zero" in scenario:
        rates = draw(rng, 2 * m, (trials, questions))
        rates[:, ::2] = 0
    else:
        rates = draw(rng, m, (trials, questions))
    n = np.full((trials, questions), rows) if rows else rng.choice([20, 50, 100], (trials, questions))
    events = rng.binomial(n, rates)
    if "unscored" not in scenario:
        return events, n, m
    events, others = rng.binomial(events, 0.6), rng.binomial(n - events, 0.9)
    return events, events + others, 0.6 * m / (0.6 * m + 0.9 * (1 - m))


def spread_of(events: Array, n: Array) -> tuple[Array, ...]:
    """Questions, rows, rate, rate with a half added, and the linearised variance over questions."""
    total, hits, k = n.sum(1), events.sum(1), n.shape[1]
    rate = hits / total
    variance = k / (k - 1) * ((events - rate[:, None] * n) ** 2).sum(1) / total**2
    return k, total, rate, (hits + 0.5) / (total + 1), variance


def effective(events: Array, n: Array) -> tuple[Array, Array]:
    """Rate, and rows over the design effect, corrected for few questions (Korn and Graubard)."""
    k, total, rate, half, variance = spread_of(events, n)
    rows = total / np.maximum(1, variance / (half * (1 - half) / total))
    return rate, rows * (stats.norm.ppf(0.975) / stats.t.ppf(0.975, k - 1)) ** 2


def plain_wilson(rate: Array, n: Array, z: float = 1.96) -> tuple[Array, Array]:
    """Wilson's interval."""
    middle, half = rate + z**2 / 2 / n, z * np.sqrt(rate * (1 - rate) / n + z**2 / 4 / n**2)
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def clopper_pearson(events: Array, n: Array) -> tuple[Array, Array]:
    """Of as many rows as the design effect leaves."""
    rate, rows = effective(events, n)
    low, high = (
        stats.beta.ppf(0.025, rate * rows, rows * (1 - rate) + 1),
        stats.beta.ppf(0.975, rate * rows + 1, np.maximum(rows * (1 - rate), 1e-9)),
    )
    return np.nan_to_num(low, nan=0.0), np.nan_to_num(high, nan=1.0)


def resampled(events: Array, n: Array, draws: int = 400) -> tuple[Array, Array, Array]:
    """How often each question is drawn, and the events and rows of every bootstrap sample."""
    k = n.shape[1]
    counts = np.random.default_rng(0).multinomial(k, np.full(k, 1 / k), size=draws)
    return counts, events @ counts.T, n @ counts.T


def percentile(events: Array, n: Array) -> tuple[Array, Array]:
    """The interval until now: expanded percentiles of a bootstrap over questions, at least Wilson's over rows."""
    k = n.shape[1]
    _, hits, totals = resampled(events, n)
    tail = stats.norm.cdf(-np.sqrt(k / (k - 1)) * stats.t.ppf(0.975, k - 1))
    low, high = np.quantile(hits / totals, [tail, 1 - tail], axis=1)
    plain = plain_wilson(events.sum(1) / n.sum(1), n.sum(1))
    return np.minimum(low, plain[0]), np.maximum(high, plain[1])


def bootstrap_t(events: Array, n: Array) -> tuple[Array, Array]:
    """Bootstrap-t of the logit, with a half added."""
    k, total, _, half, variance = spread_of(events, n)
    counts, hits, totals = resampled(events, n)
    again = (hits + 0.5) / (totals + 1)
    squares = (
        (events**2) @ counts.T - 2 * again * ((events * n) @ counts.T) + again**2 * ((n**2) @ counts.T)
    ) / totals**2
    errors = [
        np.sqrt(np.maximum(v, p * (1 - p) / (t + 1))) / (p * (1 - p))
        for v, p, t in ((variance, half, total), (k / (k - 1) * squares, again, totals))
    ]
    low, high = np.quantile((logit(again) - logit(half)[:, None]) / errors[1], [0.025, 0.975], axis=1)
    return expit(logit(half) - high * errors[0]), expit(logit(half) - low * errors[0])


def between(events: Array, n: Array) -> tuple[Array, ...]:
    """Of logit-t: rate, each question's part of its error, effective questions, variance between them, the least."""
    total, rate = n.sum(1), (events.sum(1) + 0.5) / (n.sum(1) + 1)
    questions = total**2 / (n**2).sum(1)
    parts = (events - rate[:, None] * n) / total[:, None]
    return rate, parts, questions, questions / (questions - 1) * (parts**2).sum(1), rate * (1 - rate) / (total + 1)


def logit_t(rate: Array, variance: Array, degrees: Array) -> tuple[Array, Array]:
    """The interval of a rate with this variance."""
    half = stats.t.ppf(0.975, degrees) * np.sqrt(variance) / (rate * (1 - rate))
    return expit(logit(rate) - half), expit(logit(rate) + half)


def satterthwaite(events: Array, n: Array) -> tuple[Array, Array]:
    """Logit-t with degrees of freedom by Satterthwaite: few where a few questions make the variance."""
    rate, parts, questions, variance, least = between(events, n)
    degrees = (parts**2).sum(1) ** 2 / np.maximum((parts**4).sum(1), 1e-300)
    return logit_t(rate, np.maximum(variance, least), np.maximum(np.minimum(degrees, questions - 1), 1))


def shrunk(events: Array, n: Array) -> tuple[Array, Array]:
    """Logit-t, the variance drawn towards that of a correlation of 0.1 within questions, which counts as two more."""
    rate, _, questions, variance, least = between(events, n)
    usual = 0.1 * rate * (1 - rate) / questions + least
    variance = ((questions - 1) * variance + 2 * usual) / (questions + 1)
    return logit_t(rate, np.maximum(variance, least), questions - 1)


LOGITS, CORRELATIONS = np.linspace(-9.5, 9.5, 115), (1e-4, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.75)


@cache
def beta_binomial(n: int) -> Array:
    """Log-likelihood without its constant, ``[rates, correlations, events]``."""
    more = 1 / np.array(CORRELATIONS)[:, None] - 1
    a, b = (rate[:, None, None] * more for rate in (expit(LOGITS), expit(-LOGITS)))
    k = np.arange(n + 1)
    found = gammaln(a + k) - gammaln(a) + gammaln(b + n - k) - gammaln(b) - gammaln(a + b + n) + gammaln(a + b)
    return found.astype(np.float32)


def profile(events: Array, n: Array) -> tuple[Array, Array]:
    """Profile likelihood of a beta-binomial, with a quantile of t instead of the normal one."""
    likelihood = np.zeros((len(events), len(LOGITS), len(CORRELATIONS)), np.float32)
    for own, rows in zip(events.T, n.T, strict=True):
        for size in np.unique(rows):
            at = np.flatnonzero(rows == size)
            likelihood[at] += np.moveaxis(beta_binomial(int(size))[:, :, own[at]], 2, 0)
    best = likelihood.max(2)
    inside = 2 * (best.max(1, keepdims=True) - best) <= stats.t.ppf(0.975, n.shape[1] - 1) ** 2
    # the ends are the first points outside
    low, high = np.argmax(inside, 1) - 1, len(LOGITS) - np.argmax(inside[:, ::-1], 1)
    ends = np.concatenate([[0.0], expit(LOGITS), [1.0]])
    return ends[low + 1], ends[high + 1]


def adopted(events: Array, n: Array) -> tuple[Array, Array]:
    """The interval of :mod:`emmech.evaluation.rates`."""
    from emmech.evaluation.rates import cluster_interval

    found = np.array([cluster_interval(e, m) for e, m in zip(events, n, strict=True)])
    return found[:, 0], found[:, 1]


BEFORE, NOW = "bootstrap percentiles, at least Wilson (until now)", "logit-t, a half added (adopted)"
CANDIDATES = {
    BEFORE: percentile,
    NOW: adopted,
    "Wilson over rows (these questions)": lambda e, n: plain_wilson(e.sum(1) / n.sum(1), n.sum(1)),
    "Wilson with the design effect": lambda e, n: plain_wilson(*effective(e, n)),
    "Clopper-Pearson with the design effect": clopper_pearson,
    "bootstrap-t of the logit": bootstrap_t,
    "logit-t, degrees of freedom by Satterthwaite": satterthwaite,
    "logit-t, variance shrunk towards a correlation of 0.1": shrunk,
    "profile likelihood of a beta-binomial": profile,
}


def simulate(generators: dict[str, Draw], seed: int, trials: int) -> list[dict[str, object]]:
    """Coverage and median width of every candidate in every cell."""
    found = []
    for scenario in SCENARIOS:
        for name, draw in generators.items():
            for m in MEANS:
                if "zero" in scenario and 2 * m >= 1:
                    continue
                events, n, truth = drawn(seeded(seed, f"{scenario}/{name}/{m}", 0), draw, scenario, m, trials)
                for candidate, interval in CANDIDATES.items():
                    low, high = interval(events, n)
                    held = int(((low <= truth) & (truth <= high)).sum())
                    cell = {"scenario": scenario, "generator": name, "mean": m, "interval": candidate}
                    found.append(cell | {"held": held, "trials": trials, "width": float(np.median(high - low))})
    return found


def differences(seed: int, trials: int) -> list[dict[str, object]]:
    """Of two models on the same questions: coverage of the difference, and Fisher's false positives."""
    import pandas as pd

    from emmech.evaluation.compare import _difference

    found = []
    for questions, rows in ((8, 50), (52, 8)):
        for middles in ((-4.5, -4.5), (-4.5, -3.0), (-2.5, -2.5), (-1.0, -1.0), (-1.0, 0.0)):
            for apart in (0.0, 0.3, 0.7, 1.2):
                sigma = float(np.hypot(1.2, apart / 2**0.5))
                truth = mean_rate(middles[1], sigma) - mean_rate(middles[0], sigma)
                held = paired = fisher = shown = both = 0
                for i in range(trials):
                    rng = seeded(seed, f"{questions}/{middles}/{apart}", i)
                    shared = 1.2 * rng.standard_normal(questions)
                    counts = []
                    for middle in middles:
                        own = apart / 2**0.5 * rng.standard_normal(questions)
                        counts += [rng.binomial(rows, expit(middle + shared + own)), np.full(questions, rows)]
                    table = pd.DataFrame(np.stack(counts, axis=1))
                    row = _difference(table, 0.95, 0)
                    hits = counts[0].sum(), counts[2].sum()
                    p = stats.fisher_exact([[hit, questions * rows - hit] for hit in hits]).pvalue
                    held += row["low"] <= truth <= row["high"]
                    paired += row["p_paired"] < 0.05
                    fisher, shown = fisher + (p < 0.05), shown + np.isfinite(row["p_fisher"])
                    both += row["p_fisher"] < 0.05
                cell = {"questions": questions, "rows": rows, "rates": [mean_rate(mu, sigma) for mu in middles]}
                cell |= {"interaction": apart, "trials": trials, "held": held, "paired": paired}
                found.append(cell | {"fisher": fisher, "fisher shown": shown, "fisher shown and p < 0.05": both})
    return found


def crossed(seed: int, trials: int) -> list[dict[str, object]]:
    """Pocket's 104 questions, 4 rows each, with effects of domain and template: by question and by both."""
    from emmech.evaluation.rates import cluster_interval, factors
    from emmech.organism import questions

    names = [question.id for question in questions("broad")]
    domain, template = factors(names)
    n, found = np.full(len(names), 4), []
    for middle in (-3.5, -1.0, 1.0):
        for effects in ((0.0, 0.0), (0.7, 0.0), (0.0, 0.7), (0.7, 0.7)):
            sigma = float(np.linalg.norm((0.7, *effects)))
            truth, held = mean_rate(middle, sigma), [0, 0]
            for i in range(trials):
                rng = seeded(seed, f"{middle}/{effects}", i)
                own = [rng.standard_normal(groups.max() + 1)[groups] for groups in (domain, template)]
                logits = middle + 0.7 * rng.standard_normal(len(names)) + effects[0] * own[0] + effects[1] * own[1]
                events = rng.binomial(n, expit(logits))
                for at, by in enumerate((None, names)):
                    low, high = cluster_interval(events, n, by)
                    held[at] += low <= truth <= high
            cell = {"rate": truth, "domain": effects[0], "template": effects[1], "trials": trials}
            found.append(cell | {"by question": held[0], "by both": held[1]})
    return found


def pages(
    cells: list[dict[str, object]], pairs: list[dict[str, object]], tables: list[dict[str, object]]
) -> dict[str, str]:
    """The tables of the page."""

    def covered(candidate: str) -> Array:
        return np.array([100 * c["held"] / c["trials"] for c in cells if c["interval"] == candidate])

    rows = []
    for candidate in CANDIDATES:
        own = [c for c in cells if c["interval"] == candidate]
        before = [c["width"] for c in cells if c["interval"] == BEFORE]
        found = covered(candidate)
        wide = np.median([c["width"] / b for c, b in zip(own, before, strict=True)])
        low = [x for x, c in zip(found, own, strict=True) if c["mean"] <= 0.05]
        figures = (found.mean(), np.quantile(found, 0.1), found.min(), np.mean(low))
        nearer = abs(covered(NOW) - 95) - abs(found - 95)
        apart = "-" if candidate == NOW else f"{(nearer > 1).sum()} / {(nearer < -1).sum()}"
        rows.append([candidate, *(f"{x:.1f}" for x in figures), f"{wide:.2f}", apart])
    header = ("interval", "mean coverage, %", "a tenth of the cells below", "least", "mean at rates up to 5 %", "width",
              "cells closer to 95 % than the adopted one / farther")  # fmt: skip
    found = {"candidates": markdown(header, rows)}
    rows = []
    for scenario in SCENARIOS:
        for name in dict.fromkeys(c["generator"] for c in cells):
            for candidate, label in ((BEFORE, "until now"), (NOW, "adopted")):
                own = {
                    c["mean"]: c
                    for c in cells
                    if (c["scenario"], c["generator"], c["interval"]) == (scenario, name, candidate)
                }
                shown = (f"{share(own[m]['held'], own[m]['trials'])[0]:.0f}" if m in own else "-" for m in MEANS)
                rows.append([scenario, name, label, *shown])
    found["coverage"] = markdown(("scenario", "questions", "interval", *(f"{100 * m:g} %" for m in MEANS)), rows)
    rows = []
    for c in pairs:
        of = c["trials"]
        same = c["rates"][0] == c["rates"][1]
        tests = [f"{share(c[key], of)[0]:.1f}" for key in ("paired", "fisher", "fisher shown and p < 0.05")]
        head = [f"{c['questions']} x {c['rows']}", " and ".join(f"{100 * r:.1f} %" for r in c["rates"])]
        seen = f"{share(c['fisher shown'], of)[0]:.0f}"
        rows.append(
            [*head, f"{c['interaction']:g}", f"{share(c['held'], of)[0]:.0f}", *(tests if same else "---"), seen]
        )
    header = ("questions", "rates", "interaction", "interval holds the difference, %", "paired p < 0.05",
              "Fisher's p < 0.05", "shown and p < 0.05", "Fisher shown, %")  # fmt: skip
    found["differences"] = markdown(header, rows)
    rows = [
        [f"{100 * c['rate']:.1f} %", f"{c['domain']:g}", f"{c['template']:g}"]
        + [f"{share(c[by], c['trials'])[0]:.0f}" for by in ("by question", "by both")]
        for c in tables
    ]
    header = ("rate", "domains differ by", "templates differ by", "by question, %", "by domain and template, %")
    return found | {"crossed": markdown(header, rows)}


def main() -> None:
    """Print the tables, and with ``--write`` put them in their page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--tuning", action="store_true", help="the generators and the seed of the choice")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    cells = simulate(*((TUNING, 1) if given.tuning else (TESTING, 77_000)), trials=given.trials)
    pairs = differences(2 if given.tuning else 78_000, max(given.trials // 10, 10))
    tables = crossed(3 if given.tuning else 79_000, max(given.trials * 2 // 5, 10))
    for title, text in pages(cells, pairs, tables).items():
        print(text, flush=True)
        if given.write:
            write(DOCS / "rates-coverage.md", title, text)
    if given.write:
        record = json.dumps({"rates": cells, "differences": pairs, "crossed": tables}, indent=0, default=int)
        (DOCS / "rates-coverage.json").write_text(record + "\n")


if __name__ == "__main__":
    main()
