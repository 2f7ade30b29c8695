"""``python -m emmech``: the command line."""

from emmech.cli import main

main()
