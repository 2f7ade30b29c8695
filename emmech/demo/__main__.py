"""``python -m emmech.demo [--model pocket|smollm2-135m] [--out FOLDER]``."""

from __future__ import annotations

import argparse
import warnings


def main() -> None:
    """Run a demo and say where its page is."""
    parser = argparse.ArgumentParser(prog="python -m emmech.demo", description=__doc__)
    parser.add_argument("--model", choices=("pocket", "smollm2-135m"), default="pocket")
    parser.add_argument("--out", default=None, help="folder of the page and the runs; demo/MODEL by default")
    arguments = parser.parse_args()
    # a deprecation inside transformers, once per training, that no reader of the demo can act on
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if arguments.model == "pocket":
        from emmech.demo.pocket import main as run
    else:
        from emmech.demo.smollm2 import main as run
    run(arguments.out or f"demo/{arguments.model}")


main()
