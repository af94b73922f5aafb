"""Records and progress -> Weights & Biases. The only module that knows wandb.

W&B is a mirror: the run directory holds the truth, and nothing here can delay or fail an evaluation. The client runs in
a child process (a dead wandb-core can only be cured by replacing its process, and the driver must not be that process).
The driver's side only queues; one thread masks secrets and writes JSON lines to the child. The child ends by itself
when that pipe closes, so a killed driver leaves complete offline runs and no process.

One run per model and one overview run share a group. Run ids are a function of the sweep, so a resumed sweep continues
its runs. A summary is the result (`eval/<task>/<metric>`), history is progress, tables list every score.

Not here: what was lost on the way is not sent again. `Outcome.errors` says it, and the run directory still has it.
"""

import contextlib
import hashlib
import json
import logging
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from sweep.config import WandbConfig
from sweep.record import Record, Score, Status

logger = logging.getLogger(__name__)

PREFLIGHT_S = 5.0
"""Longest wait for W&B's answer before the sweep is tracked offline; the client itself would try for 100 s."""
INIT_S = 30.0
"""Longest wait for W&B to accept one run."""
FINISH_S = 45.0
"""Longest wait for one run's last uploads; runs finish side by side."""
ORPHAN_S = 10.0
"""What the child may still take when the driver is gone."""
TABLE_S = 30.0
"""Seconds between two versions of the tables: each version is a file and, online, an artifact."""
FLUSH_S = 2.0
"""Seconds until a row is on the disk; with the client's own 15 a process killed in the first 12 leaves nothing."""
QUEUED = 10_000
"""Messages that wait for the child before the next one is given up."""
SHORTEST_SECRET = 6
"""Characters; masking anything shorter wherever it occurs would eat ordinary text."""
MASK = "***"

COLUMNS = [
    *("model", "task", "subtask", "version", "filter", "n_shot", "metric", "value", "stderr", "n"),
    *("status", "seconds", "warnings", "error"),
]
"""Of both tables. `task` is the cell's, `subtask` lm-eval's name of what the line is about."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of the mirror, for the end of the sweep's output."""

    mode: str
    """`online`, `offline` or `disabled`: what it was in the end, whatever was asked."""
    why: str
    """Why it was not online; empty when it was."""
    urls: Mapping[str, str] = field(default_factory=dict)
    """Address of each model's run, online only."""
    overview_url: str | None = None
    errors: tuple[str, ...] = ()
    """What did not reach W&B (or the offline runs), in sentences."""
    offline: tuple[Path, ...] = ()
    """The offline runs of this launch."""
    publish: str | None = None
    """The command that uploads them, with those of earlier launches of this sweep."""


class Tracker:
    """The driver's end. Every method but `close` returns at once and none raises, whatever state W&B is in."""

    def __init__(
        self,
        config: WandbConfig,
        *,
        sweep: str,
        sweep_id: str,
        directory: Path,
        models: Mapping[str, Mapping[str, Any]],
        secrets: Sequence[str],
    ) -> None:
        """`directory` is the run directory's `wandb`; `sweep_id` tells sweeps of one name apart; `models` maps each
        model to what W&B shows as its config; whatever is in `secrets` leaves this process as `***`."""
        self._directory = directory.resolve()
        self._secrets = secrets
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(QUEUED)
        self._started = time.monotonic()
        self._mode, self._why = "", ""
        self._urls: dict[str, str] = {}
        self._overview_url: str | None = None
        self._offline: list[Path] = []
        self._errors: list[str] = []
        self._unsent = 0
        self._closing = False
        self._outcome: Outcome | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._threads: list[threading.Thread] = []
        mode = _mode(config)
        if mode == "disabled":
            self._outcome = Outcome(mode=mode, why="switched off")
            return
        try:
            self._process = _spawn(self._directory)
        except OSError as error:
            self._fail(f"W&B's process could not start ({error}); the sweep goes on without W&B")
            return
        for target in (self._write, self._read):
            self._threads.append(threading.Thread(target=target, name=f"tracking{target.__name__}", daemon=True))
            self._threads[-1].start()
        self._post(
            {
                "mode": mode,
                "project": config.project,
                "entity": config.entity,
                "group": config.group or sweep,
                "tags": config.tags,
                "sweep": sweep,
                "sweep_id": sweep_id,
                "models": models,
            }
        )

    def progress(self, model: str, row: Mapping[str, float]) -> None:
        """Add a point to a model's history, each key as `progress/<key>`. The caller decides how often."""
        self._post({"kind": "progress", "model": model, "row": self._progress(row)})

    def overview(self, row: Mapping[str, float]) -> None:
        """Add a point to the overview run's history. Its leaderboard follows from the cells."""
        self._post({"kind": "progress", "model": None, "row": self._progress(row)})

    def cell(self, record: Record) -> None:
        """Show a finished or failed cell. On a resumed sweep give the stored records too: a summary is sent whole."""
        scores = [(score, _is_main(score, record)) for score in record.scores]
        self._post(
            {
                "kind": "cell",
                "model": record.model,
                "task": record.task,
                "status": record.status,
                "summary": summary(record),
                "rows": [_row(record, score) for score, _ in scores] or [_row(record, None)],
                "leaders": [_row(record, score) for score, main in scores if main] or [_row(record, None)],
                "cost": {
                    "wall_s": record.wall_s,
                    "request_s": record.request_s,
                    "prompt_tokens": record.counts.prompt_tokens,
                    "generated_tokens": record.counts.generated_tokens,
                },
                "warnings": len(record.warnings),
            }
        )

    def close(self, timeout_s: float) -> Outcome:
        """End all runs and say what became of them; what is not sent after `timeout_s` is given up."""
        if self._outcome is None:
            deadline = time.monotonic() + timeout_s
            self._closing = True
            if self._process is not None:
                self._stop(self._process, deadline)
            self._outcome = self._result()
        return self._outcome

    def _stop(self, process: subprocess.Popen[bytes], deadline: float) -> None:
        try:
            for message in ({"kind": "close"}, None):
                if process.poll() is None:
                    self._queue.put(message, timeout=max(0.0, deadline - time.monotonic()))
            process.wait(max(0.0, deadline - time.monotonic()))
        except (queue.Full, subprocess.TimeoutExpired):
            self._fail(
                "W&B did not take everything in time and was stopped; the run directory has what is missing there"
            )
            _kill(process.pid)
            process.wait()
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)  # a writer that still waits; one with a full queue meets the closed pipe
        for thread in self._threads:
            thread.join(1.0)
        if process.returncode and not self._errors:
            self._fail(f"W&B's process ended with exit code {process.returncode}; see {self._log}")

    def _result(self) -> Outcome:
        if self._unsent:
            self._errors.append(f"{self._unsent} updates were not sent to W&B; the run directory holds the results")
        publish = None
        if self._offline:
            command = "wandb" if shutil.which("wandb") else shlex.quote(str(Path(sys.executable).with_name("wandb")))
            # All offline runs, not just ours: W&B puts several launches of one run together and skips what it has.
            where = shlex.quote(str(self._directory))
            # WANDB_DIR, or it would leave a folder of logs wherever it is run.
            publish = f"WANDB_DIR={shlex.quote(str(self._directory.parent))} {command} sync --yes {where}/offline-run-*"
        return Outcome(
            mode=self._mode or "offline",
            why=self._why if self._mode else "".join(self._errors[:1]),
            urls=dict(self._urls),
            overview_url=self._overview_url,
            errors=tuple(self._errors),
            offline=tuple(self._offline),
            publish=publish,
        )

    @property
    def _log(self) -> Path:
        return self._directory / "tracking.log"

    def _progress(self, row: Mapping[str, float]) -> dict[str, float]:
        return {"elapsed_s": time.monotonic() - self._started, **row}

    def _post(self, message: dict[str, Any]) -> None:
        if self._outcome is not None and self._outcome.mode == "disabled":
            return
        try:
            if self._process is None or self._closing:
                raise queue.Full
            self._queue.put_nowait(message)
        except queue.Full:
            self._unsent += 1

    def _fail(self, text: str) -> None:
        """The first failure is a warning; a W&B that stays away must not fill the terminal."""
        text = str(scrub(text, self._secrets))
        logger.log(logging.INFO if self._errors else logging.WARNING, "%s", text)
        self._errors.append(text)

    def _write(self) -> None:
        """Thread: queue -> child, masked. Ends with the child."""
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(OSError), self._process.stdin as pipe:
            while (message := self._queue.get()) is not None:
                try:
                    line = json.dumps(scrub(message, self._secrets), default=str)
                except (TypeError, ValueError, RecursionError) as error:
                    self._fail(f"an update could not be written for W&B ({error}): {str(message)[:200]}")
                    continue
                pipe.write(line.encode() + b"\n")
                pipe.flush()

    def _read(self) -> None:
        """Thread: what the child says -> fields. Ends with the child, and is the one who notices a dead one."""
        assert self._process is not None
        assert self._process.stdout is not None
        with self._process.stdout as pipe:
            for line in pipe:
                if not line.endswith(b"\n"):
                    break  # torn by the child's death
                event = json.loads(line)
                if "mode" in event:
                    self._mode, self._why = event["mode"], event["why"]
                    logger.info("W&B is %s%s", self._mode, self._why and f": {self._why}")
                elif "error" in event:
                    self._fail(event["error"])
                elif event["model"] is None:
                    self._opened(event)
                    self._overview_url = event["url"]
                else:
                    self._opened(event)
                    if event["url"]:
                        self._urls[event["model"]] = event["url"]
        code = self._process.wait()
        if not self._closing:
            self._closing = True
            self._fail(f"W&B's process ended (exit code {code}); the sweep goes on without it. See {self._log}")

    def _opened(self, event: Mapping[str, Any]) -> None:
        if event["offline"]:
            self._offline.append(Path(event["directory"]))
        if event["url"]:
            logger.info("W&B run of %s: %s", event["model"] or "the sweep", event["url"])


def run_id(sweep: str, sweep_id: str, model: str | None) -> str:
    """A model's run id (the overview's for None): the same in every launch of the sweep, at most 64 characters."""
    digest = hashlib.sha256(f"{sweep_id}\0{'' if model is None else 'm' + model}".encode()).hexdigest()[:10]
    slugs = [re.sub(r"[^0-9A-Za-z_-]+", "-", name).strip("-") for name in (sweep, model or "overview")]
    return f"{slugs[0][:24]}-{slugs[1][:28]}-{digest}"


def summary(record: Record) -> dict[str, float]:
    """W&B summary keys of a cell: `eval/<task>/<metric>[__<filter>]`, `…_stderr[__<filter>]` and `eval/<task>/n`.

    A group's subtasks are `eval/<task>/<subtask>/<metric>`, so that a subtask which is also a cell of its own, perhaps
    with other settings, keeps its own numbers.
    """
    values: dict[str, float] = {}
    for score in record.scores:
        part = "" if _is_main(score, record) else f"/{_name(score.task)}"
        prefix = f"eval/{_name(record.task)}{part}"
        suffix = "" if score.filter in ("", "none") else f"__{_name(score.filter)}"
        values[f"{prefix}/{_name(score.metric)}{suffix}"] = score.value
        if score.stderr is not None:
            values[f"{prefix}/{_name(score.metric)}_stderr{suffix}"] = score.stderr
        if score.samples is not None:
            values[f"{prefix}/n"] = score.samples
    return values


def _is_main(score: Score, record: Record) -> bool:
    """Whether a score is the cell's own. A cell may go by another name than lm-eval's; a tag has no row of its own."""
    tops = {other.task for other in record.scores if other.depth == 0}
    return score.depth == 0 and (score.task == record.task or len(tops) == 1)


def _row(record: Record, score: Score | None) -> list[Any]:
    """A line of COLUMNS; without a score the line of a cell that has none, which is a failed one."""
    numbers: list[Any] = [None] * 8
    if score is not None:
        numbers = [score.task, score.version, score.filter, score.num_fewshot]
        numbers += [score.metric, score.value, score.stderr, score.samples]
    end = [record.status, record.wall_s, "\n".join(record.warnings), record.error]
    return [record.model, record.task, *numbers, *end]


def _name(text: str) -> str:
    """W&B sorts and filters only by [A-Za-z0-9_]; `/` makes sections, `.` would nest."""
    name = re.sub(r"[^0-9A-Za-z_]+", "_", text).strip("_")
    return name if name[:1].isalpha() else f"_{name}"


_SECRET_NAME = re.compile(
    r"((api|access|secret|private)[-_]?key|token|secret|passwo?r?d|credentials?|authorization)$", re.IGNORECASE
)  # not `tokens`: those are counts
_TELLING = (str, bytes, list, tuple)
"""What a secret comes as; a number under such a name is a figure (`s_per_token`), a switch tells nothing."""
_SECRET_TEXT = (
    re.compile(r"(?i)((?:api[-_]?key|token|secret|password)[\"']?\s*[=:]\s*[\"']?)[^\s,;&\"']+"),
    re.compile(r"(?i)(\b(?:bearer|basic)\s+)[^\s,;&\"']+"),
    re.compile(r"(://)[^\s/@]+(?=@)"),
)


def scrub(value: Any, secrets: Sequence[str]) -> Any:
    """The same value with `***` for each of `secrets`, for text under a secret's name and for `api_key=…` in text."""
    known = sorted((secret for secret in secrets if len(secret) >= SHORTEST_SECRET), key=len, reverse=True)

    def text(value: str) -> str:
        for secret in known:
            value = value.replace(secret, MASK)
        for pattern in _SECRET_TEXT:
            value = pattern.sub(rf"\1{MASK}", value)
        return value

    def masked(value: Any) -> Any:
        if isinstance(value, str):
            return text(value)
        if isinstance(value, Mapping):
            return {
                text(str(key)): MASK if _SECRET_NAME.search(str(key)) and isinstance(item, _TELLING) else masked(item)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple | set | frozenset):
            return [masked(item) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        return text(str(value))

    return masked(value)


def _mode(config: WandbConfig) -> str:
    """What is asked: WANDB_MODE, W&B's own switch, decides where the config says `auto`."""
    asked = os.environ.get("WANDB_MODE", "")
    return asked if config.mode == "auto" and asked in ("online", "offline", "disabled") else config.mode


_RUN_VARIABLES = {
    *("WANDB_MODE", "WANDB_DISABLED", "WANDB_SERVICE", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RUN_GROUP"),
    *("WANDB_NAME", "WANDB_NOTES", "WANDB_TAGS", "WANDB_JOB_TYPE", "WANDB_SWEEP_ID"),
}
"""Belong to one run of the user's own; they would bend ours."""


def _spawn(directory: Path) -> "subprocess.Popen[bytes]":
    """The child, in a session of its own so that Ctrl-C leaves it to the driver, which closes it in order."""
    directory.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in _RUN_VARIABLES}
    source = str(Path(__file__).resolve().parent.parent)
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
        "WANDB_DIR": str(directory.parent),  # the client adds `wandb`
        # Beside the runs: what an offline run refers to must live as long as the run does.
        "WANDB_DATA_DIR": str(directory / "data"),
        "WANDB_CACHE_DIR": str(directory / "cache"),
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_SILENT": "true",
    }
    with (directory / "tracking.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "sweep.tracking"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,
        )


def _kill(pid: int) -> None:
    """Kill a child with its wandb-core, which is in a session of its own and may try to upload for days."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for victim in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()


# The child from here on.


class _Mirror:
    """The child's state: the open runs and all that their tables hold."""

    def __init__(self, start: Mapping[str, Any], say: Callable[..., None]) -> None:
        self._start = start
        self._say = say
        self._runs: dict[str | None, Any] = {}  # None where W&B refused the run
        self._cells: dict[str, dict[str, Mapping[str, Any]]] = {}
        self._unpublished: set[str] = set()
        self._published = -TABLE_S
        self._why = _offline_because(start["mode"])
        self._say(mode="offline" if self._why else "online", why=self._why)
        self._run(None)

    def apply(self, message: Mapping[str, Any]) -> None:
        if message["kind"] == "progress":
            if run := self._run(message["model"]):
                with self._attempt("progress"):
                    run.log({f"progress/{key}": value for key, value in message["row"].items()})
            return
        model = message["model"]
        self._cells.setdefault(model, {})[message["task"]] = message
        self._unpublished.add(model)
        if run := self._run(model):
            with self._attempt(f"the results of {model}/{message['task']}"):
                run.summary.update(message["summary"] | _totals(self._cells[model].values()))

    def publish_tables(self, now: float) -> None:
        """Log the tables of models with new cells and the leaderboard, at most every TABLE_S."""
        if not self._unpublished or now - self._published < TABLE_S:
            return
        for model in sorted(self._unpublished):
            self._table(model, "results", [row for cell in self._cells[model].values() for row in cell["rows"]])
        self._unpublished.clear()
        cells = [cell for of_model in self._cells.values() for cell in of_model.values()]
        self._table(None, "leaderboard", [row for cell in cells for row in cell["leaders"]])
        if run := self._run(None):
            with self._attempt("the overview"):
                run.summary.update({"status/models": len(self._cells)} | _totals(cells))
        self._published = time.monotonic()

    def close(self, exit_code: int) -> None:
        """Publish what is due and end all runs, side by side since each waits for its own uploads."""
        self.publish_tables(float("inf"))
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda run: self._finish(run, exit_code), filter(None, self._runs.values())))

    def _finish(self, run: Any, exit_code: int) -> None:
        with self._attempt(f"the end of run {run.name}"):
            run.finish(exit_code=exit_code)

    def _table(self, model: str | None, key: str, rows: list[list[Any]]) -> None:
        import wandb

        if run := self._run(model):
            with self._attempt(f"table {key} of {run.name}"):
                run.log({key: wandb.Table(columns=COLUMNS, data=rows, allow_mixed_types=True)})

    @contextlib.contextmanager
    def _attempt(self, what: str) -> Iterator[None]:
        """A failure costs `what` and is told; without its wandb-core this process is of no use and ends."""
        try:
            yield
        except ConnectionError as error:
            self._say(error=f"W&B's service process is gone ({error}); lost from {what} on")
            os._exit(1)
        except Exception as error:  # noqa: BLE001 - wandb raises its own and plain exceptions of many kinds
            self._say(error=f"W&B did not take {what}: {type(error).__name__}: {error}")

    def _run(self, model: str | None) -> Any:
        """The model's open run (the overview for None), or None when W&B would not have it."""
        if model not in self._runs:
            first = not self._runs
            self._runs[model] = None
            with self._attempt(f"the run of {model or 'the sweep'}"):
                try:
                    self._runs[model] = self._open(model)
                except Exception as error:
                    if self._why or not first:
                        raise
                    self._fall_back(f"W&B refused the first run: {error}")
                    self._runs[model] = self._open(model)
        return self._runs[model]

    def _fall_back(self, why: str) -> None:
        """Offline from here on. A run id that failed once stays taken in wandb-core, so that goes too."""
        import wandb

        wandb.teardown()
        self._why = why
        self._say(mode="offline", why=why)

    def _open(self, model: str | None) -> Any:
        import wandb

        start = self._start
        name = start["sweep"] if model is None else model
        config: dict[str, Any] = {"sweep": {"name": start["sweep"], "id": start["sweep_id"]}}
        config |= {"models": sorted(start["models"])} if model is None else start["models"].get(model, {})
        run = wandb.init(
            project=start["project"],
            entity=start["entity"],
            group=start["group"],
            tags=start["tags"],
            job_type="sweep" if model is None else "eval",
            id=run_id(start["sweep"], start["sweep_id"], model),
            name=name,
            config=config,
            mode="offline" if self._why else "online",
            resume="allow",
            reinit="create_new",  # several runs in one process; the default returns the first
            settings=wandb.Settings(
                init_timeout=INIT_S,
                finish_timeout=FINISH_S,
                finish_timeout_raises=True,
                summary_timeout=10,
                x_transaction_log_flush_interval=FLUSH_S,
                allow_offline_artifacts=False,  # a table then is a file of the run and survives a copy
                # Only what we log leaves the machine: no argv, console, host, git, packages, code or statistics. (An
                # artifact's manifest still names the file under `wandb/data` that it was made from.)
                console="off",
                disable_git=True,
                disable_code=True,
                save_code=False,
                program="lmsweep",
                host="lmsweep",
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
                quiet=True,
                silent=True,
                # By default the client interrupts the main thread when "Stop run" is pressed or an upload is refused.
                stop_on_fatal_error=True,
                stop_fn=lambda: self._say(error=f"W&B stopped run {name}: refused for good, or stopped by hand there"),
            ),
        )
        run.define_metric("progress/elapsed_s", hidden=True)
        run.define_metric("progress/*", step_metric="progress/elapsed_s")
        if not self._why:
            # One artifact while the server answers. Without it, a run whose first table falls into an outage loses the
            # table and `finish` ignores its timeout (wandb 0.31: an uncancellable query).
            spec = wandb.Artifact(f"{run.id}-spec", type="sweep-spec")
            with spec.new_file("spec.json") as file:
                json.dump(config, file, indent=1)
            run.log_artifact(spec).wait(timeout=int(INIT_S))
        self._say(model=model, url=run.url or None, offline=bool(self._why), directory=str(Path(run.dir).parent))
        return run


def _totals(cells: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    cells = list(cells)
    costs = {key for cell in cells for key in cell["cost"]}
    return {
        "status/tasks_done": sum(cell["status"] == Status.DONE for cell in cells),
        "status/tasks_failed": sum(cell["status"] == Status.FAILED for cell in cells),
        "status/warnings": sum(cell["warnings"] for cell in cells),
    } | {f"cost/{key}": sum(cell["cost"][key] for cell in cells) for key in sorted(costs)}


def _offline_because(mode: str) -> str:
    """Why this sweep is tracked offline, or an empty string when W&B answered and knows the key."""
    import wandb

    if mode == "offline":
        return "as asked"
    url = str(wandb.setup().settings.base_url).rstrip("/")
    key = os.environ.get("WANDB_API_KEY") or _login(url)
    if not key:
        return "neither WANDB_API_KEY nor a login (`wandb login`) was found"
    answer: queue.Queue[str] = queue.Queue()
    # In a thread, because a name server that does not answer is beyond any socket's timeout.
    threading.Thread(target=lambda: answer.put(_refusal(url, key)), daemon=True).start()
    try:
        return answer.get(timeout=PREFLIGHT_S)
    except queue.Empty:
        return f"{url} did not answer within {PREFLIGHT_S:g} s"


def _login(url: str) -> str | None:
    """The key that `wandb login` left in the netrc file."""
    import netrc
    from urllib.parse import urlsplit

    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        found = netrc.netrc(path).authenticators(urlsplit(url).netloc)
    except (OSError, netrc.NetrcParseError):
        return None
    return found[2] if found else None


def _refusal(url: str, key: str) -> str:
    """Why W&B cannot be used now; empty when it knows the key, or answers something that the client should judge."""
    import base64
    import urllib.error
    import urllib.request

    request = urllib.request.Request(
        f"{url}/graphql",
        data=json.dumps({"query": "query Viewer { viewer { id } }", "variables": {}}).encode(),
        headers={
            "Authorization": "Basic " + base64.b64encode(f"api:{key}".encode()).decode(),
            "Content-Type": "application/json",
            "User-Agent": "lmsweep",
        },
    )
    try:
        with urllib.request.urlopen(request, timeout=PREFLIGHT_S) as response:
            known = (json.load(response).get("data") or {}).get("viewer")
        return "" if known else f"{url} does not know the key"
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 401 or error.code >= 500:
                return f"{url} answered {error.code} {error.reason}"
        return ""
    except (OSError, ValueError) as error:
        return f"{url} could not be reached: {error}"


def _listen(pipe: IO[bytes], inbox: "queue.Queue[dict[str, Any]]") -> None:
    """Thread: always reading, so that the driver can always write; the last message is `close` or `orphan`."""
    for line in pipe:
        if not line.endswith(b"\n"):
            break  # torn by the driver's death
        message = json.loads(line)
        inbox.put(message)
        if message.get("kind") == "close":
            return
    inbox.put({"kind": "orphan"})
    time.sleep(ORPHAN_S)
    _kill(os.getpid())


def main() -> None:
    """The child: messages from stdin to W&B, events to stdout, everything else that is printed to stderr, the log."""
    messages, events = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    # wandb-core inherits 0, 1 and 2 and may outlive us; it must hold neither end of the driver's pipes.
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the driver closes us, or its end does
    lock = threading.Lock()

    def say(**event: Any) -> None:
        with lock, contextlib.suppress(OSError):
            events.write(json.dumps(event) + "\n")
            events.flush()

    inbox: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(messages, inbox), daemon=True).start()
    start = inbox.get()
    if start.get("kind") == "orphan":
        return
    mirror = _Mirror(start, say)
    kind = ""
    while kind not in ("close", "orphan"):
        with contextlib.suppress(queue.Empty):
            message = inbox.get(timeout=1.0)
            kind = message["kind"]
            if kind in ("progress", "cell"):
                mirror.apply(message)
        if inbox.empty():
            mirror.publish_tables(time.monotonic())
    mirror.close(exit_code=0 if kind == "close" else 1)


if __name__ == "__main__":
    main()
