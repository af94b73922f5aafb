"""A network that is cut: nothing is heard of what is behind the cut, and it works on all the while."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_chaos import recorded
from test_runner import ROOT

from sweep.record import Status
from sweep.results.store import RunDirectory, read_records

APART = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--mount", "--kill-child"]
BOUND_S = 30.0
"""Three health checks of one second with two seconds for each answer, and a busy machine."""


@pytest.fixture
def folder() -> Iterator[Path]:
    # Directly under /tmp: pytest's folders are too long for the sockets of Ray.
    folder = Path(tempfile.mkdtemp(prefix="cut-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.ray
@pytest.mark.long
def test_what_a_cut_network_takes_is_done_again_elsewhere_and_what_comes_back_is_not_heard(folder: Path) -> None:
    if not shutil.which("unshare") or not shutil.which("ip") or subprocess.run([*APART, "true"]).returncode:
        pytest.skip("needs root, `ip` and `unshare`: machines of their own are made of network namespaces")
    done = subprocess.run(
        [*APART, sys.executable, str(Path(__file__).with_name("partition.py")), str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    output = folder / "output.txt"
    assert done.returncode == 0, done.stdout + done.stderr + (output.read_text() if output.exists() else "")
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"a cut was known after {found['known_s']:.1f} s")
    assert found["code"] == 0
    assert found["evaluators_lost"]
    assert found["known_s"] < BOUND_S
    directory = RunDirectory(folder / "runs" / "sweep")
    records = read_records(directory)
    assert len(records) == 12
    assert {record.status for record in records.values()} == {Status.DONE}
    assert recorded(directory.driver_log.read_text()) == Counter({f"{m}/{t}": 1 for m, t in records})
