"""The process that holds W&B's client and mirrors what it is told. With wandb_report.py, the only one that knows wandb.

tracking.py starts it and writes JSON lines to it. It ends by itself when that pipe closes, so a killed driver leaves
complete offline runs and no process. A dead wandb-core can only be cured by replacing the process that started it,
which the driver must therefore not be.
"""

import contextlib
import hashlib
import json
import os
import queue
import re
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from sweep.record import Status
from sweep.results import sharing, wandb_report
from sweep.results.store import write_file

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

COLUMNS = [
    *("model", "task", "subtask", "version", "filter", "n_shot", "metric", "value", "stderr", "n"),
    *("status", "seconds", "warnings", "error"),
]
"""Of both tables. `task` is the cell's, `subtask` lm-eval's name of what the line is about."""

OF_CELLS = ("eval/", "cost/", "samples/", "results", "leaderboard")
"""How keys of a summary begin that tell of cells."""

ROW = "progress/row"
"""Number of a row in a run's history: tells which rows W&B has."""
HISTORY = "history.jsonl"
"""In the directory of the runs: every row, whatever W&B took."""
REPORT = "report.json"
"""Beside it: what the Report is made of, and once it is made its id and address."""


def kill(pid: int) -> None:
    """Kill a child with its wandb-core, which is in a session of its own and may try to upload for days."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for victim in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()


class History:
    """The rows of all runs on the disk, numbered for each run from the sweep's first launch on."""

    def __init__(self, directory: Path) -> None:
        self.before = known = read_history(directory)
        """What earlier launches left, by model: W&B may lack some of it."""
        self._counts = {model: rows[-1][ROW] + 1 for model, rows in known.items()}
        self._elapsed_s = max(
            (row.get("progress/elapsed_s", 0.0) for rows in known.values() for row in rows), default=0.0
        )
        """Until the last launch ended; a chart goes on from there."""
        self._file = (directory / HISTORY).open("ab", buffering=0)
        if self._file.tell():
            self._file.write(b"\n")  # ends a line that was torn

    def add(self, model: str | None, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row as it goes to W&B."""
        number = self._counts.get(model, 0)
        kept = {**row, "progress/elapsed_s": row["progress/elapsed_s"] + self._elapsed_s, ROW: number}
        self._file.write(json.dumps({"model": model, "row": kept}).encode() + b"\n")
        self._counts[model] = number + 1
        return kept


def read_history(directory: Path) -> dict[str | None, list[dict[str, Any]]]:
    """Model (None: the overview) -> the rows of its run; of a file that was torn what can be read."""
    rows: dict[str | None, list[dict[str, Any]]] = {}
    path = directory / HISTORY
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            if line:
                kept = json.loads(line)
                rows.setdefault(kept["model"], []).append(kept["row"])
    return rows


class _Mirror:
    """The child's state: the open runs and all that their tables hold."""

    def __init__(self, start: Mapping[str, Any], say: Callable[..., None]) -> None:
        self._start = start
        self._say = say
        self._runs: dict[str | None, Any] = {}  # None where W&B refused the run
        self._cells: dict[str, dict[str, Mapping[str, Any]]] = {}
        self._unpublished: set[str] = set()
        self._unshown: dict[tuple[str, str], Mapping[str, Any]] = {}
        """Cells whose samples W&B may have and has not, by model and task."""
        self._caught_up: set[str | None] = set()
        """Those whose run at W&B has all rows of earlier launches."""
        self._published = -TABLE_S
        self._report: Mapping[str, Any] | None = None
        self._why = _offline_because(start["mode"])
        self._say(mode="offline" if self._why else "online", why=self._why)
        self._history: History | None = None
        if not self._again:
            with self._attempt("the history on this disk"):
                self._history = History(Path(start["directory"]))
            self._run(None)

    @property
    def _again(self) -> bool:
        """Whether this is about a sweep that is on the disk: to W&B or nowhere."""
        return bool(self._start["again"])

    def apply(self, message: Mapping[str, Any]) -> None:
        match message["kind"]:
            case "progress":
                self._progress(message["model"], message["row"])
            case "history":
                self._catch_up(message["model"], message["rows"])
            case "report":
                self._report = message
            case "cell":
                self._cell(message)
            case "stands":
                self._stands(message["model"], message["cells"])

    def _progress(self, model: str | None, row: Mapping[str, Any]) -> None:
        kept = dict(row)
        if self._history:
            with self._attempt("a row of the history on this disk"):
                kept = self._history.add(model, row)
        if run := self._run(model):
            with self._attempt("progress"):
                run.log(kept)

    def _catch_up(self, model: str | None, rows: Sequence[Mapping[str, Any]]) -> None:
        """Those rows of a run's history that W&B does not have."""
        if run := self._run(model):
            with self._attempt(f"the history of {run.name}"):
                # It came with the rows, in one stream, and is where it broke off. A history without is of someone else.
                last = run.summary.get(ROW)
                if last is None:
                    last = -1 if run.summary.get("progress/elapsed_s") is None else float("inf")
                for row in rows:
                    if row[ROW] > last:
                        run.log(dict(row))
                self._caught_up.add(model)

    def _stands(self, model: str | None, cells: Sequence[Mapping[str, Any]]) -> None:
        """Show these cells of a model and of others nothing; for None, the overview, it is those of all models."""
        for cell in cells:
            self._keep(cell)
        if not (cells or model in self._runs or self._began_before(model)):
            return
        known = self._known(model)
        values = self._sums(model)
        tables = {"results", "leaderboard"} if known else set()
        for cell in known:
            values |= cell["summary"] if model is not None else {}
            tables |= {cell["samples_key"]} if cell["samples"] else set()
        if run := self._run(model):
            with self._attempt(f"the results of {run.name}"):
                _replace(run, OF_CELLS, values, besides=tables)

    def _began_before(self, model: str | None) -> bool:
        """Whether W&B may have its run from an earlier launch."""
        start = self._start
        id = run_id(start["sweep"], start["sweep_id"], model)
        return not self._why and any(Path(start["directory"]).glob(f"*run-*-{id}"))

    def _known(self, model: str | None) -> list[Mapping[str, Any]]:
        models: Iterable[str] = self._cells if model is None else (model,)
        return [cell for name in models for cell in self._cells.get(name, {}).values()]

    def _sums(self, model: str | None) -> dict[str, Any]:
        return ({"status/models": len(self._cells)} if model is None else {}) | _totals(self._known(model))

    def _cell(self, message: Mapping[str, Any]) -> None:
        model = message["model"]
        self._keep(message)
        if run := self._run(model):
            with self._attempt(f"the results of {model}/{message['task']}"):
                _replace(run, (message["section"],), message["summary"])
                run.summary.update(self._sums(model))

    def _keep(self, cell: Mapping[str, Any]) -> None:
        model, task = cell["model"], cell["task"]
        self._cells.setdefault(model, {})[task] = cell
        self._unpublished.add(model)
        if cell["samples"]:
            self._unshown[model, task] = cell

    def publish_tables(self, now: float) -> None:
        """Log the tables of models with new cells and the leaderboard, at most every TABLE_S."""
        if not self._unpublished or now - self._published < (float("inf") if self._again else TABLE_S):
            return
        for model in sorted(self._unpublished):
            rows = [row for cell in self._cells[model].values() for row in cell["rows"]]
            self._table(model, "results", COLUMNS, rows)
        self._unpublished.clear()
        for (model, task), cell in self._unshown.items():
            with self._attempt(f"samples of {model}/{task}"):
                columns, rows = sharing.table(self._picked(cell))
                self._table(model, cell["samples_key"], columns, rows)
        self._unshown.clear()
        self._table(None, "leaderboard", COLUMNS, [row for cell in self._known(None) for row in cell["leaders"]])
        if run := self._run(None):
            with self._attempt("the overview"):
                run.summary.update(self._sums(None))
        self._published = time.monotonic()

    def close(self, exit_code: int) -> None:
        """Publish what is due and end all runs, side by side since each waits for its own uploads; then the Report."""
        self.publish_tables(float("inf"))
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda model: self._finish(model, exit_code), self._runs))
        if self._report is not None:
            self._make_report(self._report)

    def _finish(self, model: str | None, exit_code: int) -> None:
        if not (run := self._runs[model]):
            return
        # With the driver gone there are seconds left; and an offline artifact is but a path into this machine.
        if model is not None and exit_code == 0 and not self._why:
            self._upload_files(run, list(self._cells.get(model, {}).values()))
        directory = Path(run.dir).parent
        finished = False
        with self._attempt(f"the end of run {run.name}"):
            run.finish(exit_code=exit_code)
            finished = True
        if self._why:
            return
        if refused := _refused(directory):
            self._say(error=f"W&B refused the stream of run {run.name} for good, the rest is missing there: {refused}")
        elif finished and model in self._caught_up:
            _mark_synced(directory.parent, run.id)

    def _upload_files(self, run: Any, cells: Sequence[Mapping[str, Any]]) -> None:
        """lm-eval's own files: of results all, of samples what may be shared."""
        import wandb

        results = wandb.Artifact(f"{run.id}-results", type="lm-eval-results")
        samples = wandb.Artifact(f"{run.id}-samples", type="lm-eval-samples")
        with self._attempt(f"the result files of {run.name}"):
            for cell in cells:
                for path in map(Path, cell["results"]):
                    with results.new_file(f"{cell['task']}/{path.name}", mode="wb") as file:
                        file.write(sharing.results(path))
        with self._attempt(f"the sample files of {run.name}"):
            for cell in cells:
                for path, lines in self._picked(cell).items():
                    with samples.new_file(f"{cell['task']}/{path.name}", mode="wb") as file:
                        file.write(b"".join(lines))
        for artifact in (results, samples):
            if artifact.manifest.entries:
                with self._attempt(f"artifact {artifact.name}"):
                    # Without the wait a failed upload says nothing.
                    run.log_artifact(artifact).wait(timeout=int(INIT_S))

    def _picked(self, cell: Mapping[str, Any]) -> dict[Path, list[bytes]]:
        return sharing.picked([Path(path) for path in cell["samples"]], cell["samples_rows"])

    def _make_report(self, message: Mapping[str, Any]) -> None:
        """Online it is made or brought up to date; what it is made of is kept in any case."""
        path = Path(self._start["directory"]) / REPORT
        with self._attempt("the Report"):
            before = json.loads(path.read_bytes()) if path.exists() else {}
            made = {key: before[key] for key in ("id", "url", "share_url") if key in before}
            made |= {"recipe": message["recipe"]}
            write_file(path, json.dumps(made, indent=1))
            if self._why:
                return
            if not (entity := next((run.entity for run in self._runs.values() if run), None)):
                raise RuntimeError("it shows runs, and W&B took none")
            shared = message["share_link"]
            made |= wandb_report.save(message["recipe"], entity=entity, id=made.get("id", ""), share_link=shared)
            if not shared and "share_url" in made:
                # Only a link of ours. If it does not end, its address stays here and the next Report tries again.
                with self._attempt("the end of the Report's public link"):
                    wandb_report.end_share_link(made["id"], entity=entity, project=message["recipe"]["project"])
                    del made["share_url"]
            write_file(path, json.dumps(made, indent=1))
            self._say(report=made["share_url"] if shared else made["url"])

    def _table(self, model: str | None, key: str, columns: list[str], rows: list[list[Any]]) -> None:
        import wandb

        if run := self._run(model):
            with self._attempt(f"table {key} of {run.name}"):
                run.log({key: wandb.Table(columns=columns, data=rows, allow_mixed_types=True)})

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
        if self._again and self._why:
            return None
        if model not in self._runs:
            first = not self._runs
            self._runs[model] = None
            with self._attempt(f"the run of {model or 'the sweep'}"):
                try:
                    self._runs[model] = self._open(model)
                except Exception as error:
                    if self._why or self._again or not first:
                        raise
                    self._fall_back(f"W&B refused the first run: {error}")
                    self._runs[model] = self._open(model)
            if self._history and not self._why:
                # Before any row of this launch: a gap below the last row at W&B would never be seen.
                self._catch_up(model, self._history.before.get(model, ()))
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
                # Only what we log leaves the machine: no argv, console, host, git, packages, script or statistics. (An
                # artifact's manifest still names the file under `wandb/data` that it was made from, and lm-eval's
                # result files have the task's settings, some of which are Python functions as they are written.)
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
        run.define_metric(ROW, hidden=True)
        for section in ("progress/*", "server/*"):
            run.define_metric(section, step_metric="progress/elapsed_s")
        # Estimates are no results and stay out of the summary.
        run.define_metric("live/*", step_metric="progress/elapsed_s", summary="none")
        if not self._why:
            # One artifact while the server answers. Without it, a run whose first table falls into an outage loses the
            # table and `finish` ignores its timeout (wandb 0.31: an uncancellable query).
            spec = wandb.Artifact(f"{run.id}-spec", type="sweep-spec")
            with spec.new_file("spec.json") as file:
                json.dump(config, file, indent=1)
            run.log_artifact(spec).wait(timeout=int(INIT_S))
        self._say(model=model, url=run.url or None, offline=bool(self._why), directory=str(Path(run.dir).parent))
        return run


def _replace(run: Any, sections: tuple[str, ...], values: Mapping[str, Any], besides: Collection[str] = ()) -> None:
    """Have these values in a run's summary, and in these sections of it (how keys begin) no others but `besides`."""
    for key in run.summary.keys():  # noqa: SIM118 - a summary cannot be iterated
        if key.startswith(sections) and key not in values and key not in besides:
            del run.summary[key]
    run.summary.update(values)


def _mark_synced(directory: Path, id: str) -> None:
    """`wandb sync` leaves a run's offline parts alone from now on: it would add their history a second time."""
    for part in directory.glob(f"offline-run-*-{id}/run-*.wandb"):
        part.with_name(f"{part.name}.synced").touch()


def _refused(directory: Path) -> str:
    """Why an online run lost its stream, by the client's own log of it: `finish` then returns as if all were well."""
    log = directory / "logs" / "debug-internal.log"
    if log.exists():
        for line in log.read_text(errors="replace").splitlines():
            if "filestream: fatal error" in line:
                with contextlib.suppress(json.JSONDecodeError):
                    return str(json.loads(line)["msg"]).removeprefix("filestream: fatal error: ")
    return ""


def run_id(sweep: str, sweep_id: str, model: str | None) -> str:
    """A model's run id (the overview's for None): the same in every launch of the sweep, at most 64 characters."""
    digest = hashlib.sha256(f"{sweep_id}\0{'' if model is None else 'm' + model}".encode()).hexdigest()[:10]
    slugs = [re.sub(r"[^0-9A-Za-z_-]+", "-", name).strip("-") for name in (sweep, model or "overview")]
    return f"{slugs[0][:24]}-{slugs[1][:28]}-{digest}"


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
    kill(os.getpid())


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
            mirror.apply(message)
        if inbox.empty():
            mirror.publish_tables(time.monotonic())
    mirror.close(exit_code=0 if kind == "close" else 1)


if __name__ == "__main__":
    main()
