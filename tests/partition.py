"""A sweep on machines of its own whose network is cut and mended: run by test_partition.py inside namespaces.

`python tests/partition.py FOLDER`, where nothing is shared with the rest of this machine but files: a bridge, on which
the head and the driver are, and two machines behind a cable each. Every machine has its own processes, network,
/dev/shm and temporary folder. Prints one line of JSON; everything ends with this process.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from light import python_path
from test_chaos import a_sweep
from test_runner import ROOT, STAND_IN

HEAD = "10.77.0.1"
HEALTH = {"period_ms": "1000", "timeout_ms": "2000", "failure_threshold": "3"}
STEP_S = 90.0


def command(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True)


class Machine:
    """One more, behind the cable `cable<number>`."""

    def __init__(self, number: int, temporary: Path) -> None:
        self.address = f"10.77.0.{10 + number}"
        self.cable = f"cable{number}"
        apart = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--mount", "--uts", "--kill-child"]
        self._holder = subprocess.Popen([*apart, "sleep", "infinity"])
        until(lambda: self._first() is not None, "the machine is there")
        far = f"far{number}"
        command("ip", "link", "add", self.cable, "type", "veth", "peer", "name", far, "netns", self._first())
        command("ip", "link", "set", self.cable, "master", "bridge0", "up")
        self.run("ip", "address", "add", f"{self.address}/24", "dev", far)
        self.run("ip", "link", "set", far, "up")
        self.run("ip", "link", "set", "lo", "up")
        self.run("mount", "-t", "tmpfs", "none", "/dev/shm")
        self.run("mount", "-t", "tmpfs", "none", temporary)

    def _first(self) -> str | None:
        """The first process there, as we see it."""
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
        return children[0] if children else None

    def run(self, *words: object) -> None:
        first = self._first()
        enter = ["nsenter", "--target", first, "--net", "--pid", "--mount", "--uts"]
        command(*enter, *words)

    def cut(self, *, mended: bool = False) -> None:
        command("ip", "link", "set", self.cable, "up" if mended else "down")


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + STEP_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not in {STEP_S:.0f} s: {what}")
        time.sleep(0.05)


def main(folder: Path) -> None:
    command("ip", "link", "set", "lo", "up")
    command("ip", "link", "add", "bridge0", "type", "bridge")
    command("ip", "address", "add", f"{HEAD}/24", "dev", "bridge0")
    command("ip", "link", "set", "bridge0", "up")
    temporary = folder / "ray"
    temporary.mkdir()
    requests = folder / "requests.jsonl"
    os.environ.update(
        RAY_AUTH_MODE="disabled",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_TMPDIR=str(temporary),
        LMSWEEP_ENGINE=" ".join(STAND_IN),
        STAND_IN_LATENCY_S="0.3",
        STAND_IN_REQUESTS_LOG=str(requests),
        PYTHONPATH=python_path(),
        **{f"RAY_health_check_{name}": value for name, value in HEALTH.items()},
    )
    ray = [str(Path(sys.executable).with_name("ray")), "start"]
    command(*ray, "--head", f"--node-ip-address={HEAD}", "--port=6379", "--num-cpus=0", "--include-dashboard=false")
    machines = [Machine(number, temporary) for number in range(2)]
    slots = json.dumps({"lmsweep_evaluator": 2})
    for machine in machines:
        joining = [f"--address={HEAD}:6379", f"--node-ip-address={machine.address}", "--num-cpus=2", "--num-gpus=1"]
        machine.run(*ray, *joining, f"--resources={slots}")

    settings = a_sweep(folder, models=2, cells=6, requests=200)
    sweep = folder / "sweep.yaml"
    sweep.write_text(yaml.safe_dump({"name": "sweep", "runs_dir": str(folder / "runs"), **settings}))
    output = (folder / "output.txt").open("w")
    driver = subprocess.Popen(
        [sys.executable, "launch.py", f"conf={sweep}", f"ray.address={HEAD}:6379"],
        cwd=ROOT,
        stdout=output,
        stderr=subprocess.STDOUT,
    )
    log = folder / "runs" / "sweep" / "logs" / "driver.log"

    def said(pattern: str) -> list[str]:
        assert driver.poll() is None, (folder / "output.txt").read_text()
        return re.findall(pattern, log.read_text()) if log.exists() else []

    until(lambda: len(set(said(r"server (m\d)-\d is ready at"))) == 2, "both servers are ready")
    until(lambda: requests.read_text().count('"prompt": [7,') > 40, "both are asked")
    begun = time.monotonic()
    machines[1].cut()
    until(lambda: said(r"server m\d-\d was lost"), "the cut is known")
    known_s = time.monotonic() - begun
    until(lambda: said(r"evaluator\.\d was lost"), "so are evaluators")
    lost = said(r"evaluator\.\d was lost")
    machines[1].cut(mended=True)
    code = driver.wait(3 * STEP_S)
    print(json.dumps({"known_s": known_s, "evaluators_lost": len(lost), "code": code}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
