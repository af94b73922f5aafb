"""Each claim about speed as a command: `python -m bench.<name>` prints what it compared and one JSON line a row."""
