"""No key in any file, argument or output of a sweep: whole launches on real Ray, with servers that tell all."""

import base64
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from doubles import STAND_IN, make_tasks

from sweep.record import Record, Status
from sweep.results.store import RunDirectory, read_records

ROOT = Path(__file__).parent.parent

LAUNCH_S = 240.0

SECRETS = {
    "HF_TOKEN": "hf_plantedForTheHub0123456789",
    "WANDB_API_KEY": "0123456789planted0for0wandb0123456789abcd",
    # Names by which nobody would know them: they count because the config uses them as keys.
    "SWEEP_PASS": "planted+for/the servers'own=".replace(" ", "_"),
    "DATA_PASS": 'planted "for" a task\\é',
    # Known by the name that the config gives it.
    "OF_A_SERVER": "planted-in-a-models-env",
}
"""What the environment of a launch holds."""

ENGINE = """
import os, sys
from pathlib import Path
for name in ("VLLM_API_KEY", "HF_TOKEN", "MY_TOKEN"):
    print(f"{name} is {os.environ[name]}!", file=sys.stderr, flush=True)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
"""Tells its secrets before it becomes the stand-in."""

TELLS = """
import os, sys

def tells(doc, results):
    print("the hub's token is", os.environ["HF_TOKEN"])
    print("mine is", os.environ["HF_TOKEN"], file=sys.stderr)
    raise PermissionError(f"401 for Bearer {os.environ['HF_TOKEN']}")
"""


@dataclass(eq=False)  # threads are kept by identity
class Watch(threading.Thread):
    """Looks at every process of this machine and at Ray's files until it is told to stop."""

    mark: str
    """In the environment of all that the launch starts."""
    ray: Path
    secrets: set[bytes]
    found: set[str] = field(default_factory=set)
    """Where a secret was seen."""
    keys: set[str] = field(default_factory=set)
    """Of servers, from their environment."""
    kinds: set[str] = field(default_factory=set)
    over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)

    def run(self) -> None:
        while not self.over.wait(0.3):
            for process in psutil.process_iter():
                with suppress(psutil.Error, OSError):
                    self._look(process)
            for path in self.ray.rglob("*"):
                with suppress(OSError):  # taken away meanwhile
                    if path.is_file() and holds(path.read_bytes(), self.secrets):
                        self.found.add(str(path))

    def _look(self, process: psutil.Process) -> None:
        arguments = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        if holds(arguments, self.secrets):
            self.found.add(f"arguments of {arguments!r}")
        environment = process.environ()
        if environment.get("SWEEP_TEST") != self.mark:
            return
        if key := environment.get("VLLM_API_KEY"):
            self.keys.add(key)
            self.secrets.update(spellings(key))
        whole = json.dumps(environment, ensure_ascii=False).encode()
        if b"sweep.evaluating.evaluator" in arguments:
            self.kinds.add("evaluator")
            if holds(whole, self.secrets):
                self.found.add(f"environment of {arguments!r}")
        if b"sweep.results.mirror" in arguments:
            self.kinds.add("mirror")
            if holds(whole, self.secrets - spellings(SECRETS["WANDB_API_KEY"])):
                self.found.add(f"environment of {arguments!r}")


def spellings(secret: str) -> set[bytes]:
    """A secret as it is, in JSON, in a shell's quotes, in a header of Basic authorization, and without its ends."""
    basic = {base64.b64encode(f"{user}:{secret}".encode()) for user in ("api", "user")}
    told = {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1]}
    return {*(text.encode() for text in told), shlex.quote(secret).encode(), *basic}


def holds(content: bytes, secrets: set[bytes]) -> bool:
    return any(secret in content for secret in set(secrets))


@dataclass(frozen=True, kw_only=True)
class Launched:
    directory: RunDirectory
    output: str
    watch: Watch

    def records(self) -> dict[str, Record]:
        return {f"{model}/{task}": record for (model, task), record in read_records(self.directory).items()}

    def files(self) -> dict[str, bytes]:
        root = self.directory.root
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("talks", "refuses"):
        shutil.copytree(tiny_model, folder / name)
    return {name: str(folder / name) for name in ("talks", "refuses")}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tasks(tmp_path_factory.mktemp("tasks") / "own")
    (folder / "tells.py").write_text(TELLS)
    asked = (folder / "timed.yaml").read_text().replace("utils.timed", "tells.tells")
    (folder / "tells.yaml").write_text(asked.replace('task: "timed"', 'task: "tells"'))
    return folder


def launch(
    folder: Path,
    models: Mapping[str, Any],
    tasks: Mapping[str, Any],
    *,
    planted: Mapping[str, str] = SECRETS,
    **settings: Any,
) -> Launched:
    conf = folder / "sweep.yaml"
    conf.write_text(
        yaml.safe_dump(
            {
                "name": "sweep",
                "runs_dir": str(folder / "runs"),
                "defaults": {"model": {"device": "cpu", "max_model_len": 1024, "concurrency": 4}},
                "models": models,
                "tasks": tasks,
                "wandb": {"mode": "offline"},
                "ray": {"evaluators": 1, "cpu_servers": 1},
                **settings,
            }
        )
    )
    engine = folder / "engine.py"
    engine.write_text(ENGINE)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "WANDB_", "STAND_IN_"))}
    mark = uuid.uuid4().hex
    # A short path: Ray makes sockets in it.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as ray:
        watch = Watch(mark=mark, ray=Path(ray), secrets={s for text in planted.values() for s in spellings(text)})
        watch.start()
        try:
            done = subprocess.run(
                [sys.executable, "launch.py", f"conf={conf}"],
                cwd=ROOT,
                env={
                    **kept,
                    **planted,
                    "LMSWEEP_ENGINE": shlex.join([sys.executable, str(engine), *STAND_IN[1:]]),
                    "RAY_TMPDIR": ray,
                    "SWEEP_TEST": mark,
                    "HF_HUB_OFFLINE": "1",
                },
                capture_output=True,
                text=True,
                timeout=LAUNCH_S,
                check=False,
            )
        finally:
            watch.over.set()
            watch.join()
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]
    return Launched(directory=RunDirectory(folder / "runs" / "sweep"), output=done.stdout + done.stderr, watch=watch)


def nothing_is_found(launched: Launched) -> None:
    """In files, arguments, output, Ray's own files, and in the environment of what needs none."""
    assert launched.watch.kinds == {"evaluator", "mirror"}
    assert not launched.watch.found
    assert not holds(launched.output.encode(), launched.watch.secrets)
    files = launched.files()
    assert {"config.yaml", "plan.json", "responses.db", "report.md", "logs/driver.log"} <= files.keys()
    assert any(name.endswith(".wandb") for name in files)
    assert [name for name, content in files.items() if holds(content, launched.watch.secrets)] == []


@pytest.fixture(scope="module")
def loud(checkpoint: Mapping[str, str], tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """A sweep whose key comes from the environment, and in which everything that can tells its secrets."""
    of_a_server = {"MY_TOKEN": "${oc.env:OF_A_SERVER}"}
    # A cause that is known and stays, or it would be started five times.
    refusal = "RuntimeError: CUDA out of memory: token ${oc.env:HF_TOKEN}, mine ${oc.env:OF_A_SERVER}"
    return launch(
        tmp_path_factory.mktemp("loud"),
        {
            "talks": {"path": checkpoint["talks"], "env": of_a_server},
            "refuses": {"path": checkpoint["refuses"], "env": {**of_a_server, "STAND_IN_REFUSE": refusal}},
        },
        {
            "letters": {"include_path": str(tasks), "limit": 2, "metadata": {"token": "${oc.env:DATA_PASS}"}},
            "writing": {"include_path": str(tasks), "limit": 2},
            "tells": {"include_path": str(tasks), "limit": 1},
        },
        api_key="${oc.env:SWEEP_PASS}",
    )


@pytest.mark.ray
@pytest.mark.timeout(LAUNCH_S + 60)
def test_a_finished_run_holds_no_secret_anywhere(loud: Launched) -> None:
    nothing_is_found(loud)
    assert loud.watch.keys == {SECRETS["SWEEP_PASS"]}


@pytest.mark.ray
@pytest.mark.timeout(LAUNCH_S + 60)
def test_what_told_a_secret_is_shown_with_stars_in_its_place(loud: Launched) -> None:
    """So the test above has looked at something."""
    logs = sorted(loud.directory.logs.glob("talks-*.log"))
    assert logs, loud.directory.driver_log.read_text()
    log = logs[-1].read_text()
    assert [name for name in ("VLLM_API_KEY", "HF_TOKEN", "MY_TOKEN") if f"{name} is ***!" not in log] == []
    records = loud.records()
    assert {key for key, record in records.items() if record.status is Status.DONE} == {
        "talks/letters",
        "talks/writing",
    }
    assert "token ***, mine ***" in str(records["refuses/letters"].error)
    assert "401 for Bearer ***" in str(records["talks/tells"].error)
    assert records["talks/letters"].settings["task"]["metadata"] == {"token": "***"}
    (results,) = loud.directory.cell_results("talks", "letters").glob("results_*.json")
    assert '"token": "***"' in results.read_text()
    evaluator = loud.directory.server_log("evaluator.0").read_text()
    assert "the hub's token is ***" in evaluator
    assert "mine is ***" in evaluator
    assert "PermissionError: 401 for Bearer ***" in evaluator


@pytest.mark.ray
@pytest.mark.timeout(LAUNCH_S + 60)
def test_a_key_of_the_sweeps_own_is_found_in_its_servers_environment_alone(
    checkpoint: Mapping[str, str], tasks: Path, tmp_path: Path
) -> None:
    launched = launch(
        tmp_path,
        {"talks": {"path": checkpoint["talks"], "env": {"MY_TOKEN": "${oc.env:OF_A_SERVER}"}}},
        {"letters": {"include_path": str(tasks), "limit": 1}},
        # Without those that nothing here tells to be secrets.
        planted={name: SECRETS[name] for name in ("HF_TOKEN", "WANDB_API_KEY", "OF_A_SERVER")},
    )
    (key,) = launched.watch.keys
    assert len(key) > 30
    nothing_is_found(launched)
    assert "VLLM_API_KEY is ***!" in launched.directory.server_log("talks-0").read_text()
