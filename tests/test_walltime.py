"""When a launch has to be over, and what still pays before that."""

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_deaths import Place, Seen, place
from test_deploy import a_sweep
from test_runner import LAUNCH_S, Made, made, until

from sweep import ROOT
from sweep.record import Status
from sweep.results.store import read_records
from sweep.running.walltime import LEAVE_S, UNLIMITED, Walltime, ends_at

__all__ = ["made", "place"]  # fixtures


@pytest.mark.parametrize(
    ("left_s", "start_s", "over", "pays"),
    [
        (3600, 120, False, True),
        (LEAVE_S + 240, 120, False, True),
        (LEAVE_S + 239, 120, False, False),
        (LEAVE_S + 239, 15, False, True),
        (LEAVE_S + 1, 0, False, True),
        (LEAVE_S, 15, True, False),
        (1, 15, True, False),
        (-100, 15, True, False),
    ],
)
def test_a_start_pays_while_it_leaves_as_much_time_for_work(
    left_s: float, start_s: float, over: bool, pays: bool
) -> None:
    walltime = Walltime(end_s=5000.0)
    now_s = 5000.0 - left_s
    assert walltime.over(now_s) is over
    assert walltime.pays(start_s, now_s) is pays


def test_what_does_not_pay_once_never_pays_again() -> None:
    walltime = Walltime(end_s=1000.0)
    told = [walltime.pays(100.0, now_s) for now_s in range(0, 1200, 10)]
    assert told == sorted(told, reverse=True)
    assert set(told) == {True, False}


def test_without_an_end_everything_pays() -> None:
    assert not UNLIMITED.over(1e12)
    assert UNLIMITED.pays(1e9, 1e12)


@pytest.mark.parametrize(
    ("walltime_s", "slurm", "expected"),
    [
        (None, None, math.inf),
        (600.0, None, 1600.0),
        (None, "2000", 2000.0),
        (600.0, "2000", 1600.0),
        (6000.0, "2000", 2000.0),
        (None, "1004", math.inf),  # of a job that is over
        (600.0, "1004", 1600.0),
        (None, "", math.inf),
        (None, "soon", math.inf),
    ],
)
def test_the_end_is_the_earlier_one_of_the_sweep_and_of_the_slurm_job(
    walltime_s: float | None, slurm: str | None, expected: float
) -> None:
    environment = {} if slurm is None else {"SLURM_JOB_END_TIME": slurm}
    assert ends_at(walltime_s, environment, began_s=1000.0, now_s=1005.0) == expected


# A whole launch

ENDS = """
import os, sys
from sweep.running.walltime import Walltime
Walltime.over = lambda self, now_s: os.path.exists(sys.argv[1])
from sweep.cli import main
sys.exit(main(sys.argv[2:]))
"""
"""`launch.py` whose time is over when a file is there, however slow this machine is."""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3 * LAUNCH_S)
def test_a_launch_whose_time_is_over_ends_with_75_and_the_next_one_does_the_rest(
    place: Place, made: Made, tmp_path: Path
) -> None:
    sweep = a_sweep(tmp_path, made, tasks={"exports": {"include_path": str(made.tasks)}})
    end, output = tmp_path / "over", tmp_path / "output.txt"

    def launch(latency_s: float) -> subprocess.Popen[bytes]:
        with output.open("wb") as file:
            return subprocess.Popen(
                [sys.executable, "-c", ENDS, str(end), f"conf={sweep.path}", "walltime=1h"],
                cwd=ROOT,
                env=place.environment | {"STAND_IN_LATENCY_S": str(latency_s)},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    first = launch(latency_s=0.5)
    until(lambda: sweep.stored or first.poll() is not None, LAUNCH_S, output.read_text)
    end.touch()
    assert first.wait(60) == 75, output.read_text()
    assert "the walltime is over; the same command goes on where it stopped" in output.read_text()
    assert sweep.done == 0
    place.nothing_is_left(Seen.of([]), after=time.monotonic())
    stored = sweep.stored
    end.unlink()
    assert launch(latency_s=0.0).wait(LAUNCH_S) == 0, output.read_text()
    (record,) = read_records(sweep.directory).values()
    assert record.status is Status.DONE
    assert record.counts.reused >= stored > 0
