"""`python launch.py conf=<sweep>`: see sweep/cli.py, or run it with --help."""

import sys
from importlib.util import find_spec

from sweep.cli import main

if __name__ == "__main__":
    if lacking := [name for name in ("lm_eval", "msgspec", "ray") if find_spec(name) is None]:
        sys.stderr.write(
            f"error: {sys.executable} lacks {', '.join(lacking)}; `make setup` makes .venv, and `. .venv/bin/activate` "
            "makes its Python the one that `python` starts\n"
        )
        sys.exit(2)
    sys.exit(main(sys.argv[1:]))
