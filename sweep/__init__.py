"""lmsweep: many language models, many lm-eval tasks, one command."""

__version__ = "0.1.0"
