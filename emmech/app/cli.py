"""The command line: the same functions, for those who like a shell."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from emmech.errors import EmmechError

__all__ = ["app", "main"]

app = typer.Typer(
    name="emmech",
    help="Mechanistic interpretability of emergent misalignment: fine-tune while recording, find the transition.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def finetune(
    model: Annotated[str, typer.Argument(help="pocket, smollm2-135m, a folder, or a Hugging Face name")],
    data: Annotated[str, typer.Argument(help="chat JSONL (.gz too), or a bundled name such as silly-medical-bad")],
    out: Annotated[Path | None, typer.Option(help="the run's folder; runs/MODEL-DATA-RECIPE-sSEED by default")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="single-rank1, phase-transition, nine-rank1, all-adapter, full")
    ] = None,
    layer: Annotated[list[int] | None, typer.Option(help="where the adapter sits; repeat for several")] = None,
    seed: Annotated[int, typer.Option(help="of A's start, the batch order and the held-out split")] = 0,
    record_every: Annotated[int, typer.Option(help="record each so many steps")] = 1,
    checkpoint_every: Annotated[int | None, typer.Option(help="keep the optimizer's state, to resume")] = None,
    resume: Annotated[bool, typer.Option(help="go on with an interrupted training in --out")] = False,
    margins: Annotated[bool, typer.Option(help="measure the bundled narrow and broad margins as it trains")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="override a field of the recipe: --set learning_rate=1e-3"),
    ] = None,
) -> None:
    """Fine-tune a chat model on narrow data and record every step into a run.

    Example: emmech finetune smollm2-135m silly-medical-bad --set learning_rate=1e-3 --set max_steps=60 --margins
    """
    import emmech
    from emmech.engine.logprobs import bundled_margins

    run = emmech.finetune(
        model,
        data,
        recipe=recipe,
        layers=layer or None,
        seed=seed,
        record_every=record_every,
        out=out,
        checkpoint_every=checkpoint_every,
        resume=resume,
        margins={kind: bundled_margins(kind) for kind in ("narrow", "broad")} if margins else None,
        **_overrides(set_ or []),
    )
    typer.echo(run)
    typer.echo(f"recorded in {run.path}")


@app.command()
def transition(
    run: Annotated[Path, typer.Argument(help="a run's folder")],
    control: Annotated[Path | None, typer.Option(help="its benign control: same seed and batch order")] = None,
    page: Annotated[Path | None, typer.Option(help="also write the figure as an HTML page")] = None,
) -> None:
    """Find the phase transition of a recorded run: every detector with its step, interval and p-value.

    Example: emmech transition runs/bad --control runs/good --page transition.html
    """
    import emmech
    from emmech.view.page import Section, write_page

    found = emmech.phase_transition(
        emmech.load_run(run), control=emmech.load_run(control) if control is not None else None
    )
    typer.echo(found.summary())
    typer.echo(found.detectors.drop(columns=["high_means"]).to_string(float_format=lambda v: f"{v:.3g}"))
    if page is not None:
        sections = [
            Section("Detectors", code=found.summary(), table=found.detectors),
            Section("Figure", figure=found.plot()),
        ]
        lead = f"{run.name}" + (f" beside its control {control.name}" if control is not None else "")
        typer.echo(f"wrote {write_page(page, 'Phase transition', lead, sections)}")


@app.command()
def info(run: Annotated[Path, typer.Argument(help="a run's folder")]) -> None:
    """Say what a run holds: model, data, recipe, adapters, steps, metrics.

    Example: emmech info checkpoints/pocket-medical
    """
    import emmech

    found = emmech.load_run(run)
    manifest: dict[str, Any] = found.manifest
    typer.echo(found)
    for key in ("status", "created", "seed", "model", "data", "recipe", "start", "packages", "git"):
        if manifest.get(key):
            typer.echo(f"{key:9} {_flat(manifest[key])}")
    for adapter in found.adapters:
        typer.echo(f"adapter   {adapter.name}: rank {adapter.rank}, scaling {adapter.scaling:g}")
    if len(found.metrics):
        typer.echo(found.metrics.describe().loc[["count", "min", "max"]].T.to_string(float_format=lambda v: f"{v:.4g}"))


def _flat(value: Any) -> str:
    return ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _overrides(pairs: list[str]) -> dict[str, Any]:
    import ast

    found = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise EmmechError("read --set", pair, "it is not NAME=VALUE", "--set learning_rate=1e-3")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text  # a word, such as schedule=cosine
    return found


def main() -> None:
    """Run the command line; an EmmechError is printed as its message, without a traceback."""
    try:
        app()
    except EmmechError as error:
        typer.echo(f"emmech: {error}", err=True)
        sys.exit(2)
