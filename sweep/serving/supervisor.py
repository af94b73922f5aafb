"""Runs a command so that neither it nor anything it starts outlives whoever started this. Run as a program:

    python -S -E supervisor.py [--grace SECONDS] [--mask NAMES] -- COMMAND...

The starter keeps a pipe open to our stdin. When that pipe ends, however the starter died, the command gets SIGTERM and
SECONDS to end, and then every descendant is killed. A line with a number on the pipe replaces SECONDS. The same happens
on SIGTERM, SIGINT and SIGHUP; and when the command ends by itself, what it left running is ended too (vLLM's EngineCore
does not notice that its API server is gone and would hold the GPU: vLLM issue 55510).

Our stdout is a pipe back to the starter: one line, `exit CODE` or `signal NUMBER`, comes as soon as the command has
ended, by itself or not, and the pipe's end when nothing is left. Our exit code is the command's, or 128 + signal.

The command's stdout and stderr come to our stderr, the log, as it writes them. The values of the environment variables
NAMES (with commas between them) are replaced by `***` there. What the command wrote before it ended is in the log
before the line on stdout. What the log cannot take (a full disk) is lost and counted; the command never waits for it.

Nothing is left of its files either. It gets a folder of its own for temporary ones, which is removed, and what it made
in /dev/shm is unlinked: both outlive a process that is killed.

Two processes, because neither alone is safe. The first stays in the starter's process group, where anyone may kill it:
a Ray worker sends SIGKILL to its direct children when it exits, so whatever must clean up cannot be one. The second
leads a session of its own, adopts orphans, is told when the first dies, and does the work. Should the second be killed,
its descendants fall to the first, which kills them and removes their files.

Only the standard library, and no site packages (`-S -E`): two of these run beside every server, about 12 MB each.
"""

import argparse
import ctypes
import getpass
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

ORPHANS_GRACE_S = 2.0
"""For what a dead server left behind: enough for vLLM's processes to unlink their shared memory, short for a GPU."""

TRACKERS_GRACE_S = 1.0
"""Python's resource tracker unlinks what killed processes left, as soon as the last of them is gone: 0.1 s."""

KILL_WAIT_S = 10.0
"""A process that SIGKILL does not end within this hangs in the kernel and ends when the kernel lets it."""

POLL_S = 0.05

LOOK_S = 1.0
"""Between two looks at /dev/shm: a process that is killed takes with it the proof that a file there was its own."""

MASK = b"***"
SECRET_LEAST = 8
"""Shorter values would be found in innocent text, and hide more of it than they protect."""

PIPE_BYTES = 64 * 1024
"""What a pipe holds: one read takes all that was written before it."""

SOCKET_PATH_MOST = 107
SOCKET_NAME_BYTES = 37
"""vLLM's sockets are named by a UUID; where no more than that fits below a folder, it cannot hold them."""

SHARED_MEMORY = "/dev/shm"

Entry = tuple[str, int]
"""A file of /dev/shm: name and inode, since a name may be taken again."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run a command that does not outlive the process which started this.")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("--mask", default="", help="environment variables whose values the log shall not hold")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)

    # Blocked until there are handlers: a stage that ended here would leave its folder behind.
    signal.pthread_sigmask(signal.SIG_SETMASK, STOPS)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    first = os.getpid()
    adopt_orphans()
    try:
        files = Files()
    except OSError as error:
        say(f"no folder for temporary files: {error}")
        return 1
    try:
        second = os.fork()
    except OSError as error:
        say(f"no second process: {error}")
        files.remove()
        return 1
    if second:
        return relay(second, files)
    secrets = [os.environb.get(os.fsencode(name), b"") for name in options.mask.split(",")]
    return supervise(options.command, Mask(secrets), files, grace_s=options.grace, first=first)


def relay(second: int, files: "Files") -> int:
    """The first process: passes signals on, ends as the second did, cleans up after it if it was killed."""

    def forward(number: int, _: FrameType | None) -> None:
        send(second, number)

    def pause() -> None:
        time.sleep(POLL_S)
        for _ in ended_children():
            pass

    for number in STOPS:
        signal.signal(number, forward)
    # Empty, whatever our starter had blocked: that is inherited and would leave us deaf.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    code = os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
    end_descendants(files, pause, gently=False)
    files.remove()
    return code if code >= 0 else 128 - code


def supervise(command: list[str], mask: "Mask", files: "Files", *, grace_s: float, first: int) -> int:
    """The second process: starts the command, waits for a reason to stop, leaves nothing behind."""
    os.setsid()
    die_with_parent(signal.SIGTERM)
    if os.getppid() != first:
        files.remove()
        return 1  # it died before the line above, nothing is started yet
    adopt_orphans()
    reset_priorities()
    wake, waker = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    for number in (*STOPS, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())

    running = Command(command, mask, files)
    reason = ""
    next_look = time.monotonic() + LOOK_S
    poll = select.poll()
    for descriptor in (0, wake, running.output.reader):
        poll.register(descriptor, select.POLLIN)
    while not reason and running.status is None:
        ready = {descriptor for descriptor, _ in poll.poll(1000 * max(0.0, next_look - time.monotonic()))}
        if running.output.reader in ready:
            running.output.copy()
        if wake in ready:
            stops = set(os.read(wake, 512)).intersection(STOPS)
            reason = ", ".join(signal.Signals(number).name for number in stops)
            running.reap()
        if 0 in ready:
            line = os.read(0, 64)
            if line:
                grace_s = float(line.split()[-1])
            else:
                reason = "the starter closed its pipe or is gone"
        if time.monotonic() >= next_look:
            files.look()
            next_look = time.monotonic() + LOOK_S

    if reason:
        say(f"{reason}: the server gets SIGTERM and {grace_s:g} s to end")
        files.look(again=True)
        send(running.pid, signal.SIGTERM)
        wait_until(lambda: running.status is not None, grace_s, running.pause)
    end_descendants(files, running.pause, gently=running.status is not None)
    running.output.close()
    files.remove()
    if running.status is None:
        return 1  # not even SIGKILL ended it in time
    code = os.waitstatus_to_exitcode(running.status)
    say(f"the server ended ({'exit code' if code >= 0 else 'signal'} {abs(code)}) and nothing is left of it")
    return code if code >= 0 else 128 - code


class Command:
    """The running command: its output is copied and its end reported whenever this gets a turn."""

    def __init__(self, command: list[str], mask: "Mask", files: "Files") -> None:
        self.output = Output(mask)
        self.pid = spawn(command, self.output.writer, files)
        self.status: int | None = None
        """Its wait status, once it has ended."""

    def reap(self) -> None:
        """Takes leave of children that have ended, adopted orphans among them, and reports the command's end."""
        for pid, status in ended_children():
            if pid == self.pid:
                self.status = status
                # The starter looks for the cause in the log when it reads the line.
                self.output.copy()
                code = os.waitstatus_to_exitcode(status)
                with suppress(OSError):
                    os.write(1, f"exit {code}\n".encode() if code >= 0 else f"signal {-code}\n".encode())

    def pause(self) -> None:
        """POLL_S in which a server that talks while it ends is not held up by a full pipe."""
        self.output.copy_for(POLL_S)
        self.reap()


class Output:
    """The pipe from the command and all that inherits it, copied to the log."""

    def __init__(self, mask: "Mask") -> None:
        # We keep the writing end too: a pipe that ended would be ready for ever.
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self._mask = mask
        self._lost = 0
        self._why: str | None = ""

    def copy(self) -> None:
        """Everything that has been written up to now."""
        with suppress(BlockingIOError):
            self._write(self._mask.apply(os.read(self.reader, PIPE_BYTES)))

    def copy_for(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left_s := deadline - time.monotonic()) > 0:
            if select.select([self.reader], [], [], left_s)[0]:
                self.copy()

    def close(self) -> None:
        self.copy()
        self._write(self._mask.rest())

    def _write(self, data: bytes) -> None:
        """A server without a log is worth more than none, so what cannot be written is counted and dropped."""
        if self._lost and say(f"{self._lost} bytes of the log are lost: {self._why}"):
            self._lost = 0
        try:
            while data:
                data = data[os.write(2, data) :]
        except OSError as error:
            self._lost += len(data)
            self._why = error.strerror


class Mask:
    """Replaces secrets in a stream of bytes, also where a secret comes in pieces."""

    def __init__(self, secrets: Sequence[bytes]) -> None:
        """Those of fewer than SECRET_LEAST bytes are left alone."""
        # The longest first: a shorter one may be its beginning.
        self._secrets = sorted({s for s in secrets if len(s) >= SECRET_LEAST}, key=len, reverse=True)
        self._pattern = re.compile(b"|".join(map(re.escape, self._secrets)) or b"(?!)")
        self._held = b""

    def apply(self, data: bytes) -> bytes:
        """What can be shown by now: all but an end that may be a secret's beginning, which waits for more."""
        data = self._held + data
        shown = []
        start, hold = 0, self._beginning(data, 0)
        while (found := self._pattern.search(data, start)) and found.start() < hold:
            shown += [data[start : found.start()], MASK]
            start = found.end()
            if start > hold:
                hold = self._beginning(data, start)
        self._held = data[hold:]
        return b"".join([*shown, data[start:hold]])

    def rest(self) -> bytes:
        """At the stream's end: most of a secret is as good as the secret."""
        held, self._held = self._held, b""
        return held if len(held) < SECRET_LEAST else MASK

    def _beginning(self, data: bytes, start: int) -> int:
        """Where the longest end of `data` that could grow into a secret begins."""
        longest = min(len(self._secrets[0]) - 1, len(data) - start) if self._secrets else 0
        for length in range(longest, 0, -1):
            end = data[-length:]
            if any(len(secret) > length and secret.startswith(end) for secret in self._secrets):
                return len(data) - length
        return len(data)


class Files:
    """What the command may leave on disk and in memory. Made before anything is started, by both stages alike."""

    def __init__(self) -> None:
        """Raises OSError when there is nowhere to put temporary files."""
        self.temporary = tempfile.gettempdir()
        """Where they would have gone."""
        self.scratch = tempfile.mkdtemp(prefix="lmsweep-", dir=self.temporary)
        """A folder of the command's own, for which TMPDIR is set."""
        if len(os.fsencode(self.scratch)) + SOCKET_NAME_BYTES > SOCKET_PATH_MOST:
            os.rmdir(self.scratch)
            self.scratch = tempfile.mkdtemp(prefix="lmsweep-", dir="/tmp")
        self._before = self._seen = entries()
        self._ours: set[Entry] = set()

    def look(self, *, again: bool = False) -> None:
        """Remember which files of /dev/shm are our descendants'; `again` asks about those of strangers once more.

        A file is theirs when it is younger than we are and one of them maps it.
        """
        now = entries()
        new = now - (self._before if again else self._seen) - self._ours
        self._seen = now
        if new:
            for pid in descendants():
                self._ours |= mapped(pid, new)

    def remove(self) -> None:
        """Everything, when no descendant is left; except a file of /dev/shm that someone else maps as well."""
        if left := self._ours & entries():
            for pid in pids():
                left -= mapped(pid, left)
            for name, _ in sorted(left):
                try:
                    os.unlink(f"{SHARED_MEMORY}/{name}")
                    say(f"removed {SHARED_MEMORY}/{name}")
                except FileNotFoundError:
                    pass  # the other stage was here
                except OSError as error:
                    say(f"cannot remove {SHARED_MEMORY}/{name}: {error}")
        try:
            shutil.rmtree(self.scratch)
        except FileNotFoundError:
            pass  # the other stage was here
        except OSError as error:
            say(f"cannot remove {self.scratch}: {error}")

    def variables(self) -> dict[str, str]:
        """Environment of the command: temporary files go into `scratch`, torch's compile caches where they would be.

        Torch keeps them below TMPDIR, and would compile everything anew at each start.
        """
        try:
            user = getpass.getuser()
        except (KeyError, ImportError, OSError):
            user = f"uid_{os.getuid()}"
        name = "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user)  # as torch names it
        caches = Path(self.temporary, name)
        with suppress(OSError):  # torch will say so
            caches.mkdir(exist_ok=True)
        # Precompiled headers (120 MB) are sought below TMPDIR in any case.
        Path(self.scratch, name).symlink_to(caches)
        variables = {**os.environ, "TMPDIR": self.scratch}
        variables.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches))
        return variables


def spawn(command: list[str], output: int, files: Files) -> int:
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
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.execvpe(command[0], command, files.variables())
    except OSError as error:
        say(f"cannot run {command[0]}: {error}")
    finally:
        os._exit(127)


def end_descendants(files: Files, pause: Callable[[], None], *, gently: bool) -> None:
    """Returns when no descendant is left; `gently` sends SIGTERM first. `pause` waits a little and reaps."""
    files.look(again=True)
    if gently:
        for pid in descendants():
            send(pid, signal.SIGTERM)
        wait_until(lambda: not descendants(), ORPHANS_GRACE_S, pause)
        files.look(again=True)
    started = time.monotonic()
    # Again and again, since what is killed may have been starting something.
    while (left := descendants()) and (waited_s := time.monotonic() - started) < KILL_WAIT_S:
        for pid in left:
            if waited_s > TRACKERS_GRACE_S or not tracks_resources(pid):
                send(pid, signal.SIGKILL)
        pause()


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def descendants() -> list[int]:
    """Pids of our children, their children and so on, from one walk over /proc."""
    children: dict[int, list[int]] = {}
    for pid in pids():
        with suppress(OSError), open(f"/proc/{pid}/stat", "rb") as stat:
            # The parent is the second field after the name, which stands in brackets and may hold anything.
            parent = int(stat.read().rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(pid)
    found: list[int] = []
    ahead = [os.getpid()]
    while ahead:
        below = children.get(ahead.pop(), [])
        found += below
        ahead += below
    return found


def tracks_resources(pid: int) -> bool:
    """Whether it is a resource tracker, of Python's multiprocessing or of loky."""
    with suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return b"resource_tracker" in file.read()
    return False


def entries() -> frozenset[Entry]:
    """The files in /dev/shm."""
    with suppress(OSError), os.scandir(SHARED_MEMORY) as found:
        return frozenset((entry.name, entry.inode()) for entry in found)
    return frozenset()


def mapped(pid: int, among: Iterable[Entry]) -> set[Entry]:
    """Which of these files of /dev/shm a process maps; none when it is not ours to look at.

    By inode: a semaphore is mapped under another name, which glibc gives it while it makes it.
    """
    with suppress(OSError), open(f"/proc/{pid}/maps", "rb") as file:
        # Address, rights, offset, device, inode, path.
        inodes = {int(line.split(maxsplit=5)[4]) for line in file.read().splitlines() if b" /dev/shm/" in line}
        return {(name, inode) for name, inode in among if inode in inodes}
    return set()


def ended_children() -> Iterator[tuple[int, int]]:
    """Pid and wait status of each child that has ended."""
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            yield pid, status


def wait_until(condition: Callable[[], bool], timeout_s: float, pause: Callable[[], None]) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        pause()


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


def say(text: str) -> bool:
    """Whether one line got into the server's log; unbuffered, because two processes share it."""
    with suppress(OSError):
        return os.write(2, f"supervisor: {text}\n".encode()) > 0
    return False


if __name__ == "__main__":
    sys.exit(main())
