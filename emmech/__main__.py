"""``python -m emmech``: the command line."""

from emmech.app.cli import main

main()
