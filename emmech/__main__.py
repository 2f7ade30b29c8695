"""``python -m emmech``: the command line."""

from emmech.app.cli import app

app()
