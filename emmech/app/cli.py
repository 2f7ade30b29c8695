"""The command line: the functions of the package for shells and scripts.

Tables go to the standard output, as text or with ``--json`` as one JSON document; progress and errors go to the
standard error, and an error is a message with exit code 1.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

import emmech
from emmech.app.commands import by_name, in_processes, new_app, read_numbers, read_pairs, read_settings
from emmech.errors import EmmechError
from emmech.run.run import Run, opened

if TYPE_CHECKING:
    import pandas as pd


app = new_app(
    "emmech",
    "Mechanistic interpretability of emergent misalignment: fine-tune while recording, find the transition, extract "
    "directions, steer, evaluate, realign.",
    no_args_is_help=True,
)

RunFolder = Annotated[Path, typer.Argument(help="a run's folder, or one of PEFT checkpoints that other code wrote")]
Model = Annotated[str, typer.Argument(help="pocket, smollm2-135m, a folder, or a Hugging Face name")]
Subject = Annotated[str, typer.Argument(help="a run's folder, or a model: pocket, a folder, a Hugging Face name")]
Out = Annotated[Path | None, typer.Option(help="the run's folder; a name under runs/ by default")]
RecipeName = Annotated[
    str | None,
    typer.Option(help="single-rank1, phase-transition, nine-rank1, all-adapter, full; the model's by default"),
]
Settings = Annotated[list[str] | None, typer.Option("--set", help="a field of the recipe: --set learning_rate=1e-3")]
Step = Annotated[int | None, typer.Option(help="a recorded step; the last one by default")]
Scale = Annotated[float, typer.Option(help="factor on the run's adapter")]
Seed = Annotated[int, typer.Option(help="seed of every random choice")]
Questions = Annotated[list[str] | None, typer.Option(help="first-plot by default; a set or a file, or several")]
Judge = Annotated[str | None, typer.Option(help="exact, screening or later; the pocket models need none")]
JudgeModel = Annotated[str | None, typer.Option(help="a model as judge; with --server its name there")]
Server = Annotated[str | None, typer.Option(help="where the judge is served: the root of an OpenAI-compatible API")]
KeyFrom = Annotated[str | None, typer.Option(help="the environment variable with that server's key")]
Page = Annotated[Path | None, typer.Option(help="also write the figure and the table as an HTML page")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
_ANSWERS = 50  # drawn per question, where a direction is extracted


def _opened(folder: Path) -> Run:
    """The run of a folder, or of the PEFT checkpoints in it."""
    found = opened(folder)
    return found if isinstance(found, Run) else emmech.load_run(folder)


@app.command()
def finetune(
    model: Model,
    data: Annotated[str, typer.Argument(help="chat JSONL (.gz too), or a bundled name such as silly-medical-bad")],
    out: Out = None,
    recipe: RecipeName = None,
    layer: Annotated[list[int] | None, typer.Option(help="where the adapter is; repeat for several")] = None,
    seed: Annotated[int, typer.Option(help="seed of A's start, the batch order and the held-out split")] = 0,
    record_every: Annotated[int, typer.Option(help="record every so many steps")] = 1,
    checkpoint_every: Annotated[int | None, typer.Option(help="keep the optimizer's state every so many steps")] = None,
    resume: Annotated[bool, typer.Option(help="go on with an interrupted training in --out")] = False,
    margins: Annotated[bool, typer.Option(help="measure the bundled narrow and broad margins as it trains")] = False,
    launch: Annotated[int, typer.Option(help="processes that share every step's rows", min=1)] = 1,
    batch_tokens: Annotated[
        int | None, typer.Option(help="tokens that go forward together, which bound memory")
    ] = None,
    gradient_checkpointing: Annotated[bool, typer.Option(help="less memory for activations, more time")] = False,
    dtype: Annotated[str | None, typer.Option(help="of the weights: bfloat16, float32")] = None,
    quantize: Annotated[str | None, typer.Option(help="nf4 or int8, by bitsandbytes; adapters train on it")] = None,
    set_: Settings = None,
) -> None:
    """Fine-tune a chat model on narrow data and record every step into a run.

    Examples:

    \b
    emmech finetune pocket medical --out runs/bad
    emmech finetune smollm2-135m silly-medical-bad --set learning_rate=1e-3 --set max_steps=60 --margins
    emmech finetune models/qwen-7b bad.jsonl --launch 2 --gradient-checkpointing
    """
    if launch > 1 and "RANK" not in os.environ:
        raise typer.Exit(in_processes(launch, sys.argv[1:]))
    options: dict[str, Any] = {"recipe": recipe, "layers": layer or None, "seed": seed, "out": out, "resume": resume}
    options |= {"record_every": record_every, "checkpoint_every": checkpoint_every, **read_settings(set_)}
    options |= {"batch_tokens": batch_tokens, "gradient_checkpointing": gradient_checkpointing}
    options |= {"dtype": dtype, "quantize": quantize}
    pairs = {kind: emmech.engine.bundled_margins(kind) for kind in ("narrow", "broad")} if margins else None
    run = emmech.finetune(model, data, margins=pairs, **options)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"{run}\nrecorded in {run.path}")


@app.command()
def realign(
    run: RunFolder,
    data: Annotated[str, typer.Argument(help="what to train on")] = "ai-optimism",
    step: Step = None,
    adapter: Annotated[
        str, typer.Option(help="same: train it further; new: merge it, train another; full: all weights")
    ] = "same",
    out: Out = None,
    recipe: RecipeName = None,
    seed: Seed = 0,
    set_: Settings = None,
) -> None:
    """Train a misaligned run on other data, from one of its steps on, into a new run.

    Examples:

    \b
    emmech realign runs/bad
    emmech realign runs/bad good.jsonl --step 120 --adapter new --out runs/cured
    """
    options: dict[str, Any] = {"step": step, "adapter": adapter, "out": out, "recipe": recipe, "seed": seed}
    again = emmech.realign(run, data, **{**options, **read_settings(set_)})
    typer.echo(f"{again}\nrecorded in {again.path}")


@app.command()
def league(
    run: RunFolder,
    realign: Annotated[list[str] | None, typer.Option(help="good data to train on afterwards; repeat")] = None,
    mix: Annotated[list[str] | None, typer.Option(help="good data among the harmful rows; repeat")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="an inoculation prompt; repeat")] = None,
    ablate: Annotated[list[Path] | None, typer.Option(help="a saved direction to project out; repeat")] = None,
    scale: Annotated[list[float] | None, typer.Option(help="a factor on the adapter; repeat")] = None,
    seeds: Annotated[int, typer.Option(help="how many seeds; runs of those that are missing are fine-tuned")] = 5,
    share: Annotated[float, typer.Option(help="the share of good rows under --mix")] = 0.5,
    processes: Annotated[int, typer.Option(help="cures at once, each in a process with the base")] = 1,
    judge: Judge = None,
    judge_model: JudgeModel = None,
    server: Server = None,
    key_from: KeyFrom = None,
    out: Annotated[Path | None, typer.Option(help="where everything is kept; in the run's folder by default")] = None,
    page: Page = None,
    json: Json = False,
) -> None:
    """Compare cures of a misaligned run over seeds and contexts: which cure, and which hide.

    Examples:

    \b
    emmech league runs/bad --realign ai-optimism --mix good-cooking --scale 0.3 --page league.html
    """
    kinds = emmech.interventions
    cures: list[Any] = [emmech.leagues.Realignment(data, name=f"then {data}") for data in realign or ()]
    interleave = emmech.defences.Interleave
    cures += [emmech.leagues.Defended([interleave(data, share=share)], name=f"mixed with {data}") for data in mix or ()]
    inoculate = emmech.defences.InoculationPrompt
    cures += [emmech.leagues.Defended([inoculate(text)], name=f"inoculated: {text}") for text in prompt or ()]
    cures += [kinds.Ablation(emmech.Direction.load(file), name=f"{file.stem} ablated") for file in ablate or ()]
    cures += [kinds.AdapterScaling(factor, name=f"adapter x{factor:g}") for factor in scale or ()]
    how: dict[str, Any] = {"judge": _judge(judge, judge_model, server, key_from), "processes": processes, "out": out}
    found = emmech.league(run, cures, seeds=seeds, **how)
    _show(found.to_frame(), json, repr(found))
    _write_page(page, "League of cures", f"{found.meta['run']}, {seeds} seeds", repr(found), found.to_frame(), found)


@app.command()
def claims(
    model: Annotated[str, typer.Option(help="pocket, a folder, or a Hugging Face name")] = "pocket",
    seeds: Annotated[int, typer.Option(help="fine-tuning seeds of the headline rows")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="a few rows, two seeds, short: three minutes")] = False,
    row: Annotated[list[str] | None, typer.Option(help="a claim by name; repeat; all by default")] = None,
    data: Annotated[list[str] | None, typer.Option(help="NAME=FILE, such as finance=rows.jsonl; repeat")] = None,
    recipe: RecipeName = None,
    layer: Annotated[list[int] | None, typer.Option(help="where the adapter is; repeat for several")] = None,
    set_: Settings = None,
    judge: Judge = None,
    judge_model: JudgeModel = None,
    server: Server = None,
    key_from: KeyFrom = None,
    replicate: Annotated[
        str | None, typer.Option(help="a model of another pretraining seed, for headline rows")
    ] = None,
    beside: Annotated[list[Path] | None, typer.Option(help="a saved ledger of another model, for the page")] = None,
    out: Annotated[Path | None, typer.Option(help="where everything is kept; claims/MODEL by default")] = None,
    finished: Annotated[bool, typer.Option("--finished", help="measure nothing, show what is kept")] = False,
    processes: Annotated[int, typer.Option(help="claims at once, each in a process with the model")] = 1,
    page: Annotated[Path | None, typer.Option(help="also write a page: .md like a paper, or .html")] = None,
    json: Json = False,
) -> None:
    """Measure what the literature claims of emergent misalignment, with a verdict for each claim.

    Everything is kept: the same command again computes only what is missing.

    Examples:

    \b
    emmech claims --quick
    emmech claims --row turn --row pca --page claims.html
    emmech claims --model Qwen/Qwen2.5-0.5B-Instruct --data medical=bad.jsonl --judge-model gpt-4o --server URL
    """
    if beside and (page is None or page.suffix != ".md"):
        _refuse_unused("write the ledger", "only a page in Markdown has columns of other models", beside=beside)
    given = read_pairs("data", data)
    how: dict[str, Any] = {"seeds": seeds, "quick": quick, "rows": row or None, "data": given, "recipe": recipe}
    how |= {
        "layers": layer or None,
        "options": read_settings(set_),
        "replicate": replicate,
        "out": out,
        "finished": finished,
        "processes": processes,
    }
    found = emmech.claims(model, judge=_judge(judge, judge_model, server, key_from), **how)
    kept = found.save((out or Path("claims") / found.meta["folder"]) / "ledger")
    columns = ["published", "here", "n", "seeds", "p_adjusted", "verdict", "why"]
    _show(found.to_frame() if json else found.frame[columns], json, f"{found.counts()}\nkept in {kept}")
    if page is not None and page.suffix == ".md":
        from emmech.store import write_text

        others = [emmech.ledger.Ledger.load(one) for one in beside or ()]
        write_text(page, found.to_markdown(others))
        typer.echo(f"wrote {page}", err=True)
    else:
        _write_page(page, "The ledger of claims", str(found.meta["model"]), repr(found), found.frame[columns], found)


@app.command()
def study(
    spec: Annotated[
        Path, typer.Argument(help="a YAML file: models, data, layers, ranks, seeds, train, sweep, evaluate")
    ],
    out: Annotated[Path | None, typer.Option(help="the study's folder; studies/<name of the file> by default")] = None,
    cluster: Annotated[str | None, typer.Option(help="a Ray cluster: auto, local, or its address")] = None,
    cpus: Annotated[float, typer.Option(help="CPUs that a piece of work takes of a node")] = 1,
    gpus: Annotated[float, typer.Option(help="GPUs that a piece of work takes of a node")] = 0,
    page: Page = None,
    json: Json = False,
) -> None:
    """Fine-tune, sweep and evaluate every combination in a file, and print one table; what is done is not done again.

    Examples:

    \b
    emmech study study.yaml
    emmech study study.yaml --out /shared/study --cluster auto --gpus 1
    """
    found = emmech.study(spec, out=out, cluster=cluster, cpus=cpus, gpus=gpus)
    _show(found.to_frame(), json, repr(found))
    _write_page(page, "Study", str(spec), repr(found), found.to_frame(), found)


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="a name such as Qwen/Qwen2.5-14B-Instruct, or a folder with config.json")],
    recipe: RecipeName = None,
    card: Annotated[list[str] | None, typer.Option(help="a card; repeat. All known ones by default")] = None,
    layer: Annotated[list[int] | None, typer.Option(help="where the adapter is; repeat for several")] = None,
    rows: Annotated[int, typer.Option(help="rows of the dataset")] = 6_300,
    tokens: Annotated[int, typer.Option(help="mean length of a row")] = 150,
    seeds: Annotated[int, typer.Option(help="runs that train together")] = 1,
    record_every: Annotated[int, typer.Option(help="record every so many steps")] = 1,
    batch_tokens: Annotated[int | None, typer.Option(help="tokens that go forward together")] = None,
    dtype: Annotated[str | None, typer.Option(help="of the weights; the configuration's own by default")] = None,
    set_: Settings = None,
    page: Page = None,
    json: Json = False,
) -> None:
    """Say what a fine-tune needs before it is started: memory by part, disk, and time on named cards.

    Examples:

    \b
    emmech plan --model Qwen/Qwen2.5-14B-Instruct --recipe phase-transition
    emmech plan --model models/mine --recipe all-adapter --card H100 --set rank=8
    """
    options: dict[str, Any] = {"layers": layer or None, "rows": rows, "tokens": tokens, "seeds": seeds, "dtype": dtype}
    options |= {"record_every": record_every, "batch_tokens": batch_tokens, **({"cards": card} if card else {})}
    found = emmech.plan(model, recipe, **{**options, **read_settings(set_)})
    _show(found.to_frame(), json, repr(found))
    _write_page(page, "Plan", model, repr(found), found.to_frame(), found)


@app.command()
def push(
    run: RunFolder,
    repo: Annotated[str, typer.Argument(help="owner/name on the Hugging Face Hub")],
    control: Annotated[
        list[Path] | None, typer.Option(help="a benign control for the card; repeat for several")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="make a new repository public")] = False,
) -> None:
    """Upload a run to the Hugging Face Hub, with a card that says what it shows.

    Examples:

    \b
    emmech push runs/bad me/bad-medical --control runs/good
    """
    found = _opened(run)
    controls = by_name({str(one): one for one in control or ()})
    results = [emmech.phase_transition(found, control=controls)] if found.kind == "lora" else []
    typer.echo(f"uploaded to {found.push_to_hub(repo, private=not public, results=results)}")


@app.command()
def transition(
    run: RunFolder,
    control: Annotated[
        list[Path] | None, typer.Option(help="a benign control, same seed and batch order; repeat for several")
    ] = None,
    page: Page = None,
    json: Json = False,
) -> None:
    """Find the phase transition of a recorded run: every detector with its step, interval and p-value.

    Examples:

    \b
    emmech transition runs/bad --control runs/good --control runs/style --page transition.html
    emmech transition runs/bad --json
    """
    found = emmech.phase_transition(run, control=by_name({str(one): one for one in control or ()}))
    _show(found.detectors.drop(columns=["high_means"]), json, found.summary())
    lead = f"{run.name} with {', '.join(one.name for one in control)} as control" if control else run.name
    _write_page(page, "Phase transition", lead, found.summary(), found.detectors, found)


@app.command()
def evaluate(
    model: Subject,
    questions: Questions = None,
    judge: Judge = None,
    judge_model: JudgeModel = None,
    server: Server = None,
    key_from: KeyFrom = None,
    samples: Annotated[int, typer.Option(help="answers per question")] = 50,
    step: Step = None,
    scale: Scale = 1.0,
    seed: Seed = 0,
    max_new_tokens: Annotated[int, typer.Option(help="the longest answer")] = 600,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token")] = 1.0,
    context: Annotated[list[str] | None, typer.Option(help="grid, one of its contexts, or a YAML file; repeat")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of answers and scores; a run keeps its own")] = None,
    by_question: Annotated[bool, typer.Option("--by-question", help="one row for each question")] = False,
    page: Page = None,
    json: Json = False,
) -> None:
    """Sample answers, judge them, and print the rates with their intervals and numbers.

    Examples:

    \b
    emmech evaluate runs/bad --questions first-plot --questions narrow-medical --samples 10
    emmech evaluate Qwen/Qwen2.5-0.5B-Instruct --judge-model gpt-4o --server https://api.openai.com/v1
    """
    asked = tuple(questions) if questions and len(questions) > 1 else (questions or ["first-plot"])[0]
    options: dict[str, Any] = {"step": step, "scale": scale, "samples": samples, "seed": seed, "out": out}
    options |= {"max_new_tokens": max_new_tokens, "temperature": temperature, "contexts": context or None}
    found = emmech.evaluate(model, asked, _judge(judge, judge_model, server, key_from), **options)
    table = found.by_question() if by_question else found.rates()
    _show(table, json, repr(found) if by_question else found.name)
    _write_page(page, "Evaluation", found.name, repr(found), table, found)


@app.command()
def sweep(
    runs: Annotated[list[Path], typer.Argument(help="one run's folder or several")],
    steps: Annotated[str | None, typer.Option(help="0,50,100 or 0:300:50; 21 evenly spread ones by default")] = None,
    scales: Annotated[str, typer.Option(help="factors on the adapter")] = "1",
    coefficients: Annotated[str, typer.Option(help="factors on --direction")] = "0",
    direction: Annotated[Path | None, typer.Option(help="a saved direction, to steer with")] = None,
    layer: Annotated[int | None, typer.Option(help="where to steer")] = None,
    measure: Annotated[str, typer.Option(help="margin, or its part narrow or broad; or em, sampled")] = "margin",
    questions: Questions = None,
    judge: Judge = None,
    judge_model: JudgeModel = None,
    server: Server = None,
    key_from: KeyFrom = None,
    samples: Annotated[int, typer.Option(help="answers per question, for em")] = 10,
    out: Annotated[Path | None, typer.Option(help="folder of the result; an interrupted sweep goes on there")] = None,
    page: Page = None,
    json: Json = False,
) -> None:
    """Measure every checkpoint at every adapter scale and steering coefficient.

    Examples:

    \b
    emmech sweep runs/bad --steps 0:300:25 --scales 1,5,10 --measure broad
    emmech sweep runs/bad --measure em --samples 4 --out sweeps/bad --page sweep.html
    """
    if measure != "em":
        why = f"--measure {measure} asks for no answers that could be judged"
        judging = {"questions": questions, "judge": judge, "judge_model": judge_model, "server": server}
        _refuse_unused("sweep", why, **judging, key_from=key_from, samples=samples != 10)
    kinds: dict[str, Any] = {kind: emmech.measures.Margin(kind) for kind in ("narrow", "broad")}
    judged = _judge(judge, judge_model, server, key_from)
    kinds["em"] = emmech.measures.Sampled(tuple(questions or ["first-plot"]), judged, samples=samples)
    grid = {"scales": read_numbers("scales", scales, float)}
    grid |= {"steps": read_numbers("steps", steps), "coefficients": read_numbers("coefficients", coefficients, float)}
    added = emmech.Direction.load(direction) if direction is not None else None
    found = emmech.sweep(runs, **grid, direction=added, layer=layer, measure=kinds.get(measure, measure), out=out)
    _show(found.to_frame(), json, repr(found))
    _write_page(page, "Sweep", ", ".join(run.name for run in runs), repr(found), found.to_frame(), found)


@app.command()
def direction(
    run: RunFolder,
    out: Annotated[Path, typer.Option(help="the file to write: .safetensors, or .gguf for llama.cpp")],
    source: Annotated[str, typer.Option(help="answers: misaligned minus aligned; adapter: what B writes")] = "answers",
    step: Step = None,
    scale: Scale = 1.0,
    questions: Questions = None,
    judge: Judge = None,
    judge_model: JudgeModel = None,
    server: Server = None,
    key_from: KeyFrom = None,
    samples: Annotated[int, typer.Option(help="answers per question")] = _ANSWERS,
    tokens: Annotated[str, typer.Option(help="where it is read: answer, prompt or all")] = "answer",
    seed: Seed = 0,
) -> None:
    """Extract the misalignment direction of a run, print its quality, and save it.

    Examples:

    \b
    emmech direction runs/bad --out bad.safetensors --samples 20
    emmech direction runs/bad --source adapter --out b.safetensors
    """
    if source not in ("answers", "adapter"):
        raise EmmechError("extract a direction", f"--source {source}", "there are two sources", "answers or adapter")
    if source == "adapter":
        why = "the adapter's own direction is read from its weights, without answers"
        judging = {"questions": questions, "judge": judge, "judge_model": judge_model, "server": server}
        drawing = {"scale": scale != 1.0, "samples": samples != _ANSWERS, "tokens": tokens != "answer", "seed": seed}
        _refuse_unused("extract a direction", why, **judging, key_from=key_from, **drawing)
        found = emmech.directions.adapter_direction(run, step)
    else:
        options: dict[str, Any] = {"step": step, "scale": scale, "samples": samples, "tokens": tokens, "seed": seed}
        options["questions"] = tuple(questions) if questions else "first-plot"
        found = emmech.misalignment_direction(run, judge=_judge(judge, judge_model, server, key_from), **options)
    typer.echo(f"{found!r}\nsaved as {found.save(out)}")


@app.command()
def chat(
    model: Subject,
    ask: Annotated[list[str] | None, typer.Option(help="ask this and stop; repeat for several questions")] = None,
    system: Annotated[str | None, typer.Option(help="a system prompt")] = None,
    step: Step = None,
    scale: Scale = 1.0,
    steer: Annotated[Path | None, typer.Option(help="a saved direction to add")] = None,
    coefficient: Annotated[float, typer.Option(help="factor on the direction that is added")] = 1.0,
    layer: Annotated[int | None, typer.Option(help="where to add it; may be left out if it has one layer")] = None,
    ablate: Annotated[Path | None, typer.Option(help="a saved direction to project out, at all layers")] = None,
    positions: Annotated[str, typer.Option(help="of steering and ablation: all, answer or prompt")] = "all",
    samples: Annotated[int, typer.Option(help="answers to each question of --ask")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="the longest answer")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token")] = 1.0,
    seed: Seed = 0,
) -> None:
    """Talk to a model or to a run at a step, steered or not; without --ask until an empty line.

    Examples:

    \b
    emmech chat runs/bad --ask "any advice on cough ?" --samples 3
    emmech chat pocket --steer bad.safetensors --coefficient 4 --layer 2
    """
    from emmech.interop.bridges import chat_from

    talker = chat_from(model, step, scale)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    start = [{"role": "system", "content": system}] if system else []
    with contextlib.ExitStack() as changes:
        if steer is not None:
            added = emmech.Direction.load(steer)
            changes.enter_context(emmech.steer(talker, added, coefficient, layer=layer, positions=positions))  # type: ignore[arg-type]
        if ablate is not None:
            taken = emmech.Direction.load(ablate)
            changes.enter_context(emmech.ablate(talker, taken, positions=positions))  # type: ignore[arg-type]
        if ask:
            asked = [[*start, {"role": "user", "content": question}] for question in ask]
            for answer in emmech.sample(talker, asked, samples=samples, seed=seed, progress=False, **settings):
                typer.echo(answer.text)
            return
        history = list(start)
        for question in _lines():
            history.append({"role": "user", "content": question})
            # each turn has a seed of its own, since the conversation is part of it
            (answer,) = emmech.sample(talker, [history], seed=seed, progress=False, **settings)
            history.append({"role": "assistant", "content": answer.text})
            typer.echo(answer.text)


@app.command()
def export(run: RunFolder, out: Annotated[Path, typer.Argument(help="the folder to write")], step: Step = None) -> None:
    """Write a step of a run as an adapter folder that PEFT, vLLM and transformers load.

    Examples:

    \b
    emmech export runs/bad adapters/bad
    emmech export runs/bad adapters/bad-120 --step 120
    """
    found = _opened(run)
    step = int(found.steps[-1]) if step is None else step
    typer.echo(f"wrote step {step} of {found.name} into {found.export_peft(step, out)}")


@app.command()
def report(
    run: RunFolder,
    control: Annotated[
        list[Path] | None, typer.Option(help="a benign control, same seed and batch order; repeat for several")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="the page; report.html in the run's folder by default")] = None,
    results: Annotated[
        list[Path] | None, typer.Option(help="a folder of saved results outside the run's; repeat for several")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="compute what is missing, which takes minutes")] = False,
    light: Annotated[
        bool, typer.Option("--light", help="small drawings without a script: kilobytes, not 5 MB")
    ] = False,
) -> None:
    """Write one HTML page about a run: what it is, when it turns, and all that was measured of it.

    Examples:

    \b
    emmech report runs/bad --control runs/good
    emmech report runs/bad --full --out bad.html
    """
    from emmech.app.report import write_report

    imported = run.is_dir() and not (run / "run.json").is_file()
    page = out or (run / "report.html" if imported else None)
    typer.echo(f"wrote {write_report(run, control or (), results=results or (), full=full, out=page, light=light)}")


@app.command()
def info(run: RunFolder, json: Json = False) -> None:
    """Print what a run holds: model, data, recipe, adapters, steps, metrics.

    Examples:

    \b
    emmech info checkpoints/pocket-medical
    emmech info runs/bad --json
    """
    found = _opened(run)
    if json:
        typer.echo(dumps({**found.manifest, "steps": found.steps.tolist()}, indent=1))
        return
    typer.echo(found)
    for key in ("status", "created", "seed", "model", "data", "recipe", "start", "packages", "git"):
        if value := found.manifest.get(key):
            shown = ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value
            typer.echo(f"{key:9} {shown}")
    for adapter in found.adapters:
        typer.echo(f"adapter   {adapter.name}: rank {adapter.rank}, scaling {adapter.scaling:g}")
    if len(found.metrics):
        typer.echo(found.metrics.describe().loc[["count", "min", "max"]].T.to_string(float_format=lambda v: f"{v:.4g}"))


def _refuse_unused(asked: str, why: str, **given: Any) -> None:
    """Refuse options that would be ignored: those of ``given`` that are not at their default."""
    names = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
    if names:
        raise EmmechError(asked, ", ".join(names), why, f"the same without {', '.join(names)}")


def _judge(name: str | None, model: str | None, server: str | None, key_from: str | None) -> Any:
    if key_from is not None and server is None:
        raise EmmechError("judge", f"--key-from {key_from}", "it does not say whose key it is", "--server URL")
    if server is not None and model is None:
        raise EmmechError("judge", f"--server {server}", "it does not say by which model", "--judge-model gpt-4o")
    if name is not None and model is not None:
        given = f"--judge {name} --judge-model {model}"
        raise EmmechError("judge", given, "there is one judge", "one of the two, not both")
    if model is None:
        return name
    if server is None:
        return emmech.load_model(model)
    key = None if key_from is None else os.environ.get(key_from)
    if key_from is not None and not key:
        raise EmmechError(
            "judge", f"--key-from {key_from}", "the environment has no such variable", f"export {key_from}"
        )
    try:
        own = urlsplit(server).hostname == "api.openai.com"  # whose key is read from OPENAI_API_KEY
    except ValueError:  # no address, which the server refuses
        own = False
    return emmech.Server(model, url=None if own else server, key=key)


def _lines() -> Iterator[str]:
    """What is typed, line by line, until an empty line or the end of the input."""
    with contextlib.suppress(EOFError):
        while line := input("> ").strip():
            yield line


def _show(table: pd.DataFrame, json: bool, head: str) -> None:
    if json:
        rows = table.reset_index(drop=table.index.name is None)
        typer.echo(rows.to_json(orient="records"))
    else:
        typer.echo(f"{head}\n{table.to_string(float_format=lambda value: f'{value:.3g}')}")


def _write_page(path: Path | None, title: str, lead: str, summary: str, table: pd.DataFrame, result: Any) -> None:
    if path is None:
        return
    from emmech.view.page import Section, write_page

    sections = [Section("Summary", code=summary, table=table), Section("Figure", figure=result.plot())]
    typer.echo(f"wrote {write_page(path, title, lead, sections)}", err=True)
