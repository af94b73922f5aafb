"""Nothing of a server is left, whatever is killed: a light tree of three processes stands for vLLM's."""

import itertools
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from sweep.serving.supervisor import LOOK_S, SECRET_LEAST, Mask

SUPERVISOR = Path(__file__).parent.parent / "sweep" / "serving" / "supervisor.py"
PYTHON = [sys.executable, "-S", "-E"]

TREE = """
import mmap, os, pathlib, signal, subprocess, sys, tempfile
folder, level, deaf = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "deaf"
def end(*_):
    (folder / f"term-{level}").touch()
    sys.exit(7)
signal.signal(signal.SIGTERM, signal.SIG_IGN if deaf else end)
tempfile.mkstemp()
if level > 0:
    descriptor = os.open(f"/dev/shm/{folder.name}", os.O_CREAT | os.O_RDWR)
    os.ftruncate(descriptor, 4096)
    mapping = mmap.mmap(descriptor, 4096)
if level < 2:
    subprocess.Popen([sys.executable, "-S", "-E", "-c", sys.argv[4], str(folder), str(level + 1), *sys.argv[3:]])
(folder / f"new-{level}").write_text(f"{os.getpid()} {os.getpriority(os.PRIO_PROCESS, 0)}")
(folder / f"new-{level}").rename(folder / f"pid-{level}")
while True:
    signal.pause()
"""
"""argv: folder, level, `deaf` (ignores SIGTERM) or `polite`, this source. Writes its pid when it is ready.

Leaves a temporary file at each level, and a shared segment that the lower two hold and nobody frees.
"""

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

    def __init__(self, *, kind: str = "polite", grace_s: float = 10.0, starter: bool = False) -> None:
        # Directly under /tmp: pytest's folders are too long for a server's sockets.
        self.folder = Path(tempfile.mkdtemp(prefix="family-", dir="/tmp"))
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir()
        self.segment = Path("/dev/shm", self.folder.name)
        command = [*PYTHON, str(SUPERVISOR), "--grace", str(grace_s), "--"]
        command += [*PYTHON, "-c", TREE, str(self.folder), "0", kind, TREE]
        self.owner = subprocess.Popen(
            [*PYTHON, "-c", STARTER, *command] if starter else command,
            stdin=None if starter else subprocess.PIPE,
            stdout=None if starter else subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(self.temporary)},
            # Where tests run as one process group, Ctrl-C would otherwise reach it too.
            start_new_session=True,
        )
        until(lambda: all((self.folder / f"pid-{level}").is_file() for level in range(3)))
        self.server, self.engine, self.worker = (
            psutil.Process(int((self.folder / f"pid-{level}").read_text().split()[0])) for level in range(3)
        )
        self.second = self.server.parent()
        self.first = self.second.parent()
        self.everyone = [self.first, self.second, self.server, self.engine, self.worker]

    def left(self) -> list[psutil.Process]:
        return [process for process in self.everyone if not gone(process)]

    def files(self) -> list[Path]:
        """Temporary files and shared memory that are there now; torch's caches stay on purpose."""
        temporary = [path for path in self.temporary.glob("*/*") if path.parent.name.startswith("lmsweep-")]
        return [*temporary, *([self.segment] if self.segment.exists() else [])]

    def got_sigterm(self) -> set[int]:
        return {int(path.name.removeprefix("term-")) for path in self.folder.glob("term-*")}

    def close(self) -> None:
        """Ends what a test left running, as hard as it takes."""
        for process in self.left():
            process.kill()
        self.owner.kill()
        self.owner.wait()
        for pipe in (self.owner.stdin, self.owner.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()
        self.segment.unlink(missing_ok=True)
        shutil.rmtree(self.folder)


OpenFamily = Callable[..., Family]


@pytest.fixture
def family() -> Iterator[OpenFamily]:
    """Starts a family; what a failed test leaves of it is killed."""
    started: list[Family] = []

    def start(*, kind: str = "polite", grace_s: float = 10.0, starter: bool = False) -> Family:
        started.append(Family(kind=kind, grace_s=grace_s, starter=starter))
        assert len(started[-1].files()) == 5  # a temporary file of each, the link to the caches, the segment
        return started[-1]

    yield start
    for one in started:
        one.close()


def nothing_is_left(one: Family) -> None:
    until(lambda: not one.left())
    assert not one.files()
    assert [path.name for path in one.temporary.iterdir() if path.name.startswith("lmsweep-")] == []


def test_the_supervisor_leads_a_session_of_its_own_and_so_does_the_server(family: OpenFamily) -> None:
    one = family()
    assert os.getsid(one.first.pid) != os.getsid(one.second.pid) != os.getsid(one.server.pid)


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
    victim: str, number: signal.Signals, family: OpenFamily
) -> None:
    one = family()
    getattr(one, victim).send_signal(number)
    nothing_is_left(one)


@pytest.mark.parametrize("kind", ["polite", "deaf"])
def test_nothing_is_left_when_the_starter_is_killed(kind: str, family: OpenFamily) -> None:
    one = family(kind=kind, grace_s=0.5, starter=True)
    one.owner.kill()
    nothing_is_left(one)
    assert one.got_sigterm() == ({0, 1, 2} if kind == "polite" else set())


def test_nothing_is_left_when_starter_and_first_stage_are_killed_together(family: OpenFamily) -> None:
    one = family(starter=True)
    one.first.kill()
    one.owner.kill()
    nothing_is_left(one)


def test_the_server_alone_is_asked_first_and_what_it_leaves_afterwards(family: OpenFamily) -> None:
    one = family()
    assert one.owner.stdin is not None
    one.owner.stdin.close()
    nothing_is_left(one)
    asked = [(one.folder / f"term-{level}").stat().st_mtime_ns for level in range(3)]
    assert asked[0] < min(asked[1:])


def test_what_a_killed_server_leaves_gets_sigterm_so_that_it_can_free_its_shared_memory(family: OpenFamily) -> None:
    one = family()
    one.server.kill()
    nothing_is_left(one)
    assert one.got_sigterm() == {1, 2}


def test_a_deaf_server_is_killed_after_the_grace(family: OpenFamily) -> None:
    one = family(kind="deaf", grace_s=1.0)
    assert one.owner.stdin is not None
    started = time.monotonic()
    one.owner.stdin.close()
    until(lambda: not one.left())
    assert 1.0 <= time.monotonic() - started < 5.0
    nothing_is_left(one)


def test_a_number_on_the_pipe_replaces_the_grace(family: OpenFamily) -> None:
    one = family(kind="deaf", grace_s=600.0)
    assert one.owner.stdin is not None
    one.owner.stdin.write(b"0.2\n")
    one.owner.stdin.close()
    nothing_is_left(one)


# Reports


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


def test_the_report_ends_only_when_nothing_is_left(family: OpenFamily) -> None:
    one = family()
    assert one.owner.stdout is not None
    one.first.kill()
    assert one.owner.stdout.read() == b"exit 7\n"
    assert [process for process in one.left() if process != one.second] == []
    assert not one.files()


def test_a_death_is_reported_at_once_and_not_after_the_cleaning(family: OpenFamily) -> None:
    one = family(kind="deaf")
    assert one.owner.stdout is not None
    one.server.kill()
    assert one.owner.stdout.readline() == b"signal 9\n"
    assert not gone(one.engine)  # it gets two seconds
    assert one.owner.stdout.read() == b""
    assert gone(one.engine)
    assert gone(one.worker)


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


# The log


KEY = "sk-0123456789-abcdefghij"


class Logged:
    """A supervised Python command whose log is a file."""

    def __init__(self, folder: Path, code: str, *options: str, **environment: str) -> None:
        self.path = folder / "log"
        with self.path.open("wb") as log:
            self.process = subprocess.Popen(
                [*PYTHON, str(SUPERVISOR), *options, "--", *PYTHON, "-u", "-c", code, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "KEY": KEY, **environment},
            )

    def log(self) -> str:
        return self.path.read_text()

    def report(self) -> bytes:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@pytest.fixture
def logged(tmp_path: Path) -> Iterator[Callable[..., Logged]]:
    started: list[Logged] = []

    def start(code: str, *options: str, **environment: str) -> Logged:
        started.append(Logged(tmp_path, code, *options, **environment))
        return started[-1]

    yield start
    for one in started:
        with one.process:  # closes the pipes, at which it ends
            assert one.process.stdin is not None
            one.process.stdin.close()
            one.process.wait(30)


def shown(secrets: Sequence[str], pieces: Sequence[str]) -> str:
    mask = Mask([secret.encode() for secret in secrets])
    return b"".join([*(mask.apply(piece.encode()) for piece in pieces), mask.rest()]).decode()


@pytest.mark.parametrize(
    ("secrets", "text", "expected"),
    [
        ([], "nothing to hide", "nothing to hide"),
        ([KEY], f"key={KEY}\n", "key=***\n"),
        ([KEY], f"{KEY}{KEY} {KEY}", "****** ***"),
        ([KEY], f"sk-0123 {KEY[:-1]}! {KEY}", f"sk-0123 {KEY[:-1]}! ***"),
        (["aaaaaaaa"], "a" * 19 + "b", "***" * 2 + "aaab"),
        (["abababab", "babababaX"], "abababababaX abababab", "***abaX ***"),
        (["abcdefgh", "abcdefghijkl"], "abcdefgh abcdefghi abcdefghijkl", "*** ***i ***"),
        (["cdefghij", "abcdefghijkl"], "abcdefghijk abcdefghijkl cdefghij", "ab***k *** ***"),
        (["short"], "a short word", "a short word"),
        (["with\nlines."], "a with\nlines. b", "a *** b"),
        (["ключ-ключ"], "это ключ-ключ!", "это ***!"),
    ],
)
def test_a_secret_is_masked_wherever_the_stream_is_cut(secrets: list[str], text: str, expected: str) -> None:
    assert shown(secrets, [text]) == expected
    assert shown(secrets, list(text)) == expected
    for first, second in itertools.combinations(range(len(text) + 1), 2):
        assert shown(secrets, [text[:first], text[first:second], text[second:]]) == expected


def test_only_what_may_become_a_secret_waits_for_more() -> None:
    mask = Mask([KEY.encode()])
    assert mask.apply(b"loading 10 %\rloading 20 %s") == b"loading 10 %\rloading 20 %"
    assert mask.apply(b"k") == b""
    assert mask.apply(b"y") == b"sky"


@pytest.mark.parametrize("length", range(1, len(KEY)))
def test_a_stream_that_ends_within_a_secret_does_not_show_most_of_it(length: int) -> None:
    assert shown([KEY], ["x", KEY[:length]]) == ("x" + KEY[:length] if length < SECRET_LEAST else "x***")


def test_secrets_of_the_environment_reach_the_log_as_stars(logged: Callable[..., Logged]) -> None:
    code = (
        "import os, sys\nprint('out', os.environ['KEY'])\nprint('err', os.environ['OTHER'], file=sys.stderr)\n"
        "os.write(1, os.environ['KEY'][:9].encode())\nos.write(2, os.environ['KEY'][9:].encode())\nprint()"
    )
    one = logged(code, "--mask", "KEY,OTHER,NOT_SET,SHORT", OTHER="another-secret", SHORT="e")
    assert one.report() == b"exit 0\n"
    assert one.log() == "out ***\nerr ***\n***\n"


def test_lines_and_parts_of_lines_reach_the_log_while_the_command_runs(logged: Callable[..., Logged]) -> None:
    code = (
        "import pathlib, sys, time\n"
        "for step, text in enumerate(['a line\\n', 'loading 10 %', '\\rloading 20 %']):\n"
        "    sys.stdout.write(text)\n"
        "    while not pathlib.Path(sys.argv[1], f'go-{step}').exists(): time.sleep(0.02)\n"
    )
    one = logged(code, "--mask", "KEY")
    for step, text in enumerate(["a line\n", "a line\nloading 10 %", "a line\nloading 10 %\rloading 20 %"]):
        until(lambda text=text: one.path.read_bytes().decode() == text, 5.0)
        (one.path.parent / f"go-{step}").touch()
    assert one.report() == b"exit 0\n"


def test_the_last_words_are_in_the_log_when_the_end_is_reported_though_others_hold_the_pipe(
    logged: Callable[..., Logged],
) -> None:
    code = (
        "import os, subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-S', '-E', '-c', 'import signal; signal.signal(15, signal.SIG_IGN)\\n"
        'while True: print("noise " * 100, flush=True)\'])\n'
        "os.write(2, b'w' * 40000 + b'the cause')\nos.kill(os.getpid(), 9)"
    )
    one = logged(code)
    assert one.report() == b"signal 9\n"
    assert "the cause" in one.log()
    started = time.monotonic()
    assert one.report() == b""
    assert time.monotonic() - started < 10


def test_a_storm_of_lines_passes_whole(logged: Callable[..., Logged]) -> None:
    code = (
        "import os\nline = 'File \"x.py\", line 1, in f ' + os.environ['KEY'] + '\\n'\n"
        "print((line * 1000) * 500, end='')"
    )
    one = logged(code, "--mask", "KEY")
    assert one.report() == b"exit 0\n"
    lines = one.log().splitlines()
    assert lines[:500_000] == ['File "x.py", line 1, in f ***'] * 500_000
    assert all(line.startswith("supervisor: ") for line in lines[500_000:])


def test_what_does_not_fit_into_the_log_is_counted_and_the_command_goes_on(logged: Callable[..., Logged]) -> None:
    code = (
        "import pathlib, sys, time\nfor i in range(100000):\n"
        "    print('line', i)\n    pathlib.Path(sys.argv[1], f'at-{i}').touch()\n    time.sleep(0.01)"
    )
    one = logged(code)
    until(lambda: "line 3\n" in one.log())
    second = psutil.Process(one.process.pid).children()[0]
    size = one.path.stat().st_size
    second.rlimit(psutil.RLIMIT_FSIZE, (size + 10, -1))
    at = len(list(one.path.parent.glob("at-*")))
    until((one.path.parent / f"at-{at + 20}").exists)
    assert one.path.stat().st_size == size + 10
    second.rlimit(psutil.RLIMIT_FSIZE, (-1, -1))
    until(lambda: "bytes of the log are lost: File too large\n" in one.log())


def test_a_log_that_nobody_reads_any_more_does_not_end_the_command() -> None:
    code = "import sys\nfor i in range(100): print('x' * 1000)\nsys.exit(5)"
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(
        [*PYTHON, str(SUPERVISOR), "--", *PYTHON, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=writer,
    ) as process:
        os.close(writer)
        assert process.stdout is not None
        assert process.stdout.read() == b"exit 5\n"


# Files


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path leaves room for a server's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="short-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def test_temporary_files_go_into_a_private_folder_and_compile_caches_do_not(
    short: Path, logged: Callable[..., Logged], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # torch leaves it where it was imported
    code = (
        "import os, pathlib, socket, tempfile\n"
        "print(tempfile.gettempdir(), oct(os.stat(tempfile.gettempdir()).st_mode & 0o777))\n"
        "print(os.environ['TORCHINDUCTOR_CACHE_DIR'])\n"
        "socket.socket(socket.AF_UNIX).bind(tempfile.gettempdir() + '/' + 36 * 'u')\n"
        "tempfile.mkstemp(dir=tempfile.mkdtemp())\n"
        "pathlib.Path(tempfile.gettempdir(), 'torchinductor_me', 'headers').touch()"
    )
    one = logged(code, TMPDIR=str(short), LOGNAME="me")
    assert one.report() == b"exit 0\n"
    assert one.report() == b""
    where, caches = one.log().splitlines()[:2]
    assert Path(where.split()[0]).parent == short
    assert where.split()[1] == "0o700"
    assert caches == str(short / "torchinductor_me")
    assert [path.name for path in short.iterdir()] == ["torchinductor_me"]
    assert (short / "torchinductor_me" / "headers").exists()


def test_a_compile_cache_of_the_users_own_stays_where_it_is(short: Path, logged: Callable[..., Logged]) -> None:
    code = "import os; print(os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    one = logged(code, TMPDIR=str(short), TORCHINDUCTOR_CACHE_DIR="/a/cache")
    assert one.report() == b"exit 0\n"
    assert one.log() == "/a/cache\n"


def test_a_temporary_folder_with_too_long_a_path_for_sockets_is_not_used(
    short: Path, logged: Callable[..., Logged]
) -> None:
    (short / ("long" * 20)).mkdir()
    code = (
        "import socket, tempfile\nsocket.socket(socket.AF_UNIX).bind(tempfile.gettempdir() + '/' + 36 * 'u')\n"
        "print(tempfile.gettempdir())"
    )
    one = logged(code, TMPDIR=str(short / ("long" * 20)))
    assert one.report() == b"exit 0\n"
    assert one.report() == b""
    used = Path(one.log().splitlines()[0])
    assert used.parent == Path("/tmp")
    assert not used.exists()


class Segment:
    """A file in /dev/shm that this process maps."""

    def __init__(self) -> None:
        self.path = Path("/dev/shm", f"segment-{uuid.uuid4().hex}")
        self.path.write_bytes(bytes(4096))
        with self.path.open("r+b") as file:
            self.mapping = mmap.mmap(file.fileno(), 0)


@pytest.fixture
def segments() -> Iterator[list[Segment]]:
    made: list[Segment] = []
    yield made
    for segment in made:
        segment.mapping.close()
        segment.path.unlink(missing_ok=True)


MAPPER = """
import mmap, pathlib, sys, time
maps = []
for path in sys.argv[2:] or pathlib.Path(sys.argv[1], "segments").read_text().split():
    with open(path, "a+b") as file:
        file.truncate(4096)
        maps.append(mmap.mmap(file.fileno(), 4096))
pathlib.Path(sys.argv[1], "mapped").touch()
time.sleep(600)
"""
"""Maps segments, made if need be, and frees none."""


def test_memory_that_others_share_or_made_before_stays(
    tmp_path: Path, segments: list[Segment], logged: Callable[..., Logged]
) -> None:
    segments.append(before := Segment())
    before.mapping.close()
    code = (
        "import pathlib, sys, time\n"
        "while not pathlib.Path(sys.argv[1], 'segments').exists(): time.sleep(0.02)\n" + MAPPER
    )
    one = logged(code)
    until(lambda: len(psutil.Process(one.process.pid).children(recursive=True)) == 2)  # the second stage is at work
    segments += [shared := Segment(), strange := Segment(), own := Segment()]
    own.mapping.close()
    strange.mapping.close()
    (tmp_path / "new").write_text(f"{before.path} {shared.path} {own.path}")
    (tmp_path / "new").rename(tmp_path / "segments")
    until(lambda: (tmp_path / "mapped").exists())
    assert one.process.stdin is not None
    one.process.stdin.close()
    assert one.report() == b"signal 15\n"
    assert one.report() == b""
    assert [segment.path.exists() for segment in (before, shared, strange, own)] == [True, True, True, False]
    assert f"removed /dev/shm/{own.path.name}\n" in one.log()


def test_memory_of_a_process_that_died_long_before_the_end_is_freed(
    tmp_path: Path, segments: list[Segment], logged: Callable[..., Logged]
) -> None:
    path = Path("/dev/shm", f"segment-{uuid.uuid4().hex}")
    code = (
        "import pathlib, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-S', '-E', '-c', {MAPPER!r}, sys.argv[1], {str(path)!r}])\n"
        "pathlib.Path(sys.argv[1], 'pid').write_text(str(child.pid))\nchild.wait()\n"
        "pathlib.Path(sys.argv[1], 'dead').touch()\nsys.stdin.read()\nimport time; time.sleep(600)"
    )
    one = logged(code)
    until(lambda: (tmp_path / "mapped").exists())
    time.sleep(3 * LOOK_S)  # it is looked for once in LOOK_S, and nothing tells that it was found
    psutil.Process(int((tmp_path / "pid").read_text())).kill()
    until(lambda: (tmp_path / "dead").exists())
    assert path.exists()
    assert one.process.stdin is not None
    one.process.stdin.close()
    one.report()
    assert one.report() == b""
    assert not path.exists()


def test_a_semaphore_of_a_killed_process_is_freed(tmp_path: Path, logged: Callable[..., Logged]) -> None:
    name = f"lmsweep-{uuid.uuid4().hex}"
    path = Path("/dev/shm", f"sem.{name}")
    code = (
        "import _multiprocessing, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"made = _multiprocessing.SemLock(0, 1, 1, '/{name}', False)\ntime.sleep(600)"
    )
    one = logged(code)
    until(path.exists)
    assert one.process.stdin is not None
    one.process.stdin.write(b"0.1\n")
    one.process.stdin.close()
    assert one.report() == b"signal 9\n"
    assert one.report() == b""
    assert not path.exists()
