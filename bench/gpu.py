"""`python -m bench.gpu`: all of mmlu on a GPU with a real model, ours and three ways of lm-eval.

Compared are GPU-seconds: the whole command's wall time, start-up and loading included, times the GPUs that it holds.
Ours is one `python launch.py`; the others are `lm_eval` with `local-completions` against a server that is started for
it, with `vllm` in process, and with `hf`. Each way has the GPU to itself. `--dry-run` prints every command with its
environment and runs nothing.
"""

import argparse
import http.client
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.data import MADE, MAX_MODEL_LEN, ROOT
from bench.rows import Row

BAR = 1.0
"""No promise has been made for GPUs yet: ours must not be the slower one."""

TOLERANCE = 0.01
"""Of the accuracy against ours; bf16 and other batches break near ties. Dummy weights make nothing but near ties."""

PORT = 8765
START_S = 1800.0
"""Of a server: loading, compiling and capturing."""
STOP_S = 60.0

TASK = ("--tasks", "mmlu", "--num_fewshot", "5")


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to the same numbers."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Beside what is set already."""
    server: Sequence[str] | None = None
    """Started before the command and ended after it."""

    def lines(self) -> Iterator[str]:
        """As a shell would take it."""
        setting = "".join(f"{name}={shlex.quote(value)} " for name, value in self.environment.items())
        yield f"# {self.name}"
        if self.server:
            yield f"{setting}{shlex.join(self.server)} &   # until http://127.0.0.1:{PORT}/health answers 200"
        yield f"{setting}{shlex.join(self.command)}"
        if self.server:
            yield "kill %%; wait"


def ways(given: argparse.Namespace, folder: Path) -> list[Way]:
    """Ours first. `folder` gets the sweep file and everything that comes out."""
    options = {"max_model_len": MAX_MODEL_LEN, "tensor_parallel_size": given.tensor_parallel}
    options |= {"load_format": given.load_format} if given.load_format else {}
    limit = ["--limit", str(given.limit)] if given.limit else []

    def lm_eval(name: str, model: str, batch_size: str, /, **arguments: object) -> list[str]:
        values = ",".join(f"{key}={value}" for key, value in arguments.items())
        shown = ["--model", model, "--model_args", values, *TASK, "--batch_size", batch_size, *limit]
        return [sys.executable, "-m", "lm_eval", "run", *shown, "--output_path", str(folder / name)]

    serve = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", given.model, "--port", str(PORT)]
    for option, value in options.items():
        serve += [f"--{option.replace('_', '-')}", str(value)]
    found = [
        Way(name="ours", command=[sys.executable, str(ROOT / "launch.py"), f"conf={folder / 'sweep.yaml'}"]),
        Way(
            name="local-completions",
            server=[*serve, "--generation-config", "vllm", "--host", "127.0.0.1"],
            command=lm_eval(
                "local-completions",
                "local-completions",
                str(given.batch_size),
                model=given.model,
                base_url=f"http://127.0.0.1:{PORT}/v1/completions",
                tokenized_requests=True,
                max_length=MAX_MODEL_LEN,
                num_concurrent=given.num_concurrent,
                timeout=36000,
            ),
            environment={"OPENAI_API_KEY": "none"},
        ),
        Way(name="vllm", command=lm_eval("vllm", "vllm", "auto", pretrained=given.model, dtype="auto", **options)),
    ]
    if not given.load_format:
        hf = lm_eval("hf", "hf", "auto", pretrained=given.model, dtype="auto", max_length=MAX_MODEL_LEN)
        found.append(Way(name="hf", command=hf))
    return found


def sweep_file(given: argparse.Namespace, folder: Path) -> str:
    """What `launch.py` gets; JSON is YAML."""
    model = {
        "path": given.model,
        "max_model_len": MAX_MODEL_LEN,
        "tensor_parallel": given.tensor_parallel,
        "server": {"load_format": given.load_format} if given.load_format else {},
    }
    task = {"num_fewshot": 5} | ({"limit": given.limit} if given.limit else {})
    sweep = {
        "name": "ours",
        "runs_dir": str(folder),
        "models": {"bench": model},
        "tasks": {"mmlu": task},
        "wandb": {"mode": "disabled"},
        "ray": {"address": "local"},
    }
    return json.dumps(sweep, indent=2)


@contextmanager
def _serving(way: Way, environment: Mapping[str, str], folder: Path) -> Iterator[None]:
    if way.server is None:
        yield
        return
    with (folder / f"{way.name}-server.log").open("wb") as log:
        process = subprocess.Popen(way.server, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_S
        while not _answers():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server of {way.name} did not start: see {log.name}")
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers() -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _run(way: Way, folder: Path) -> float:
    """Seconds from the first process's start to the last one's end."""
    environment = {**os.environ, **way.environment}
    start = time.perf_counter()
    with _serving(way, environment, folder):
        subprocess.run(way.command, env=environment, check=True)
    return time.perf_counter() - start


def _accuracy(folder: Path) -> float:
    """Of mmlu, in the newest of lm-eval's own result files below this folder."""
    path = max(folder.rglob("results_*.json"), key=lambda found: found.stat().st_mtime)
    return float(json.loads(path.read_text())["results"]["mmlu"]["acc,none"])


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--model", required=True, help="hub id or folder, Qwen/Qwen2.5-7B-Instruct for one")
    parser.add_argument("--load-format", choices=["dummy"], help="weights without meaning; hf is then left out")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs (1)")
    parser.add_argument("--limit", type=int, help="questions of each subject instead of all")
    parser.add_argument("--num-concurrent", type=int, default=64, help="of local-completions (64)")
    parser.add_argument("--batch-size", type=int, default=8, help="of local-completions (8)")
    parser.add_argument("--dry-run", action="store_true", help="print every command and run nothing")
    given = parser.parse_args(arguments)
    folder = MADE / "gpu" / time.strftime("%Y%m%d-%H%M%S")
    if given.dry_run:
        print(f"# {folder / 'sweep.yaml'}\n{sweep_file(given, folder)}")
        for way in ways(given, folder):
            print(*way.lines(), sep="\n")
        return 0
    folder.mkdir(parents=True)
    (folder / "sweep.yaml").write_text(sweep_file(given, folder))
    seconds: dict[str, float] = {}
    accuracies: dict[str, float] = {}
    for way in ways(given, folder):
        seconds[way.name] = _run(way, folder) * given.tensor_parallel
        accuracies[way.name] = _accuracy(folder / way.name)
        print(f"{way.name}: {seconds[way.name]:,.0f} GPU-seconds, acc {accuracies[way.name]:.4f}", flush=True)
        if not given.load_format and abs(accuracies[way.name] - accuracies["ours"]) > TOLERANCE:
            raise SystemExit(f"{way.name} has another accuracy than ours: fast or not, one of them is wrong")
    what = (
        f"mmlu ({f'limit {given.limit}' if given.limit else 'all'}, 5-shot), {given.model}, GPU-seconds with start-up"
    )
    rows = [
        Row(
            row=f"{what}, against {name}",
            ratio=theirs / seconds["ours"],
            bar=BAR,
            medians={f"{name}_gpu_s": theirs, "ours_gpu_s": seconds["ours"]},
        )
        for name, theirs in seconds.items()
        if name != "ours"
    ]
    for row in rows:
        print(row.line(), flush=True)
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
