"""`python launch.py conf=<sweep>`: see sweep/cli.py, or run it with --help."""

import sys

from sweep.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
