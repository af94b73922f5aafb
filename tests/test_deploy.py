"""The files of deploy/: what each would run is checked against this project, and run where that needs no cluster.

Slurm, KubeRay and the machines of `ray up` are not here. The Slurm script runs for real, on programs that stand for
Slurm's; Ray's own commands run for real in a process-id namespace, where their `ray stop` can end nobody else's Ray.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import free_port
from test_deaths import INIT, Place, place
from test_runner import LAUNCH_S, Made, made, until

from sweep import ROOT
from sweep.cli import parse
from sweep.planning.loading import load
from sweep.record import Status
from sweep.results.store import RunDirectory, read_records

__all__ = ["made", "place"]  # fixtures

DEPLOY = ROOT / "deploy"
SBATCH = DEPLOY / "slurm.sbatch"


@pytest.mark.parametrize("script", ["setup.sh", "slurm.sbatch", "job-submit.sh"])
def test_the_scripts_are_scripts(script: str) -> None:
    path = DEPLOY / script
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(path)], check=True)


# Slurm


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def slurm(folder: Path, head: str) -> dict[str, str]:
    """The environment of a batch job, with programs that stand for Slurm's; `folder/requeued` lists what came back."""
    program(folder, "srun", '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n')
    program(
        folder,
        "scontrol",
        f"#!/bin/bash\ncase $1 in show) echo {head}; echo other;; requeue) echo $2 >>{folder}/requeued;; esac\n",
    )
    return {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "gpu[1-2]",
        "SLURM_CPUS_ON_NODE": "4",
        "SLURM_JOB_NUM_NODES": "1",
    }


@dataclass(frozen=True, kw_only=True)
class Job:
    """A batch job whose Ray and Python are ours too: what it ran, and how it ended."""

    code: int
    requeued: bool
    ray: list[str]
    """Arguments of `ray`, up to the command."""
    launch: list[str]
    environment: dict[str, str]


RAY = """#!/bin/bash
if [[ -e early ]]; then touch up; exec sleep 60; fi
while [[ $1 != -- ]]; do echo "$1" >>ray; shift; done
shift
"$@"
"""

PYTHON = """#!/bin/bash
printf '%s\\n' "$@" >launch
env >environment
trap 'sleep 0.2; exit 143' TERM
touch up
if [[ -e wait ]]; then while true; do sleep 0.05; done; fi
exit $(<code)
"""


def job(folder: Path, *arguments: str, code: int = 0, warned: bool = False, early: bool = False) -> Job:
    """`warned` while the launch runs, or `early`, while Ray starts."""
    home = folder / "checkout"
    program(home / ".venv" / "bin", "ray", RAY)
    program(home / ".venv" / "bin", "python", PYTHON)
    (home / "code").write_text(str(code))
    if warned:
        (home / ("early" if early else "wait")).touch()
    environment = slurm(folder, "gpu1") | {"SLURM_SUBMIT_DIR": str(home), "TMPDIR": str(folder)}
    batch = subprocess.Popen(["bash", str(SBATCH), *arguments], env=os.environ | environment, cwd="/")
    try:
        if warned:
            until(lambda: (home / "up").exists(), 20, lambda: "the launch began")
            batch.send_signal(signal.SIGTERM)  # as --signal=B: does, to nobody else
        ended = batch.wait(20)
    finally:
        batch.kill()
    return Job(
        code=ended,
        requeued=(folder / "requeued").exists(),
        ray=lines(home / "ray"),
        launch=lines(home / "launch"),
        environment=dict(line.partition("=")[::2] for line in lines(home / "environment")),
    )


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_a_slurm_job_that_is_warned_before_its_launch_begins_comes_back(tmp_path: Path) -> None:
    ended = job(tmp_path, "conf=s", warned=True, early=True)
    assert (ended.code, ended.requeued, ended.launch) == (143, True, [])


@pytest.mark.parametrize(
    ("code", "warned", "ends", "requeued"),
    [
        (0, False, 0, False),
        (1, False, 1, False),
        (2, False, 2, False),
        (75, False, 75, True),
        (143, False, 143, False),  # someone has stopped it by hand
        (0, True, 143, True),  # the time is over, or others take the nodes
    ],
)
def test_a_slurm_job_ends_as_its_launch_and_goes_back_to_the_queue_when_that_gets_on(
    tmp_path: Path, code: int, warned: bool, ends: int, requeued: bool
) -> None:
    ended = job(tmp_path, "conf=s", code=code, warned=warned)
    assert (ended.code, ended.requeued) == (ends, requeued)


def test_a_slurm_job_gives_ray_its_nodes_a_token_of_its_own_and_the_launch_its_arguments(tmp_path: Path) -> None:
    arguments = ["conf=s", "api_key=${oc.env:MY_KEY}", "tasks.t.gen_kwargs={a: 'b c'}"]
    first, second = (job(tmp_path / str(n), *arguments) for n in range(2))
    assert first.launch == ["launch.py", "ray.address=gpu1:6379", *arguments]
    assert first.ray == ["symmetric-run", "--address", "gpu1:6379", "--min-nodes", "1", "--num-cpus=4"]
    assert first.environment["RAY_AUTH_MODE"] == "token"
    tokens = {each.environment["RAY_AUTH_TOKEN"] for each in (first, second)}
    assert len(tokens) == 2
    assert all(re.fullmatch("[0-9a-f]{64}", token) for token in tokens)
    assert not list(tmp_path.rglob("tmp.*"))  # the file with the launch's process id
    parse(first.launch[1:])


def test_the_slurm_job_asks_to_be_warned_and_may_be_sent_back() -> None:
    asked = set(re.findall(r"^#SBATCH (\S+)$", SBATCH.read_text(), flags=re.MULTILINE))
    assert {"--signal=B:TERM@120", "--requeue", "--open-mode=append", "--exclusive", "--ntasks-per-node=1"} <= asked


# Kubernetes


def test_the_rayjob_runs_a_sweep_of_this_project_whose_files_all_pods_see() -> None:
    document = yaml.safe_load((DEPLOY / "kuberay-rayjob.yaml").read_text())
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", "RayJob")
    spec = document["spec"]
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    shell, flag, line = shlex.split(spec["entrypoint"])
    assert (shell, flag) == ("sh", "-c")
    home, command = line.split(" && exec ")
    assert home == "cd /opt/lmsweep"
    python, script, *arguments = shlex.split(command)
    assert python == "python"
    assert (ROOT / script).is_file()
    parsed = parse(arguments)
    config = load(str(parsed.conf), parsed.overrides, conf_dir=ROOT / "conf")
    assert config.walltime is not None
    assert config.walltime < spec["activeDeadlineSeconds"]
    assert config.ray.address == "auto"
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        (shared,) = [mounts[path] for path in mounts if Path(config.runs_dir).is_relative_to(path)]
        assert shared["persistentVolumeClaim"] == {"claimName": "lmsweep"}
        variables = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert Path(str(variables["HF_HOME"])).is_relative_to("/shared")
        if "nvidia.com/gpu" in container["resources"]["limits"]:
            assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert any("nvidia.com/gpu" in str(group) for group in cluster["workerGroupSpecs"])
    stop = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert stop == {"RAY_JOB_STOP_WAIT_TIME_S": "60"}


def test_the_versions_of_ray_in_the_files_are_the_one_that_is_pinned() -> None:
    (pinned,) = re.findall(r'"ray\[default\]>=([\d.]+),', (ROOT / "pyproject.toml").read_text())
    text = (DEPLOY / "kuberay-rayjob.yaml").read_text()
    assert set(re.findall(r"rayproject/ray:([\d.]+)-|rayVersion: \"([\d.]+)\"", text)) == {
        (f"{pinned}.0", ""),
        ("", f"{pinned}.0"),
    }


# ray up

VALIDATE = """
import json, sys, yaml
from ray.autoscaler._private.util import prepare_config, validate_config
with open(sys.argv[1]) as file:
    config = prepare_config(yaml.safe_load(file))
validate_config(config)
print(json.dumps(config))
"""


def test_ray_takes_the_cluster_file(tmp_path: Path) -> None:
    path = DEPLOY / "ray-cluster.yaml"
    said = subprocess.run([sys.executable, "-c", VALIDATE, str(path)], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    config = json.loads(said.stdout.splitlines()[-1])
    assert [group["max_workers"] for group in config["available_node_types"].values()] == [2]
    broken = yaml.safe_load(path.read_text()) | {"no_such_key": 1}
    other = tmp_path / "broken.yaml"
    other.write_text(yaml.safe_dump(broken))
    refused = subprocess.run([sys.executable, "-c", VALIDATE, str(other)], capture_output=True, text=True, check=False)
    assert "no_such_key" in refused.stderr


def test_every_start_of_ray_in_the_cluster_file_says_how_it_authenticates_and_runs_from_one_checkout() -> None:
    text = (DEPLOY / "ray-cluster.yaml").read_text()
    config = yaml.safe_load(text)
    assert "~/.ray/auth_token" in config["file_mounts"]
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert len(starts) == 4
    for command in starts:
        assert re.search(r"/shared/lmsweep/\.venv/bin/ray (start|stop)", command), command
        assert ("RAY_AUTH_MODE=token" in command) == ("ray start" in command)
    (shown,) = re.findall(r"ray exec \S+ '(.*)'", text)
    assert shown.startswith("cd /shared/lmsweep && RAY_AUTH_MODE=token .venv/bin/python launch.py ")
    parsed = parse(shlex.split(shown.partition("launch.py ")[2]))
    assert load(str(parsed.conf), parsed.overrides, conf_dir=ROOT / "conf").ray.address == "auto"


# A job of a cluster


def test_a_job_starts_in_the_checkout_and_gets_its_arguments_as_they_are(tmp_path: Path) -> None:
    program(
        tmp_path, "ray", '#!/bin/bash\nprintf "%s\\n" "$@" >told\nwhile [[ $1 != -- ]]; do shift; done\nshift\n"$@"\n'
    )
    home = tmp_path / "the checkout"
    program(home / ".venv" / "bin", "python", '#!/bin/bash\npwd >where\nprintf "%s\\n" "$@" >launch\nexit 3\n')
    arguments = ["conf=s", "api_key=${oc.env:MY_KEY}", "tasks.t.gen_kwargs={a: 'b c'}"]
    done = subprocess.run(
        [str(DEPLOY / "job-submit.sh"), *arguments],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LMSWEEP_HOME": str(home)},
        check=False,
    )
    assert done.returncode == 3
    assert (home / "where").read_text() == f"{home}\n"
    assert (home / "launch").read_text().splitlines() == ["launch.py", *arguments]
    told = (tmp_path / "told").read_text().splitlines()
    assert told[:3] == ["job", "submit", "--runtime-env-json"]
    assert json.loads(told[3]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}


# With Ray's own commands

UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-c", INIT]
"""Begins a process-id namespace and runs a command in it."""


@pytest.fixture
def alone(place: Place) -> Place:
    """A place in which commands can be run that end every Ray process that they see."""
    if not shutil.which("unshare") or subprocess.run([*UNSHARE, "true"], capture_output=True).returncode:
        pytest.skip("`ray stop` ends every Ray process it sees, and no process-id namespace can be made here")
    place.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return place


@dataclass(frozen=True)
class Sweep:
    """The file of a sweep over one stand-in server, and its run directory."""

    path: Path
    directory: RunDirectory

    @property
    def done(self) -> int:
        return sum(record.status is Status.DONE for record in read_records(self.directory).values())

    @property
    def stored(self) -> int:
        """Responses that are durable now."""
        if not self.directory.responses.exists():
            return 0
        with contextlib.closing(sqlite3.connect(f"file:{self.directory.responses}?mode=ro", uri=True)) as database:
            try:
                return int(database.execute("SELECT count(*) FROM responses").fetchone()[0])
            except sqlite3.OperationalError:  # the table is being made
                return 0


def a_sweep(folder: Path, made: Made, **settings: Any) -> Sweep:
    path = folder / "sweep.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "sweep",
                "runs_dir": str(folder / "runs"),
                "defaults": {"model": {"device": "cpu", "max_model_len": 512, "concurrency": 4}},
                "models": {"alpha": {"path": made.model("alpha")}},
                "tasks": {"exports": {"include_path": str(made.tasks), "limit": 20}},
                "wandb": {"mode": "disabled"},
                "ray": {"evaluators": 1, "cpu_servers": 1},
                **settings,
            }
        )
    )
    return Sweep(path, RunDirectory(folder / "runs" / "sweep"))


class Batch:
    """The Slurm script in a namespace, with Ray's own `symmetric-run`."""

    def __init__(self, alone: Place, folder: Path, *arguments: str, variables: Mapping[str, str] | None = None) -> None:
        self._alone = alone
        self.folder = folder / "slurm"
        self._output = folder / "output.txt"
        # Ports are everyone's, also in a process-id namespace.
        script = folder / "slurm.sbatch"
        script.write_text(SBATCH.read_text().replace("6379", str(free_port())))
        environment = alone.environment | slurm(self.folder, "127.0.0.1") | {"SLURM_SUBMIT_DIR": str(ROOT)}
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [*UNSHARE, "bash", "-c", '"$@"; echo "exit code $?"', "sh", "bash", str(script), *arguments],
                env=environment | dict(variables or {}),
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def warn(self) -> None:
        """Tell the batch shell alone, as Slurm does."""
        (shell,) = [
            p for p in self._alone.processes() if p.cmdline()[:1] == ["bash"] and "slurm.sbatch" in p.cmdline()[1]
        ]
        shell.terminate()

    def end(self) -> int:
        until(lambda: "exit code " in self.output(), LAUNCH_S, self.output)
        self.process.kill()  # ends the namespace with what symmetric-run left there
        self.process.wait()
        return int(re.findall(r"^exit code (\d+)$", self.output(), flags=re.MULTILINE)[-1])

    @property
    def requeued(self) -> bool:
        return (self.folder / "requeued").exists()

    def output(self) -> str:
        return self._output.read_text()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(2 * LAUNCH_S)
def test_symmetric_run_brings_the_cluster_up_for_a_sweep_and_passes_its_exit_code(
    alone: Place, made: Made, tmp_path: Path
) -> None:
    sweep = a_sweep(tmp_path, made)
    batch = Batch(alone, tmp_path, f"conf={sweep.path}")
    assert batch.end() == 0, batch.output()
    assert sweep.done == 1
    assert not batch.requeued
    wrong = Batch(alone, tmp_path, "conf=nonsense")
    assert wrong.end() == 2, wrong.output()
    assert not wrong.requeued


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(2 * LAUNCH_S)
def test_a_slurm_job_that_is_warned_stops_its_sweep_and_comes_back(alone: Place, made: Made, tmp_path: Path) -> None:
    sweep = a_sweep(tmp_path, made, tasks={"exports": {"include_path": str(made.tasks)}})
    log = tmp_path / "requests.jsonl"
    slow = {"STAND_IN_LATENCY_S": "0.5", "STAND_IN_REQUESTS_LOG": str(log)}
    batch = Batch(alone, tmp_path, f"conf={sweep.path}", variables=slow)
    until(lambda: log.exists() and len(log.read_text().splitlines()) > 20, LAUNCH_S, batch.output)
    batch.warn()
    assert batch.end() == 143, batch.output()
    assert "stopped by SIGTERM; the same command goes on where it stopped" in batch.output()
    assert batch.requeued


INSIDE = """
import json, os, re, sqlite3, subprocess, sys, time

assert os.getppid() == 1, "this must be a process-id namespace of its own"
port, dashboard, root, conf, relative, database = sys.argv[1:]
said = {}

def ray(*arguments, **more):
    done = subprocess.run(["ray", *arguments], capture_output=True, text=True, **more)
    return done.returncode, done.stdout + done.stderr

def stored():
    if not os.path.exists(database):
        return 0
    try:
        connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
        return connection.execute("SELECT count(*) FROM responses").fetchone()[0]
    except sqlite3.OperationalError:  # the table is being made
        return 0

def tell(name, outcome):
    said[name] = outcome
    print(json.dumps(said), flush=True)

start = ["start", "--head", "--node-ip-address=127.0.0.1", "--num-cpus=4", "--disable-usage-stats"]
tell("start", ray(*start, f"--port={port}", f"--dashboard-port={dashboard}"))
os.environ["RAY_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
submit = [f"{root}/deploy/job-submit.sh", "ray.address=auto"]

slow = subprocess.Popen([*submit, f"conf={conf}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
deadline = time.monotonic() + 120
while not stored() and time.monotonic() < deadline:
    time.sleep(0.1)
_, jobs = ray("job", "list")
stopped = ray("job", "stop", re.findall(r"raysubmit_\\w+", jobs)[0])
output, _ = slow.communicate(timeout=90)
tell("stopped", [slow.returncode, output + stopped[1]])

done = subprocess.run([*submit, f"conf={conf}"], capture_output=True, text=True)
tell("done", [done.returncode, done.stdout + done.stderr])
command = ["python", "launch.py", f"conf={relative}", "ray.address=auto"]
tell("copied", ray("job", "submit", "--working-dir", root, "--", *command))
"""
"""A head, and jobs on it: one that is stopped at work, the same again, and one from a copy that Ray makes."""


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(3 * LAUNCH_S)
def test_jobs_of_a_cluster_end_with_their_launch_and_none_writes_into_a_copy_that_ray_deletes(
    alone: Place, made: Made, tmp_path: Path
) -> None:
    sweep = a_sweep(tmp_path, made, tasks={"exports": {"include_path": str(made.tasks)}})
    relative = tmp_path / "relative.yaml"
    settings = yaml.safe_load(sweep.path.read_text())
    del settings["runs_dir"]
    relative.write_text(yaml.safe_dump(settings))
    alone.environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "a-token-of-this-test-0123456789abcdef",
        "STAND_IN_LATENCY_S": "1.5",  # 30 s in all: Ray takes seconds to list its jobs, and to stop one
    }
    paths = [ROOT, sweep.path, relative, sweep.directory.responses]
    arguments = [str(free_port()), str(free_port()), *map(str, paths)]
    output = tmp_path / "output.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [*UNSHARE, sys.executable, "-c", INSIDE, *arguments],
            env=alone.environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        until(lambda: '"copied"' in output.read_text() or process.poll() is not None, 2.5 * LAUNCH_S, output.read_text)
    finally:
        process.kill()
        process.wait()
    said = json.loads(output.read_text().splitlines()[-1])
    assert said["start"][0] == 0, said
    # SIGTERM and a minute's time, although Ray's own is three seconds. Ray takes a job that was stopped for no failure.
    assert said["stopped"][0] == 0
    assert "stopped by SIGTERM; the same command goes on" in said["stopped"][1], said["stopped"][1]
    assert said["done"][0] == 0, said["done"][1]
    assert "1 of 1 cells are done" in said["done"][1]
    (record,) = read_records(sweep.directory).values()
    assert record.status is Status.DONE
    assert record.counts.reused > 0
    code, words = said["copied"]
    assert code == 1
    assert re.search(r"error: runs_dir: .*/working_dir_files/.* would be lost with it", words), words
