"""Records and progress -> Weights & Biases, by way of a child process (mirror.py).

W&B is a mirror: the run directory holds the truth, and nothing here can delay or fail an evaluation. The driver's side
only queues; one thread masks secrets and writes JSON lines to the child.

One run per model and one overview run share a group. Run ids are a function of the sweep's id, which lies in its run
directory, so a resumed sweep continues its runs. A summary is the result (`eval/<task>/<metric>`), history is progress,
tables list every score.

What was lost on the way is said in `Outcome.errors`, and the run directory still has it. The next launch that is online
sends rows of the history that are missing, publish.py everything.
"""

import contextlib
import json
import logging
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sweep import ROOT
from sweep.masking import MASK, is_proxy, is_secret, secret_variables
from sweep.planning.config import WandbConfig
from sweep.record import Record, Score
from sweep.results.mirror import kill

logger = logging.getLogger(__name__)

QUEUED = 10_000
"""Messages that wait for the child before the next one is given up."""
SHORTEST_SECRET = 6
"""Characters; masking anything shorter wherever it occurs would eat ordinary text."""


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
    report_url: str | None = None
    """Address of the W&B Report; its public one where that was asked for."""


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
        samples: Mapping[str, int] | None = None,
        again: bool = False,
    ) -> None:
        """`directory` is the run directory's `wandb`; `sweep_id` tells sweeps of one name apart; `models` maps each
        model to what W&B shows as its config; whatever is in `secrets` leaves this process as `***`. `samples` says
        how many of a task may be shown (`shared_rows`). `again` is for a sweep that is on the disk: runs are completed
        online or not at all."""
        self._directory = directory.resolve()
        self._models = tuple(models)
        self._samples = samples or {}
        self._secrets = secrets
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(QUEUED)
        self._started = time.monotonic()
        self._mode, self._why = "", ""
        self._urls: dict[str, str] = {}
        self._overview_url: str | None = None
        self._report_url: str | None = None
        self._offline: list[Path] = []
        self._errors: list[str] = []
        self._unsent = 0
        self._closing = False
        self._outcome: Outcome | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._threads: list[threading.Thread] = []
        mode = "online" if again else _mode(config)
        if mode == "disabled":
            self._outcome = Outcome(mode=mode, why="switched off")
            return
        try:
            self._process = _spawn(self._directory, secrets)
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
                "directory": str(self._directory),
                "again": again,
            }
        )

    @property
    def shows(self) -> bool:
        """Whether anything comes of what it is told."""
        return self._process is not None and not self._closing

    @property
    def online(self) -> bool:
        """Whether W&B has answered, and shows it now."""
        return self.shows and self._mode == "online"

    def progress(self, model: str, row: Mapping[str, float]) -> None:
        """Add a point to a model's history, each key as `progress/<key>` unless it has a section of its own
        (`server/running`). The caller decides how often."""
        self._post({"kind": "progress", "model": model, "row": self._progress(row)})

    def overview(self, row: Mapping[str, float]) -> None:
        """Add a point to the overview run's history. Its leaderboard follows from the cells."""
        self._post({"kind": "progress", "model": None, "row": self._progress(row)})

    def history(self, model: str | None, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add those rows of an earlier history (`read_history`) that a model's run (the overview's for None) lacks."""
        self._post({"kind": "history", "model": model, "rows": rows})

    def report(self, recipe: Mapping[str, Any], *, share_link: bool) -> None:
        """Make or update the Report once the runs have ended."""
        self._post({"kind": "report", "recipe": recipe, "share_link": share_link})

    def stands(self, records: Iterable[Record]) -> None:
        """Show what the run directory has of the whole sweep. All else that W&B has of its cells (of other settings, of
        tasks that are gone) leaves the summaries."""
        cells_by_model: dict[str, list[dict[str, Any]]] = {model: [] for model in self._models}
        for record in records:
            cells_by_model.setdefault(record.model, []).append(self._shown(record))
        for model, cells in cells_by_model.items():
            self._post({"kind": "stands", "model": model, "cells": cells})
        self._post({"kind": "stands", "model": None, "cells": []})

    def cell(self, record: Record) -> None:
        """Show a cell that has just finished or failed."""
        self._post({"kind": "cell"} | self._shown(record))

    def _shown(self, record: Record) -> dict[str, Any]:
        scores = [(score, _is_main(score, record)) for score in record.scores]
        files = [self._directory.parent / name for name in record.files]
        rows = self._samples.get(record.task, 0)
        return {
            "model": record.model,
            "task": record.task,
            "status": record.status,
            "section": f"eval/{_name(record.task)}/",
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
            "results": [str(path) for path in files if path.name.startswith("results_")],
            "samples": [str(path) for path in files if path.name.startswith("samples_") and rows],
            "samples_rows": rows,
            "samples_key": f"samples/{_name(record.task)}",
        }

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
            kill(process.pid)
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
        return Outcome(
            mode=self._mode or "offline",
            why=self._why if self._mode else "".join(self._errors[:1]),
            urls=dict(self._urls),
            overview_url=self._overview_url,
            report_url=self._report_url,
            errors=tuple(self._errors),
            offline=tuple(self._offline),
        )

    @property
    def _log(self) -> Path:
        return self._directory / "tracking.log"

    def _progress(self, row: Mapping[str, float]) -> dict[str, float]:
        found = {"elapsed_s": time.monotonic() - self._started, **row}
        return {key if "/" in key else f"progress/{key}": value for key, value in found.items()}

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
                elif "report" in event:
                    self._report_url = event["report"]
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


def summary(record: Record) -> dict[str, float]:
    """W&B summary keys of a cell: `eval/<task>/<metric>[__<filter>]`, `…_stderr[__<filter>]` and `eval/<task>/n`.

    A group's subtasks are `eval/<task>/<subtask>/<metric>`, so that a subtask which is also a cell of its own, perhaps
    with other settings, keeps its own numbers.
    """
    values: dict[str, float] = {}
    for score in record.scores:
        values[summary_key(record, score)] = score.value
        if score.stderr is not None:
            values[summary_key(record, score, "_stderr")] = score.stderr
        if score.samples is not None:
            values[f"{_section(record, score)}/n"] = score.samples
    return values


def summary_key(record: Record, score: Score, kind: str = "") -> str:
    """The key of one score of a cell; `kind` is `_stderr` for its standard error."""
    suffix = "" if score.filter in ("", "none") else f"__{_name(score.filter)}"
    return f"{_section(record, score)}/{_name(score.metric)}{kind}{suffix}"


def live_key(task: str, figure: str) -> str:
    """The history's key of something that is only estimated while a cell runs."""
    return f"live/{_name(task)}/{_name(figure)}"


def _section(record: Record, score: Score) -> str:
    part = "" if _is_main(score, record) else f"/{_name(score.task)}"
    return f"eval/{_name(record.task)}{part}"


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
                text(str(key)): MASK if is_secret(str(key)) and isinstance(item, _TELLING) else masked(item)
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


def _spawn(directory: Path, secrets: Sequence[str]) -> "subprocess.Popen[bytes]":
    """The child, in a session of its own so that Ctrl-C leaves it to the driver, which closes it in order.

    Of all secrets in the environment it sees W&B's own and a proxy's.
    """
    directory.mkdir(parents=True, exist_ok=True)
    secret = secret_variables(os.environ)
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _RUN_VARIABLES
        and (name.startswith("WANDB_") or is_proxy(name) or not (name in secret or value in secrets))
    }
    source = str(ROOT)
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
            [sys.executable, "-P", "-m", "sweep.results.mirror"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
