"""lmsweep: many language models, many lm-eval tasks, one command."""

from pathlib import Path

__version__ = "0.1.0"

ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds this package: sweep files lie in its conf/, child processes find the package by it."""
