"""Nothing of a server is left, whatever is killed: a light tree of three processes stands for vLLM's."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

SUPERVISOR = Path(__file__).parent.parent / "sweep" / "supervisor.py"
PYTHON = [sys.executable, "-S", "-E"]

TREE = """
import os, pathlib, signal, subprocess, sys
folder, level, deaf = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "deaf"
def end(*_):
    (folder / f"term-{level}").touch()
    sys.exit(7)
signal.signal(signal.SIGTERM, signal.SIG_IGN if deaf else end)
if level < 2:
    subprocess.Popen([sys.executable, "-S", "-E", "-c", sys.argv[4], str(folder), str(level + 1), *sys.argv[3:]])
(folder / f"new-{level}").write_text(f"{os.getpid()} {os.getpriority(os.PRIO_PROCESS, 0)}")
(folder / f"new-{level}").rename(folder / f"pid-{level}")
while True:
    signal.pause()
"""
"""argv: folder, level, `deaf` (ignores SIGTERM) or `polite`, this source. Writes its pid when it is ready."""

STARTER = """
import subprocess, sys, time
subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)
time.sleep(600)
"""
"""A process that owns a supervisor, as an actor does."""


def until(condition: Callable[[], object], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def gone(process: psutil.Process) -> bool:
    """A zombie counts as gone: its parent may be a container's init that does not wait."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Family:
    """A supervisor over the tree, all its processes found by pid."""

    def __init__(self, folder: Path, *, kind: str = "polite", grace_s: float = 10.0, starter: bool = False) -> None:
        self.folder = folder
        command = [*PYTHON, str(SUPERVISOR), "--grace", str(grace_s), "--"]
        command += [*PYTHON, "-c", TREE, str(folder), "0", kind, TREE]
        self.owner = subprocess.Popen(
            [*PYTHON, "-c", STARTER, *command] if starter else command,
            stdin=None if starter else subprocess.PIPE,
            stdout=None if starter else subprocess.PIPE,
            # Where tests run as one process group, Ctrl-C would otherwise reach it too.
            start_new_session=True,
        )
        until(lambda: all((folder / f"pid-{level}").is_file() for level in range(3)))
        self.server, self.engine, self.worker = (
            psutil.Process(int((folder / f"pid-{level}").read_text().split()[0])) for level in range(3)
        )
        self.second = self.server.parent()
        self.first = self.second.parent()
        self.everyone = [self.first, self.second, self.server, self.engine, self.worker]

    def left(self) -> list[psutil.Process]:
        return [process for process in self.everyone if not gone(process)]

    def got_sigterm(self) -> set[int]:
        return {int(path.name.removeprefix("term-")) for path in self.folder.glob("term-*")}


@pytest.fixture
def families() -> Iterator[list[Family]]:
    """Families that a test started; what a failed test leaves is killed."""
    started: list[Family] = []
    yield started
    for family in started:
        for process in family.left():
            process.kill()
        family.owner.kill()
        family.owner.wait()
        for pipe in (family.owner.stdin, family.owner.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()


def test_the_supervisor_leads_a_session_of_its_own_and_so_does_the_server(
    tmp_path: Path, families: list[Family]
) -> None:
    family = Family(tmp_path)
    families.append(family)
    assert os.getsid(family.first.pid) != os.getsid(family.second.pid) != os.getsid(family.server.pid)


@pytest.mark.parametrize(
    ("victim", "number"),
    [
        ("first", signal.SIGKILL),
        ("first", signal.SIGTERM),
        ("first", signal.SIGINT),
        ("first", signal.SIGHUP),
        ("second", signal.SIGKILL),
        ("server", signal.SIGKILL),
        ("server", signal.SIGSEGV),
    ],
)
def test_nothing_is_left_when_one_of_them_gets_a_signal(
    victim: str, number: signal.Signals, tmp_path: Path, families: list[Family]
) -> None:
    family = Family(tmp_path)
    families.append(family)
    getattr(family, victim).send_signal(number)
    until(lambda: not family.left())


@pytest.mark.parametrize("kind", ["polite", "deaf"])
def test_nothing_is_left_when_the_starter_is_killed(kind: str, tmp_path: Path, families: list[Family]) -> None:
    family = Family(tmp_path, kind=kind, grace_s=0.5, starter=True)
    families.append(family)
    family.owner.kill()
    until(lambda: not family.left())
    assert family.got_sigterm() == ({0, 1, 2} if kind == "polite" else set())


def test_nothing_is_left_when_starter_and_first_stage_are_killed_together(
    tmp_path: Path, families: list[Family]
) -> None:
    family = Family(tmp_path, starter=True)
    families.append(family)
    family.first.kill()
    family.owner.kill()
    until(lambda: not family.left())


def test_the_server_alone_is_asked_first_and_what_it_leaves_afterwards(tmp_path: Path, families: list[Family]) -> None:
    family = Family(tmp_path)
    families.append(family)
    assert family.owner.stdin is not None
    family.owner.stdin.close()
    until(lambda: not family.left())
    asked = [(tmp_path / f"term-{level}").stat().st_mtime_ns for level in range(3)]
    assert asked[0] < min(asked[1:])


def test_what_a_killed_server_leaves_gets_sigterm_so_that_it_can_free_its_shared_memory(
    tmp_path: Path, families: list[Family]
) -> None:
    family = Family(tmp_path)
    families.append(family)
    family.server.kill()
    until(lambda: not family.left())
    assert family.got_sigterm() == {1, 2}


def test_a_deaf_server_is_killed_after_the_grace(tmp_path: Path, families: list[Family]) -> None:
    family = Family(tmp_path, kind="deaf", grace_s=1.0)
    families.append(family)
    assert family.owner.stdin is not None
    started = time.monotonic()
    family.owner.stdin.close()
    until(lambda: not family.left())
    assert 1.0 <= time.monotonic() - started < 5.0


def test_a_number_on_the_pipe_replaces_the_grace(tmp_path: Path, families: list[Family]) -> None:
    family = Family(tmp_path, kind="deaf", grace_s=600.0)
    families.append(family)
    assert family.owner.stdin is not None
    family.owner.stdin.write(b"0.2\n")
    family.owner.stdin.close()
    until(lambda: not family.left())


@pytest.mark.parametrize(
    ("code", "report", "exit_code"),
    [
        ("raise SystemExit(0)", b"exit 0\n", 0),
        ("raise SystemExit(3)", b"exit 3\n", 3),
        ("import os; os.kill(os.getpid(), 9)", b"signal 9\n", 137),
    ],
)
def test_it_reports_and_repeats_how_the_command_ended(code: str, report: bytes, exit_code: int) -> None:
    with subprocess.Popen(
        [*PYTHON, str(SUPERVISOR), "--", *PYTHON, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read() == report
        assert process.wait(10) == exit_code


def test_the_report_ends_only_when_nothing_is_left(tmp_path: Path, families: list[Family]) -> None:
    family = Family(tmp_path)
    families.append(family)
    assert family.owner.stdout is not None
    family.first.kill()
    assert family.owner.stdout.read() == b"exit 7\n"
    assert [process for process in family.left() if process != family.second] == []


def test_a_command_that_cannot_run_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with subprocess.Popen([*PYTHON, str(SUPERVISOR), "--", "/no/such/program"], stdin=subprocess.PIPE) as process:
        assert process.wait(10) == 127
    assert "cannot run /no/such/program: [Errno 2] No such file or directory" in capfd.readouterr().err


def test_output_and_errors_of_the_command_go_to_the_log_and_it_reads_nothing(tmp_path: Path) -> None:
    code = "import sys; print(repr(sys.stdin.read())); print('err', file=sys.stderr)"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*PYTHON, str(SUPERVISOR), "--", *PYTHON, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    with process:
        assert process.stdout is not None
        process.stdout.read()
    lines = (tmp_path / "log").read_text().splitlines()
    assert "''" in lines
    assert "err" in lines


@pytest.mark.skipif(os.geteuid() != 0, reason="lowering nice needs rights that root has")
def test_the_niceness_that_a_ray_worker_hands_down_is_reset(tmp_path: Path) -> None:
    command = [
        *PYTHON,
        "-c",
        "import os, sys; print(os.nice(0), open('/proc/self/oom_score_adj').read(), file=sys.stderr)",
    ]
    worker = (
        "import os, subprocess, sys\nos.nice(15)\nopen('/proc/self/oom_score_adj', 'w').write('700')\n"
        "p = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE)\np.stdout.read()\np.wait()"
    )
    done = subprocess.run(
        [*PYTHON, "-c", worker, *PYTHON, str(SUPERVISOR), "--", *command], stderr=subprocess.PIPE, text=True, timeout=20
    )
    assert done.stderr.splitlines()[0].split() == ["0", "0"]
