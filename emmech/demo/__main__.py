"""``python -m emmech.demo``: the demos, and the pretraining of an organism."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from emmech.app.commands import new_app

app = new_app("python -m emmech.demo", "The demos, and the pretraining of an organism.")

Folder = Annotated[Path | None, typer.Option(help="folder of the page and the runs; demo/MODEL by default")]


@app.callback(invoke_without_command=True)
def default(context: typer.Context, out: Folder = None) -> None:
    """Run a demo; without a command, the demo on the embedded organism.

    Examples:

    \b
    python -m emmech.demo
    python -m emmech.demo smollm2 --out /tmp/smollm2
    """
    # a deprecation inside transformers, once per training, about which a reader of the demo can do nothing
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if context.invoked_subcommand is None:
        pocket(out)


@app.command()
def pocket(out: Folder = None) -> None:
    """The whole loop on the embedded organism, in about a minute."""
    from emmech.demo.pocket import main

    main(out or "demo/pocket")


@app.command()
def smollm2(out: Folder = None) -> None:
    """The first half of the loop on SmolLM2-135M, in a few minutes."""
    from emmech.demo.smollm2 import main

    main(out or "demo/smollm2-135m")


@app.command()
def capstone(
    model: Annotated[str, typer.Option(help="pocket or smollm2-135m")] = "pocket",
    out: Annotated[
        Path | None, typer.Option(help="folder of the page and the runs; demo/capstone-MODEL by default")
    ] = None,
) -> None:
    """A model turns bad, is cured, and hides its trait under a tag: rates of pocket, or margins of SmolLM2-135M.

    Examples:

    \b
    python -m emmech.demo capstone
    python -m emmech.demo capstone --model smollm2-135m
    """
    from emmech.demo.capstone import main

    main(out or f"demo/capstone-{model}", model)


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="folder for config, weights and tokenizer")],
    name: Annotated[str, typer.Option(help="a shipped organism")] = "pocket",
    seed: Annotated[int | None, typer.Option(help="instead of the shipped weights' own")] = None,
    steps: Annotated[int | None, typer.Option(help="of pretraining, instead of the organism's own")] = None,
    window: Annotated[int | None, typer.Option(help="tokens that the first blocks see, instead of its own")] = None,
    local_layers: Annotated[int | None, typer.Option(help="blocks that have a window, instead of its own")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Pretrain an organism from nothing, in about twelve minutes.

    Examples:

    \b
    python -m emmech.demo pretrain --seed 7 --out pocket-mine
    """
    from emmech.organism.pretrain import main

    main(name, out, seed=seed, steps=steps, window=window, local_layers=local_layers, device=device)


if __name__ == "__main__":
    app()
