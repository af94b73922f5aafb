"""Runs a command so that neither it nor anything it starts outlives whoever started this. Run as a program:

    python -S -E supervisor.py [--grace SECONDS] -- COMMAND...

The starter keeps a pipe open to our stdin. When that pipe ends, however the starter died, the command gets SIGTERM and
SECONDS to end, and then every descendant is killed. A line with a number on the pipe replaces SECONDS. The same happens
on SIGTERM, SIGINT and SIGHUP; and when the command ends by itself, what it left running is ended too (vLLM's EngineCore
does not notice that its API server is gone and would hold the GPU: vLLM issue 55510).

Our stdout is a pipe back to the starter: one line, `exit CODE` or `signal NUMBER`, tells how the command ended, and the
pipe's end that nothing is left. The command's own output goes to our stderr. Our exit code is the command's, or
128 + signal.

Two processes, because neither alone is safe. The first stays in the starter's process group, where anyone may kill it:
a Ray worker sends SIGKILL to its direct children when it exits, so whatever must clean up cannot be one. The second
leads a session of its own, adopts orphans, is told when the first dies, and does the work. Should the second be killed,
its descendants fall to the first, which kills them.

Only the standard library, and no site packages (`-S -E`): two of these run beside every server, about 10 MB each.
"""

import argparse
import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

ORPHANS_GRACE_S = 2.0
"""For what a dead server left behind: enough for vLLM's processes to unlink their shared memory, short for a GPU."""

KILL_WAIT_S = 10.0
"""A process that SIGKILL does not end within this hangs in the kernel and ends when the kernel lets it."""

POLL_S = 0.05


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run a command that does not outlive the process which started this.")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)

    # A starter's blocked or ignored signals are inherited and would leave us deaf.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    first = os.getpid()
    adopt_orphans()
    second = os.fork()
    if second:
        return relay(second)
    return supervise(options.command, grace_s=options.grace, first=first)


def relay(second: int) -> int:
    """The first process: passes signals on, ends as the second did, cleans up after it if it was killed."""

    def forward(number: int, _: FrameType | None) -> None:
        send(second, number)

    for number in STOPS:
        signal.signal(number, forward)
    code = os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
    end_descendants({}, gently=False)
    return code if code >= 0 else 128 - code


def supervise(command: list[str], *, grace_s: float, first: int) -> int:
    """The second process: starts the command, waits for a reason to stop, leaves nothing behind."""
    os.setsid()
    die_with_parent(signal.SIGTERM)
    if os.getppid() != first:
        return 1  # it died before the line above, nothing is started yet
    adopt_orphans()
    reset_priorities()
    wake, waker = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    for number in (*STOPS, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)

    server = spawn(command)
    exits: dict[int, int] = {}
    reason = ""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    poll.register(wake, select.POLLIN)
    while not reason and server not in exits:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if wake in ready:
            stops = set(os.read(wake, 512)).intersection(STOPS)
            reason = ", ".join(signal.Signals(number).name for number in stops)
            reap(exits)
        if 0 in ready:
            line = os.read(0, 64)
            if line:
                grace_s = float(line.split()[-1])
            else:
                reason = "the starter closed its pipe or is gone"

    if reason:
        say(f"{reason}: the server gets SIGTERM and {grace_s:g} s to end")
        send(server, signal.SIGTERM)
        wait_until(lambda: server in exits, grace_s, exits)
    ended = server in exits
    end_descendants(exits, gently=ended)
    if server not in exits:
        return 1  # not even SIGKILL ended it in time
    code = os.waitstatus_to_exitcode(exits[server])
    with suppress(OSError):
        os.write(1, f"exit {code}\n".encode() if code >= 0 else f"signal {-code}\n".encode())
    say(f"the server ended ({'exit code' if code >= 0 else 'signal'} {abs(code)}) and nothing is left of it")
    return code if code >= 0 else 128 - code


def spawn(command: list[str]) -> int:
    """The pid of the running command, which dies with us and leads a session of its own."""
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.set_wakeup_fd(-1)
        # Python ignores SIGPIPE, and what is ignored stays so across exec.
        for number in (*STOPS, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        die_with_parent(signal.SIGKILL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        os.execvp(command[0], command)
    except OSError as error:
        say(f"cannot run {command[0]}: {error}")
    finally:
        os._exit(127)


def end_descendants(exits: dict[int, int], *, gently: bool) -> None:
    """Returns when no descendant is left; `gently` sends SIGTERM first."""
    if gently:
        for pid in descendants():
            send(pid, signal.SIGTERM)
        wait_until(lambda: not descendants(), ORPHANS_GRACE_S, exits)
    deadline = time.monotonic() + KILL_WAIT_S
    # Again and again, since what is killed may have been starting something.
    while (left := descendants()) and time.monotonic() < deadline:
        for pid in left:
            send(pid, signal.SIGKILL)
        time.sleep(POLL_S)
        reap(exits)
    reap(exits)


def descendants() -> list[int]:
    """Pids of our children, their children and so on, from one walk over /proc."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError), open(f"/proc/{name}/stat", "rb") as stat:
                # The parent is the second field after the name, which stands in brackets and may hold anything.
                parent = int(stat.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found: list[int] = []
    ahead = [os.getpid()]
    while ahead:
        below = children.get(ahead.pop(), [])
        found += below
        ahead += below
    return found


def reap(exits: dict[int, int]) -> None:
    """Adds the wait status of every child that has ended, adopted orphans among them."""
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            exits[pid] = status


def wait_until(condition: Callable[[], bool], timeout_s: float, exits: dict[int, int]) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(POLL_S)
        reap(exits)


def send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def adopt_orphans() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(number: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def reset_priorities() -> None:
    """Undo what a Ray worker hands down: nice 15, and first in line when memory runs out. Lowering may need rights."""
    with suppress(OSError):
        if os.getpriority(os.PRIO_PROCESS, 0) > 0:
            os.setpriority(os.PRIO_PROCESS, 0, 0)
    with suppress(OSError), open("/proc/self/oom_score_adj", "r+") as score:
        if int(score.read()) > 0:
            score.seek(0)
            score.write("0")


def say(text: str) -> None:
    """One line into the server's log; unbuffered, because two processes share it."""
    with suppress(OSError):
        os.write(2, f"supervisor: {text}\n".encode())


if __name__ == "__main__":
    sys.exit(main())
