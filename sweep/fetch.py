"""What a sweep needs from the network: brought into the cache of this machine, or said to be missing there.

For login nodes and air-gapped clusters: after `fetch`, the same sweep runs with HF_HUB_OFFLINE=1. Data sets and metric
scripts come by lm-eval's own loading, so that just what a run loads is there. Not fetched: what a task asks for only
while it scores (a model that judges answers, say), and what only an option of vLLM names (a draft model).
"""

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from sweep.errors import ConfigError
from sweep.planning import hub
from sweep.planning.plan import Cell, Plan
from sweep.planning.tasks import catalog

LOADERS = frozenset(
    {
        *("arrow", "audiofolder", "csv", "generator", "hdf5", "imagefolder", "json", "lance", "pandas", "parquet"),
        *("pdffolder", "spark", "sql", "text", "videofolder", "webdataset", "xml"),
    }
)
"""Names of `dataset_path` that are formats of files given elsewhere in the task, no data sets of the hub."""

LOG_TAIL_LINES = 5


def fetch(plan: Plan, secrets: Sequence[str]) -> int:
    """Bring all that the owed cells of `plan` need; the exit code: 1 when something could not be had.

    Prints a line for each thing as it goes and goes on after a failure. What is there is not loaded again, so the same
    command goes on where it was stopped. `secrets` are withheld from the code of tasks, beside those that are known by
    their names. Raises ConfigError where HF_HUB_OFFLINE forbids it.
    """
    if hub.offline():
        raise ConfigError("fetch has to ask the hub, and HF_HUB_OFFLINE forbids it: unset it for this command")
    print(f"fetching into {_home()}")
    failures = []
    for source in _sources(plan):
        line, failure = _brought(source)
        print(f"  {line}", flush=True)
        failures += [failure] if failure else []
    for line, failure in _loaded(_tasks(plan), secrets):
        print(f"  {line}", flush=True)
        failures += [failure] if failure else []
    if failures:
        print(f"\n{len(failures)} could not be had; the same command goes on where this one stopped")
        print("\n".join(f"  {failure}" for failure in failures))
        return 1
    print("all that the sweep needs is on this machine; HF_HUB_OFFLINE=1 keeps a run from asking the hub")
    return 0


def missing(plan: Plan) -> list[str]:
    """What the owed cells of `plan` need and this machine has not, a sentence each; asks no network and loads nothing.

    A data set counts as there when lm-eval has prepared its configuration once; of a task that is written in Python
    nothing is known.
    """
    absent = [f"{source.part} {source}: {what}" for source in _sources(plan) if (what := hub.lacking(source))]
    configurations: dict[str, set[str]] = {}
    for cell in _tasks(plan):
        for leaf in catalog((cell.task.include_path,) if cell.task.include_path else ()).leaves(cell.task.task):
            name = leaf.dataset_path
            if name and _on_hub(name) and not _prepared(name, leaf.dataset_name):
                configurations.setdefault(name, set()).add(leaf.dataset_name or "")
    for name, chosen in configurations.items():
        which = f", {len(chosen)} configurations" if len(chosen) > 1 else "".join(f" ({c})" for c in chosen if c)
        absent.append(f"data set {name}{which}: not here")
    return absent


def missing_block(plan: Plan) -> list[str]:
    """`missing` as lines for a terminal, with the cure; none when nothing is missing."""
    absent = missing(plan)
    if not absent:
        return []
    cure = "`python launch.py fetch` with the same arguments brings what the hub has of it"
    if hub.offline():
        cure = f"HF_HUB_OFFLINE is set, so their cells would fail; without it, {cure}"
    return [f"missing here, in {_home()}", *(f"  {line}" for line in absent), f"  {cure}"]


def _home() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME)


def _sources(plan: Plan) -> list[hub.Source]:
    return list(dict.fromkeys(source for server in plan.owed_servers.values() for source in server.sources))


def _tasks(plan: Plan) -> list[Cell]:
    """An owed cell of each task as lm-eval loads it: settings that change no document do not matter."""
    first: dict[tuple[str, str | None, str], Cell] = {}
    for cell in plan.owed:
        first.setdefault((cell.task.task, cell.task.include_path, repr(cell.task.metadata)), cell)
    return list(first.values())


def _brought(source: hub.Source) -> tuple[str, str | None]:
    """The line about it, and why it could not be had."""
    try:
        brought = hub.bring(source)
    except Exception as error:  # noqa: BLE001 (libraries below the hub's have errors of their own; the next may come)
        return f"{source.part} {source}: failed", f"{source.part} {source}: {_reason(source, error)}"
    size = _size(brought.new_bytes) if brought.new_bytes else "already here"
    return f"{source.part} {source}: commit {brought.commit[:12]}, {size}", None


def _reason(source: hub.Source, error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    page = f"{constants.ENDPOINT}/{source.repository}"
    if isinstance(error, GatedRepoError):
        return f"gated: accept its terms at {page} and give HF_TOKEN, which {_token()}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub knows no such repository, or it is private and needs HF_TOKEN, which {_token()}: {page}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _loaded(cells: list[Cell], secrets: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """The line about each cell's task, and why its data could not be had.

    In a process of its own, whose output is kept quiet; of one that dies the next task starts another.
    """
    from sweep.evaluating.evaluator import Checked, CheckTask, EvaluatorProcess

    with tempfile.TemporaryDirectory(prefix="lmsweep-fetch-") as folder:
        log_path = Path(folder) / "evaluator.log"
        evaluator = None
        try:
            for cell in cells:
                evaluator = evaluator or EvaluatorProcess(log_path, secrets=secrets)
                check = CheckTask(task_name=cell.task_name, task=cell.task, seeds=cell.seeds, model=cell.model.model)
                try:
                    evaluator.send(check)
                    event = evaluator.receive()
                    assert isinstance(event, Checked)
                    error = event.error
                except (EOFError, OSError):
                    evaluator.stop()
                    evaluator = None
                    tail = log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
                    error = "\n    ".join(["the process that loads it died; its last words:", *tail])
                name = f"task {cell.task_name}"
                if error is None:
                    yield f"{name}: its data and metrics are here", None
                else:
                    yield f"{name}: failed", f"{name}: {error}{_token_hint(error)}"
        finally:
            if evaluator is not None:
                evaluator.stop()


def _token_hint(error: str) -> str:
    """What to add where the hub may have kept a data set from us: `datasets` says so without a word about the token."""
    if not re.search(r"gated|DatasetNotFoundError|\b40[13]\b", error):
        return ""
    return f" (a gated or private data set needs accepted terms and HF_TOKEN, which {_token()})"


def _token() -> str:
    from huggingface_hub import get_token

    return "is set" if get_token() else "is not set"


def _on_hub(dataset: str) -> bool:
    return dataset not in LOADERS and not dataset.startswith((os.sep, ".", "~"))


def _prepared(name: str, configuration: str | None) -> bool:
    """Whether `datasets` has this configuration in the form in which it loads it without network."""
    from huggingface_hub import constants

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets"))
    *owner, last = name.split("/")
    # As in datasets/naming.py: `CamelCase` becomes `camel_case`.
    last = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", last)
    folder = "___".join([*owner, re.sub(r"([a-z\d])([A-Z])", r"\1_\2", last).lower()])
    prepared = (info.parent for info in (cache / folder).glob("*/*/*/dataset_info.json"))
    # `datasets` adds the options of a load to the name: a hash of its files, or `data_dir=…`.
    wanted = re.compile(f"{re.escape(configuration)}(-[0-9a-f]{{16}}|-.*=.*)?" if configuration else ".*")
    return any(
        wanted.fullmatch(folder.parent.parent.name) and not folder.name.endswith(".incomplete") for folder in prepared
    )


def _size(number: int) -> str:
    """`number` bytes in words."""
    if number < 1000:
        return f"{number} bytes"
    unit = min((len(str(number)) - 1) // 3, 4)
    return f"{number / 1000**unit:.1f} {' kMGT'[unit]}B"
