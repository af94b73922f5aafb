"""What stops a launch: the signals that ask for it, and a terminal that goes away."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, what batch systems send, and a terminal that was closed."""


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that gets the number of the first of SIGNALS; a second one ends the process at once, but for SIGHUP.

    Supervisors clean up behind a process that ends so. SIGHUP often comes twice, from the shell and from the kernel, or
    right after SIGTERM, and nobody is waiting.
    """
    got: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}
    listen(got)
    try:
        yield got
    except SystemExit as exited:  # how Ray's own handler of SIGTERM ends us while Ray starts
        raise SystemExit(128 + signal.SIGTERM) from exited
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _leave_dead_terminal()


def listen(got: list[int]) -> None:
    def note(number: int, _frame: FrameType | None) -> None:
        if got and number != signal.SIGHUP:
            os._exit(128 + number)
        got.append(number)
        _leave_dead_terminal()

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` wants to outlive the terminal
            signal.signal(number, note)


def _leave_dead_terminal() -> None:
    """Let what is still to be written vanish where the terminal has gone, so that tidying up cannot fail of it."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
