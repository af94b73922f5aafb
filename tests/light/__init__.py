"""Evaluators without lm-eval, for sweeps that are about processes and not about scores."""

import os
from pathlib import Path


def python_path() -> str:
    """PYTHONPATH under which the evaluators of a sweep are light (sitecustomize.py)."""
    return os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
