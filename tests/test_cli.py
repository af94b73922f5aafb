"""The command line: what each mistake costs and says, and what a launch leaves behind."""

import json
import logging
import math
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sweep import ROOT
from sweep.cli import ABANDONED, AGAIN, AT_WORK, DONE, FAILED, INTERRUPTED, MISSED, USAGE, WRONG, Arguments, main, parse
from sweep.errors import ConfigError, StoreError
from sweep.planning.plan import Cell, Plan, ServerPlan
from sweep.planning.tasks import catalog
from sweep.record import Record, Score, Status
from sweep.results.compare import examine
from sweep.results.reading import Sweep, read_sweep
from sweep.results.store import RunDirectory, Store, read_commits, read_records
from sweep.results.tracking import Outcome
from sweep.running.signals import SIGNALS
from sweep.status import State, standing

LAUNCH = Path(__file__).parent.parent / "launch.py"
KEY = "key-from-the-environment-0123456789"

SMALL = """
models:
  first: {path: ./checkpoint, device: cpu}
  second: {path: ./checkpoint, device: cpu, dtype: float16}
tasks:
  gsm8k: {num_fewshot: 5, limit: 3}
  arc_easy:
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with conf/small.yaml and its checkpoint; no GPU, no hub, no cluster, no secret of ours."""
    for folder in ("conf", "checkpoint"):
        (tmp_path / folder).mkdir()
    (tmp_path / "conf" / "small.yaml").write_text(SMALL)
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("RAY_ADDRESS", "LMSWEEP_ENGINE", "HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    # Charts take seconds; tests/test_reporting.py makes a real page.
    monkeypatch.setattr("sweep.reporting.page", lambda sweep, *_, **__: f"<p>{len(sweep.records)} cells")
    # Asking vLLM itself takes 15 s each time; tests/test_engine.py does.
    monkeypatch.setattr("sweep.serving.engine.examine", lambda servers, **_: tuple(f"seen {s.name}" for s in servers))
    return tmp_path


# Mistakes


@pytest.fixture(scope="module", autouse=True)
def _not_the_first_command() -> None:
    """Only the first command ever reads lm-eval's 14,000 files; the bounds are of the others."""
    catalog()


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str
    cpu_s: float


def launch(*arguments: str) -> Said:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, str(LAUNCH), *arguments], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Said(done.returncode, done.stdout, done.stderr, cpu_s)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["conf=nonsense"], r"conf: no sweep 'nonsense' in .*; known: .*\bsmall\b"),
        (["conf=smal"], r"conf: no sweep 'smal'.*; did you mean 'small'\?"),
        (["conf=conf/gone.yaml"], r"conf: no file '.*/conf/gone.yaml'"),
        (["conf=small", "models.typo.x=1"], r"command line: models\.typo: no such model .*first, second"),
        (["conf=small", "models.frist.chat=true"], r"models\.frist: no such model .*did you mean 'first'\?"),
        (["conf=small", "models.first.x=1"], r"models\.first\.x: unknown key"),
        (["conf=small", "tasks.gsm9k={}"], r"command line: tasks\.gsm9k: unknown task 'gsm9k'; did you mean 'gsm8k'\?"),
        (
            ["plan", "conf=small", "tasks.gsm8k.expect.exact_match={value: 0.7, tolerance: 0.1}"],
            r"command line: tasks\.gsm8k\.expect\.exact_match: .* 'exact_match,none'; did you mean 'exact_match,stric",
        ),
        (
            ["conf=small", "models.first.expect.arc_easy.ac={value: 0.7, tolerance: 0.1}"],
            r"command line: models\.first\.expect\.arc_easy\.ac: there is no number 'ac,none'; did you mean 'acc,none'",
        ),
        (["conf=small", "limt=3"], r"limt: unknown key; did you mean 'limit'\?"),
        (["conf=small", "frsh=true"], r"frsh: unknown key; did you mean 'fresh'\?"),
        (["plan", "conf=small", "clutser=c.yaml"], r"clutser: unknown key; did you mean 'cluster'\?"),
        (["report", "conf=small", "smaples=false"], r"smaples: unknown key; did you mean 'samples'\?"),
        (["export", "conf=small", "ot=x"], r"ot: unknown key; known: to, .*\blimit\b"),
        (["status", "conf=small", "zzz=1"], r"zzz: unknown key; known: .*\blimit\b"),
        (["plan", "conf=small", "only=first/gsm9k"], r"only=first/gsm9k: no such cell.*'first/gsm8k'"),
        (["conf=small", "samples=1"], r"samples= belongs to `plan`"),
        (["plan", "conf=small", "samples=many"], r"samples=many: 1 shows"),
        (["conf=small", "cluster=conf/c.yaml"], r"cluster= belongs to `plan`; a run takes the cluster that it finds"),
        (["plan", "conf=small", "cluster=conf/c.yaml"], r"command line: cluster: no file '.*/conf/c.yaml'"),
        (["conf=small", "fresh=1"], r"fresh=1: true or false"),
        (["check", "conf=small", "fresh=true"], r"fresh= belongs to a run; `check` neither reads results nor writes"),
        (["fetch", "conf=small"], r"fetch has to ask the hub, and HF_HUB_OFFLINE forbids it"),
        (["status", "conf=small", "only=m/t"], r"only= has no meaning for `status`"),
        (["status", "conf=small"], r"nothing was launched into .*runs/small yet"),
        (["status", "conf"], r"nothing was launched into conf yet \(there is no plan\.json\); the run directory of"),
        (["status", "cnf"], r"no folder 'cnf': a run directory, or conf=NAME, is wanted; did you mean 'conf'\?"),
        (["status", "small"], r"no folder 'small': .*; did you mean 'conf=small'\?"),
        (["status", "conf", "conf"], r"`status` takes one run directory"),
        (["status", "conf", "limit=3"], r"limit=3 has no meaning beside a run directory \(conf\)"),
        (["report", "conf=small"], r"nothing was launched into .*runs/small yet \(there is no plan\.json\)"),
        (["export", "conf=small"], r"nothing was launched into .*runs/small yet"),
        (["report", "conf", "gone"], r"no folder 'gone': a run directory, or conf=NAME, is wanted"),
        (["report", "conf", "conf", "conf"], r"`report` takes two run directories"),
        (["export", "conf", "conf"], r"`export` takes one run directory"),
        (["report", "conf", "publish=true"], r"publish has no meaning beside a run directory \(conf\)"),
        (["report", "conf=small", "publish=1"], r"publish=1: true or false"),
        (["report", "conf=small", "samples=1"], r"samples=1: false makes the page without samples"),
        (["report", "conf", "conf", "samples=false"], r"samples= belongs to the page of one sweep"),
        (["report", "conf=small", "to=x"], r"to= of `report` belongs to two run directories"),
        (["report", "conf", "pair=a:b"], r"pair= of `report` belongs to two run directories"),
        (["report", "conf=small", "pair=a:b"], r"pair= of `report` belongs to two run directories"),
        (["report", "conf", "conf", "pair=a:"], r"pair=a:: wants MODEL:MODEL"),
        (["report", "conf", "conf", "pair=a,,b"], r"pair=a,,b: wants MODEL:MODEL"),
        (["export", "conf=small", "pair=a:b"], r"pair= belongs to `report`"),
        (["export", "conf=small", "only=m/t"], r"only= has no meaning for `export`"),
        (["export", "conf=small", "publish=true"], r"publish= belongs to `report`"),
        (["conf=small", "to=x"], r"to: unknown key"),
        (["chek", "conf=small"], r"unknown command 'chek'; did you mean 'check'\?"),
        (["conf=small", "ray.address=ray://head:10001"], r"ray\.address: ray://head:10001 is an address of Ray Client"),
        (["conf=small", "walltime=later"], r"walltime: wants a time as in 3h50m or 3:50:00, or seconds, got 'later'"),
        (
            ["conf=small", "runs_dir=/r/runtime_resources/working_dir_files/_ray_pkg_1/runs"],
            r"runs_dir: /r/.* would be lost with it",
        ),
        (["check", "conf=small", "models.first.device=gpu"], r"not enough GPUs: first needs 1 GPU on one node"),
        (["conf=small", "plan"], r"'plan' is not of the form key=value"),
        (["plan"], r"which sweep\? conf=NAME is missing; there are .*\bsmall\b"),
        (["status"], r"which sweep\? conf=NAME, or a run directory, is missing; there are .*\bsmall\b"),
        (["plam", "conf=small"], r"unknown command 'plam'; did you mean 'plan'\?"),
        (["small"], r"unknown command 'small'; did you mean 'conf=small'\?"),
        (["conf=small", "models.first.server.port=1"], r"command line: models\.first\.server\.port: not set here"),
        (["conf=small", "models.first.device=gpu"], r"not enough GPUs: first needs 1 GPU on one node; there is none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_costs_one_line_exit_code_2_and_less_than_two_seconds(
    place: Path, arguments: list[str], words: str
) -> None:
    said = launch(*arguments)
    assert said.cpu_s < 2
    assert said.code == 2
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    assert re.search(words, line), line
    assert not (place / "runs").exists()


def test_a_machine_without_gpus_says_at_once_which_models_need_how_many(place: Path) -> None:
    said = launch("conf=qwen_sweep")
    assert said.code == 2
    (line,) = said.err.splitlines()
    names = ["3b", "7b-instruct", "7b-instruct-awq", "14b-instruct", "14b-instruct-awq", "32b-instruct-awq"]
    for name in names:
        assert f"qwen2-5-{name} needs 1 GPU on one node" in line
    assert said.cpu_s < 4
    said = launch("conf=qwen_sweep", "models.qwen2-5-3b.tensor_parallel=4", "only=qwen2-5-3b/*")
    assert "not enough GPUs: qwen2-5-3b needs 4 GPUs on one node; there is none here" in said.err


def test_a_python_without_what_we_need_says_how_to_get_it() -> None:
    done = subprocess.run(
        [sys.executable, "-S", str(LAUNCH), "tasks"], env={}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: \S+ lacks lm_eval, msgspec, ray; `make setup` makes .venv, .*\n", done.stderr)


def test_no_argument_is_usage_and_exit_code_2() -> None:
    said = launch()
    assert (said.code, said.err) == (2, "")
    assert "conf=NAME" in said.out
    assert re.search(r"sweeps here +.*\bqwen_sweep\b.*\bsmall\b", said.out)
    assert said.cpu_s < 2


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"], ["plan", "--help"], ["conf=small", "-h"]])
def test_help_is_usage_and_exit_code_0(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert "only=M/T" in capsys.readouterr().out


def test_tasks_are_searched_in_less_than_two_seconds() -> None:
    said = launch("tasks", "gsm8k")
    assert said.code == 0
    assert re.search(r"^gsm8k +task", said.out, flags=re.MULTILINE)
    assert said.cpu_s < 3  # a scan of 14,000 files


def test_a_search_for_tasks_that_finds_none_fails_like_grep(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "nosuchword"]) == FAILED
    assert "matches 'nosuchword'" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["tasks", "plan conf=small"])
def test_a_reader_that_has_seen_enough_gets_no_traceback(command: str) -> None:
    piped = f"{shlex.quote(sys.executable)} {shlex.quote(str(LAUNCH))} {command} | :"
    assert subprocess.run(piped, shell=True, capture_output=True, check=True).stderr == b""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("conf=a limit=3", Arguments(command="run", words=(), conf="a", overrides=("limit=3",))),
        ("run conf=a only=m/t fresh=true", Arguments(command="run", words=(), conf="a", only="m/t", fresh=True)),
        ("plan conf=a samples=1", Arguments(command="plan", words=(), conf="a", samples=True)),
        ("plan samples=0 x=a=b conf=a", Arguments(command="plan", words=(), conf="a", overrides=("x=a=b",))),
        ("plan conf=a cluster=c.yaml", Arguments(command="plan", words=(), conf="a", cluster="c.yaml")),
        ("check conf=a only=m/*", Arguments(command="check", words=(), conf="a", only="m/*")),
        ("fetch conf=a x=1", Arguments(command="fetch", words=(), conf="a", overrides=("x=1",))),
        (
            "report conf=a publish=true x=1",
            Arguments(command="report", words=(), conf="a", overrides=("x=1",), publish=True),
        ),
        ("report conf=a samples=false", Arguments(command="report", words=(), conf="a", without_samples=True)),
        ("report runs conf to=c.md", Arguments(command="report", words=("runs", "conf"), to="c.md")),
        ("export conf=a to=out", Arguments(command="export", words=(), conf="a", to="out")),
        ("tasks gsm math", Arguments(command="tasks", words=("gsm", "math"))),
    ],
)
def test_arguments_are_read_in_any_order_behind_the_command(place: Path, arguments: str, expected: Arguments) -> None:
    (place / "runs").mkdir()
    assert parse(arguments.split()) == expected


def test_an_interrupt_before_anything_runs_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sweep.cli._run", interrupt)
    assert main(["conf=small"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


# What a launch leaves behind; what carries it out is a double


class Runner:
    """Stands for sweep.running.launching: ends the cells as the test says and remembers what it was given."""

    def __init__(self) -> None:
        self.fails: set[str] = set()
        self.leaves: set[str] = set()
        """Cells that it never comes to."""
        self.signal = 0
        self.out_of_time = False
        self.got_on = True
        self.wandb = Outcome(mode="disabled", why="the test says so")
        self.ends_at_s: list[float] = []
        self.texts: list[Callable[[Any], Any]] = []
        self.ran: list[list[str]] = []
        self.keys: list[str] = []

    def carry_out(
        self,
        config: Any,
        plan: Plan,
        store: Store,
        *,
        api_key: str,
        secrets: Sequence[str],
        ends_at_s: float,
        texts: Callable[[Any], Any],
    ) -> SimpleNamespace:
        self.ends_at_s.append(ends_at_s)
        self.texts.append(texts)
        self.ran.append([cell.key for cell in plan.owed])
        self.keys.append(api_key)
        logging.getLogger("sweep.running.runner").info("the key is %s", api_key)
        records = {cell.key: self.record(cell) for cell in plan.owed if cell.key not in self.leaves}
        for record in records.values():
            store.write_record(record, {})
        return SimpleNamespace(
            records={**plan.done, **records},
            signal=self.signal,
            wandb=self.wandb,
            out_of_time=self.out_of_time,
            got_on=self.got_on,
        )

    def record(self, cell: Cell) -> Record:
        known = Record(model=cell.model.name, task=cell.task_name, fingerprint=cell.fingerprint, status=Status.DONE)
        if cell.key in self.fails:
            return replace(known, status=Status.FAILED, error="its server did not start: out of memory")
        score = Score(
            task=cell.task_name,
            version="1",
            filter="none",
            num_fewshot=0,
            metric="acc",
            value=0.5,
            stderr=None,
            higher_is_better=True,
            samples=3,
        )
        return replace(known, scores=(score,))


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    double = Runner()
    monkeypatch.setitem(sys.modules, "sweep.running.launching", double)  # type: ignore[arg-type]
    monkeypatch.setattr("sweep.running.machine.prepare_local_ray", lambda: None)
    return double


@pytest.fixture
def directory(place: Path) -> RunDirectory:
    return RunDirectory(place / "runs" / "small")


Output = Callable[[], str]


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> Output:
    return lambda: "".join(capsys.readouterr())


def test_a_finished_sweep_leaves_config_plan_records_and_tables(
    runner: Runner, directory: RunDirectory, output: Output
) -> None:
    assert main(["conf=small"]) == 0
    assert runner.ran == [["first/gsm8k", "first/arc_easy", "second/gsm8k", "second/arc_easy"]]
    shown = output()
    assert "|gsm8k" in shown
    assert "W&B      disabled (the test says so)" in shown
    assert "limit: 3" in directory.config.read_text()
    assert directory.report.exists()
    assert directory.csv.exists()
    plan = json.loads(directory.plan.read_text())
    assert list(plan["models"]) == ["first", "second"]
    assert "--dtype float16" in " ".join(plan["servers"]["second"]["command"])
    records = read_records(directory)
    assert {key: cell["fingerprint"] for key, cell in plan["cells"].items()} == {
        f"{model}/{task}": record.fingerprint for (model, task), record in records.items()
    }
    assert not any(cell["done"] for cell in plan["cells"].values())
    assert read_commits(directory) == {}


def test_the_same_command_again_runs_nothing_and_shows_the_tables(runner: Runner, output: Output) -> None:
    main(["conf=small"])
    output()
    assert main(["conf=small"]) == 0
    assert len(runner.ran) == 1
    shown = output()
    assert "all 4 cells are done" in shown
    assert "|gsm8k" in shown


def test_a_finished_sweep_run_again_takes_less_than_three_seconds_and_no_ray(runner: Runner) -> None:
    main(["conf=small"])
    code = (
        "import sys; from sweep.cli import main; print(main(['conf=small']), {'ray', 'lm_eval'} & sys.modules.keys())"
    )
    took = []
    while len(took) < 3 and min(took, default=3.0) >= 3:  # other tests run beside this one
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        took.append(time.monotonic() - start)
    assert min(took) < 3
    assert "all 4 cells are done" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 set()"


def test_a_sweep_ends_with_where_its_page_is_and_what_it_says(
    runner: Runner, directory: RunDirectory, output: Output
) -> None:
    main(["conf=small"])
    lines = output().splitlines()
    start = lines.index(f"page     {directory.page}")
    assert [line.split()[0] for line in lines[start + 1 : start + 6]] == ["leads", "noise", "failed", "bends", "cost"]
    assert directory.page.read_text() == "<p>4 cells"
    assert "- failed: nothing" in directory.report.read_text()
    assert "|gsm8k" in directory.report.read_text()


def test_what_was_shown_already_is_not_made_again(runner: Runner, directory: RunDirectory, output: Output) -> None:
    made = (directory.page, directory.report, directory.csv)
    main(["conf=small"])
    for path in made:
        path.write_text("as it was")
    output()
    assert main(["conf=small"]) == 0
    assert re.search(r"page +\S*runs/small/report\.html", output())
    assert {path.read_text() for path in made} == {"as it was"}
    directory.csv.unlink()
    main(["conf=small"])
    assert directory.csv.exists()
    assert directory.page.read_text() == "<p>4 cells"
    directory.page.write_text("of a launch before the last")
    os.utime(directory.page, (1.0, 1.0))
    main(["conf=small"])
    assert directory.page.read_text() == "<p>4 cells"


def test_a_page_that_cannot_be_made_costs_a_line(
    runner: Runner, directory: RunDirectory, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> str:
        raise ZeroDivisionError("a chart without a number")

    monkeypatch.setattr("sweep.reporting.page", broken)
    assert main(["conf=small"]) == 0
    shown = output()
    assert "page     none: make the page: ZeroDivisionError: a chart without a number (more in" in shown
    assert "Traceback" not in shown
    assert "4 of 4 cells are done" in shown
    assert re.search(r"Traceback(.|\n)*in broken", directory.driver_log.read_text())
    assert "|gsm8k" in directory.report.read_text()
    assert not directory.page.exists()


def test_whoever_stops_a_sweep_waits_for_no_page(runner: Runner, directory: RunDirectory, output: Output) -> None:
    runner.signal = 2
    main(["conf=small"])
    assert f"page     none; of what is there makes one: python launch.py report {directory.root}\n" in output()
    assert not directory.page.exists()
    assert directory.report.exists()


def test_report_makes_everything_anew_beside_a_driver_and_without_the_database(
    runner: Runner, directory: RunDirectory, output: Output
) -> None:
    made = (directory.page, directory.report, directory.csv)
    runner.fails = {"first/gsm8k"}
    main(["conf=small"])
    for path in made:
        path.unlink()
    output()
    store = Store(directory)
    try:
        assert main(["report", "conf=small"]) == 0
    finally:
        store.close()
    assert re.search(r"page +\S*runs/small/report\.html", output())
    assert all(path.exists() for path in made)
    directory.responses.unlink()
    for path in made:
        path.unlink()
    assert main(["report", str(directory.root)]) == 0
    assert all(path.exists() for path in made)
    assert re.search(r"failed +1 of 4 cells; 1 for: its server did not start", output())


def test_two_sweeps_are_compared_and_nothing_is_written_unless_it_is_asked_for(
    runner: Runner, directory: RunDirectory, place: Path, output: Output
) -> None:
    main(["conf=small"])
    (place / "conf" / "half.yaml").write_text(SMALL.replace("  second:", "  # second:"))
    main(["conf=half", "name=other"])
    other = place / "runs" / "other"
    before = {path: path.read_bytes() for path in (place / "runs").rglob("*") if path.is_file()}
    output()
    assert main(["report", str(directory.root), str(other)]) == 0
    shown = output()
    assert f"- a: {directory.root}, 4 cells" in shown
    assert f"- 2 cells done in {directory.root} only: second/arc_easy, second/gsm8k" in shown
    assert {path: path.read_bytes() for path in (place / "runs").rglob("*") if path.is_file()} == before
    assert main(["report", str(directory.root), str(other), "to=compared.md"]) == 0
    assert (place / "compared.md").read_text().strip() == output().strip()
    assert main(["report", str(directory.root), str(other), "pair=second:first"]) == 0
    assert "- compared: second of a with first of b" in output()
    assert main(["report", str(directory.root), str(other), "pair=second"]) == 2
    assert f"pair=second:second: {other} has no model 'second'; it has first" in output()


def test_pairs_are_models_with_a_colon_between_or_one_name_for_both() -> None:
    asked = parse(["report", str(ROOT / "conf"), str(ROOT / "tests"), "pair=base:base-awq, small ,a:b"])
    assert asked.pairs == (("base", "base-awq"), ("small", "small"), ("a", "b"))


@pytest.mark.parametrize(("mode", "errors", "code"), [("online", (), 0), ("offline", (), 1), ("online", ("lost",), 1)])
def test_report_publishes_when_it_is_asked_to_and_says_what_came_of_it(
    runner: Runner,
    output: Output,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    errors: tuple[str, ...],
    code: int,
) -> None:
    given: list[Any] = []

    def publish(sweep: Any, config: Any, *, secrets: Sequence[str], texts: dict[str, str]) -> Any:
        given.append((sweep.name, config.name, list(texts)))
        return Outcome(mode=mode, why="", overview_url="https://w/b", errors=errors)

    monkeypatch.setitem(sys.modules, "sweep.results.publish", SimpleNamespace(publish=publish))  # type: ignore[arg-type]
    main(["conf=small"])
    output()
    assert main(["report", "conf=small"]) == 0
    assert not given
    assert main(["report", "conf=small", "publish=true"]) == code
    assert given == [("small", "small", ["Paired comparisons"])]
    shown = output()
    assert "https://w/b" in shown
    assert ("the same command tries again" in shown) == (code == 1)


@pytest.mark.parametrize(
    ("mode", "errors", "said"),
    [("online", (), False), ("online", ("lost",), True), ("offline", (), True), ("disabled", (), False)],
)
def test_what_w_and_b_did_not_get_has_one_command_that_sends_it(
    runner: Runner, output: Output, mode: str, errors: tuple[str, ...], said: bool
) -> None:
    runner.wandb = Outcome(mode=mode, why="", errors=errors, offline=(Path("offline-run-1"),))
    main(["conf=small", "wandb.group=my night"])
    shown = output()
    command = "python launch.py report conf=small 'wandb.group=my night' publish=true"
    assert (f"publish it later with: {command}" in shown) == said
    assert ("publish" in shown) == said


def test_the_tables_are_there_before_the_chapters_of_the_report_take_their_time(
    runner: Runner, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["conf=small"])
    for path in (directory.report, directory.csv):
        path.unlink()
    there: list[bool] = []

    def examined(sweep: Sweep) -> Any:
        there.append(directory.report.exists() and directory.csv.exists())
        raise StoreError("killed")

    monkeypatch.setattr("sweep.reporting.examined", examined)
    with pytest.raises(StoreError, match="killed"):
        runner.texts[0](replace(read_sweep(directory.root), models=("second", "first")))  # not compared before
    assert there == [True]


@pytest.mark.parametrize(("changed", "times"), [(False, 1), (True, 2)], ids=["the same records", "another record"])
def test_what_was_compared_for_w_and_bs_report_is_not_compared_again_for_the_page(
    runner: Runner, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, changed: bool, times: int
) -> None:
    compared: list[Sweep] = []
    carry_out = runner.carry_out

    def counted(sweep: Sweep) -> Any:
        compared.append(sweep)
        return examine(sweep)

    def with_a_report(*arguments: Any, texts: Callable[[Any], Any], **named: Any) -> SimpleNamespace:
        carried = carry_out(*arguments, texts=texts, **named)
        sweep = read_sweep(directory.root)
        first = replace(sweep.records[0], wall_s=1.0) if changed else sweep.records[0]
        told.append(texts(replace(sweep, records=(*sweep.records[1:], first)))["Paired comparisons"])
        return carried

    told: list[str] = []
    monkeypatch.setattr("sweep.reporting.examine", counted)
    monkeypatch.setattr(runner, "carry_out", with_a_report)
    assert main(["conf=small"]) == 0
    assert len(compared) == times
    assert directory.report.read_text().endswith(told[0])


def test_export_writes_parquet_where_it_is_told_to(
    runner: Runner, directory: RunDirectory, place: Path, output: Output
) -> None:
    main(["conf=small"])
    output()
    assert main(["export", "conf=small"]) == 0
    assert sorted(path.name for path in (directory.root / "export").iterdir()) == [
        "responses.parquet",
        "samples.parquet",
        "scores.parquet",
    ]
    assert re.search(r"4 rows  \S*runs/small/export/scores\.parquet", output())
    store = Store(directory)
    try:
        assert main(["export", str(directory.root), "to=elsewhere"]) == 2
    finally:
        store.close()
    assert "the responses are not exported: " in output()
    assert (place / "elsewhere" / "scores.parquet").exists()


def test_a_directory_of_another_sweep_is_refused_and_untouched(
    runner: Runner, directory: RunDirectory, output: Output, place: Path
) -> None:
    main(["conf=small"])
    before = {path: path.read_bytes() for path in directory.root.rglob("*") if path.is_file()}
    other = SMALL.replace("first:", "third:").replace("second:", "fourth:")
    (place / "conf" / "other.yaml").write_text(other)
    output()
    assert main(["conf=other", "name=small"]) == 2
    assert re.search(r"runs/small holds another sweep, of 4 cells such as first/arc_easy, and none of", output())
    assert {path: path.read_bytes() for path in directory.root.rglob("*") if path.is_file()} == before
    assert main(["conf=other", "name=small", "fresh=true"]) == 0
    # One that has a cell in common has been edited.
    (place / "conf" / "other.yaml").write_text(other.replace("fourth:", "second:"))
    assert main(["conf=other", "name=small", "fresh=true"]) == 0


def test_status_tells_how_a_sweep_stands_in_half_a_second_of_work(
    runner: Runner, directory: RunDirectory, output: Output
) -> None:
    runner.fails, runner.leaves, runner.signal = {"second/gsm8k"}, {"first/arc_easy"}, 2
    main(["conf=small"])
    output()
    assert main(["status", "conf=small"]) == 4
    shown = output()
    assert "2 of 4 cells done" in shown
    assert re.search(r"second/gsm8k +its server did not start: out of memory", shown)
    store = Store(directory)  # a driver is at work
    assert main(["status", "conf=small"]) == 3
    store.close()
    runner.leaves, runner.signal = set(), 0
    main(["conf=small"])
    assert main(["status", "conf=small"]) == 1
    runner.fails = set()
    main(["conf=small"])
    directory.responses.unlink()  # it is never looked into
    said = launch("status", "conf=small")
    assert said.code == 0
    assert "4 of 4 cells done" in said.out
    assert said.err == ""
    assert said.cpu_s < 0.5


@pytest.mark.parametrize("command", ["status", "report", "export"])
def test_overrides_that_change_nothing_of_what_is_kept_are_said(command: str, runner: Runner, output: Output) -> None:
    main(["conf=small"])
    main(["conf=small", "name=other"])
    output()
    assert main([command, "conf=small", "retries=5", "limit=2"]) == 0
    shown = output()
    assert re.search(r"note: retries, limit: without effect here, .* launched into \S*runs/small", shown)
    for of_use in (["conf=small"], ["conf=small", "name=other"], ["conf=small", "name=other", "limit=2"]):
        assert main([command, *of_use]) == 0
        assert "without effect" not in output()


def test_status_of_a_run_directory_needs_no_sweep_file(runner: Runner, directory: RunDirectory, output: Output) -> None:
    runner.fails = {"second/gsm8k"}
    main(["conf=small"])
    output()
    assert main(["status", "conf=small"]) == 1
    by_name = output()
    copied = directory.root.rename(directory.root.parent / "copied")
    Path("conf/small.yaml").unlink()
    assert main(["status", str(copied)]) == 1
    assert output() == by_name.replace("runs/small", "runs/copied")
    for near in ("runs", "runs/copied/logs"):
        assert main(["status", near]) == 2
        assert re.search(rf"nothing was launched into {near} yet .*; did you mean 'runs/copied'\?", output())


def test_after_only_one_cell_ran_status_and_plan_are_still_of_all(
    runner: Runner, directory: RunDirectory, output: Output
) -> None:
    main(["conf=small"])
    main(["conf=small", "only=first/arc_easy"])
    output()
    assert main(["status", "conf=small"]) == 0
    assert "4 of 4 cells done" in output()
    assert list(json.loads(directory.plan.read_text())["servers"]) == ["first", "second"]


def test_only_what_is_owed_runs_and_the_plan_says_so(runner: Runner, directory: RunDirectory, output: Output) -> None:
    runner.fails = {"second/gsm8k"}
    assert main(["conf=small"]) == 1
    assert re.search(r"second/gsm8k.*out of memory", output())
    runner.fails = set()
    assert main(["conf=small"]) == 0
    assert runner.ran[1:] == [["second/gsm8k"]]
    plan = json.loads(directory.plan.read_text())
    assert [key for key, cell in plan["cells"].items() if not cell["done"]] == ["second/gsm8k"]
    assert list(plan["servers"]) == ["first", "second"], "of all numbers, not of the last launch alone"


def finished_meanwhile(runner: Runner, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another driver finishes first/arc_easy while this one's options are put to vLLM."""

    def examine(plan: Plan, **_: object) -> None:
        store = Store(directory)
        (cell,) = (cell for cell in plan.cells if cell.key == "first/arc_easy")
        store.write_record(replace(runner.record(cell), request_s=9.0), {})
        store.close()

    monkeypatch.setattr("sweep.cli._examine", examine)


def test_what_another_driver_finished_after_the_plan_was_made_is_not_done_again(
    runner: Runner, directory: RunDirectory, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.leaves = {"first/arc_easy", "second/gsm8k"}
    main(["conf=small"])
    runner.leaves = set()
    finished_meanwhile(runner, directory, monkeypatch)
    assert main(["conf=small"]) == 0
    assert runner.ran[1:] == [["second/gsm8k"]]
    assert read_records(directory)["first", "arc_easy"].request_s == 9.0
    shown = output()
    assert "another driver has finished 1 cell meanwhile" in shown
    assert "4 of 4 cells are done" in shown
    assert json.loads(directory.plan.read_text())["cells"]["first/arc_easy"]["done"]


def test_a_launch_whose_every_cell_another_driver_has_finished_runs_nothing(
    runner: Runner, directory: RunDirectory, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.leaves = {"first/arc_easy"}
    main(["conf=small"])
    finished_meanwhile(runner, directory, monkeypatch)
    assert main(["conf=small"]) == 0
    assert len(runner.ran) == 1
    assert main(["conf=small", "only=first/arc_easy"]) == 0  # what is asked for by name runs all the same
    assert runner.ran[1:] == [["first/arc_easy"]]


def test_the_id_of_a_sweeps_runs_outlasts_its_launches_until_it_is_started_over(
    runner: Runner, directory: RunDirectory, output: Output
) -> None:
    main(["plan", "conf=small"])
    main(["status", "conf=small"])
    assert not directory.root.exists()
    main(["conf=small"])
    made = directory.sweep_id.read_text()
    main(["conf=small", "only=*"])
    assert directory.sweep_id.read_text() == made
    main(["conf=small", "fresh=true"])
    assert directory.sweep_id.read_text() != made


def test_a_model_that_is_not_there_fails_alone(runner: Runner, output: Output, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    assert main(["conf=small", f"models.second.path={gone}"]) == 1
    assert all(key.startswith("first/") for key in runner.ran[0])
    shown = output()
    assert f"command line: models.second.path: no file or folder '{gone}'" in shown
    assert main(["conf=small", f"models.second.path={gone}"]) == 1  # nothing is left to run, which needs no cluster
    assert len(runner.ran) == 1


def test_a_refused_cell_is_failed_to_status_while_the_others_run(
    runner: Runner, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    for module in ("sweep.planning.plan", "sweep.results.claim"):
        monkeypatch.setattr(f"{module}.datetime", clock)
    seen: list[Mapping[str, State]] = []
    carry_out = runner.carry_out

    def watched(config: Any, plan: Plan, *rest: Any, **named: Any) -> SimpleNamespace:
        seen.append(standing(directory, now=time.time()).states)
        return carry_out(config, plan, *rest, **named)

    monkeypatch.setattr(runner, "carry_out", watched)
    main(["conf=small", "models.second.path=/gone"])
    assert seen == [
        {
            "first/gsm8k": State.OWED,
            "first/arc_easy": State.OWED,
            "second/gsm8k": State.FAILED,
            "second/arc_easy": State.FAILED,
        }
    ]


class Clock:
    """In place of `datetime`; between two looks at it a minute passes."""

    def __init__(self) -> None:
        self.at = datetime(2026, 11, 26, 10, tzinfo=UTC)

    def now(self, _zone: object) -> datetime:
        self.at += timedelta(minutes=1)
        return self.at


def test_a_failed_rerun_is_said_and_leaves_the_numbers(runner: Runner, directory: RunDirectory, output: Output) -> None:
    main(["conf=small"])
    before = read_records(directory)
    runner.fails = {"first/arc_easy"}
    assert main(["conf=small", "only=first/arc_easy"]) == 1
    assert "out of memory" in output()
    assert read_records(directory) == before


def test_only_runs_a_done_cell_again_and_the_tables_stay_whole(runner: Runner, output: Output) -> None:
    runner.fails = {"second/gsm8k"}
    main(["conf=small"])
    output()
    assert main(["conf=small", "only=first/arc_easy"]) == 0  # what failed before is not its business
    assert runner.ran[1:] == [["first/arc_easy"]]
    shown = output()
    assert "|gsm8k" in shown
    assert "|arc_easy" in shown


def test_results_of_other_settings_are_never_shown_as_these(
    runner: Runner, directory: RunDirectory, output: Output
) -> None:
    main(["conf=small"])
    output()
    runner.leaves, runner.signal = {"first/gsm8k", "second/gsm8k"}, 2
    main(["plan", "conf=small", "tasks.gsm8k.limit=200"])
    assert "\n2 cells have numbers of other settings, which these will replace; answers stay" in output()
    assert main(["conf=small", "tasks.gsm8k.limit=200"]) == 130
    shown = output()
    assert "2 cells have numbers of other settings, which these will replace; answers stay" in shown
    assert "2 cells are left out of the tables" in shown
    assert "|gsm8k" not in shown
    assert "gsm8k" not in directory.csv.read_text()
    assert "|arc_easy" in shown
    assert "stopped by SIGINT" in shown


@pytest.mark.parametrize(
    ("ends", "code", "words"),
    [
        ({}, 0, "4 of 4 cells are done"),
        ({"fails": {"first/gsm8k"}}, 1, "1 of 4 cells|out of memory"),
        ({"out_of_time": True}, 75, "the same command goes on where it stopped: python launch.py conf=small\n"),
        # It goes on with the others, and what has failed is tried again anyway.
        ({"out_of_time": True, "fails": {"first/gsm8k"}}, 75, "the walltime is over"),
        # Else a job that is sent back to the queue for code 75 would come back for ever.
        ({"out_of_time": True, "got_on": False}, 1, "the walltime is too short: it was over before anything was"),
        ({"signal": 2}, 130, "stopped by SIGINT; the same command goes on"),
        ({"signal": 15}, 143, "stopped by SIGTERM; the same command goes on"),
        ({"signal": 1}, 129, "stopped by SIGHUP; the same command goes on"),
        ({"signal": 15, "fails": {"first/gsm8k"}}, 143, "stopped by SIGTERM"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_the_exit_code_says_how_a_launch_ended_and_whether_it_is_worth_another(
    runner: Runner, output: Output, ends: dict[str, Any], code: int, words: str
) -> None:
    vars(runner).update(ends)
    assert main(["conf=small"]) == code
    assert re.search(words, output())


def test_a_password_on_the_command_line_is_not_said_again(runner: Runner, output: Output) -> None:
    runner.signal = 2
    assert main(["conf=small", "env.HTTPS_PROXY=http://me:pa55word-of-mine@host:1"]) == 130
    shown = output()
    assert "goes on where it stopped: python launch.py conf=small env.HTTPS_PROXY=" in shown.replace("'", "")
    assert "pa55word" not in shown


def test_a_launch_that_is_stopped_before_anything_is_done_shows_no_table_and_says_how_to_go_on(
    runner: Runner, directory: RunDirectory, output: Output
) -> None:
    runner.leaves, runner.signal = {f"{m}/{t}" for m in ("first", "second") for t in ("gsm8k", "arc_easy")}, 2
    assert main(["conf=small", "limit=3", "only=first/*", "fresh=true"]) == 130
    shown = output()
    assert "|" not in shown
    assert f"page     none; of what is there makes one: python launch.py report {directory.root}\n" in shown
    assert "without fresh=true goes on where it stopped: python launch.py conf=small limit=3 'only=first/*'" in shown


def test_a_number_that_is_not_as_expected_is_exit_code_3_and_a_line(runner: Runner, output: Output) -> None:
    """Checked again by every launch, as expectations change no cell; a failed cell says more than a missed number."""
    met = "tasks.arc_easy.expect.acc={value: 0.52, tolerance: 0.02}"
    assert main(["conf=small", met]) == DONE
    assert re.search(r"expected (\d) of \1 numbers are as the sweep file expects them", output())
    ran = len(runner.ran)
    missed = "models.first.expect.arc_easy.acc={value: 0.6, tolerance: 0.02}"
    assert main(["conf=small", met, missed]) == MISSED
    assert "first/arc_easy: acc is 0.5000, not expected: 0.6 ± 0.02 (-0.1000)" in output()
    absent = "models.first.expect.arc_easy.acc_norm={value: 0.5, tolerance: 0.02}"
    assert main(["conf=small", absent]) == MISSED
    assert "acc_norm cannot be checked against 0.5 ± 0.02: there is no such number, only acc,none" in output()
    assert len(runner.ran) == ran
    runner.fails = {"first/arc_easy"}
    assert main(["conf=small", missed, "only=first/arc_easy"]) == FAILED


def test_help_and_readme_name_the_exit_codes_that_there_are() -> None:
    of_commands = (DONE, FAILED, WRONG, MISSED, AT_WORK, ABANDONED, AGAIN, INTERRUPTED)
    codes = {str(code) for code in (*of_commands, *(128 + number for number in SIGNALS))}
    said = USAGE.partition("exit codes")[2].partition("sweeps here")[0]
    assert set(re.findall(r"\b\d+\b", said)) == codes
    table = (ROOT / "README.md").read_text().partition("| exit code |")[2].partition("\n\n")[0]
    rows = [row.split("|")[1] for row in table.splitlines()[2:]]
    assert {code for row in rows for code in re.findall(r"\d+", row)} == codes


def test_a_launch_ends_with_its_walltime_or_the_slurm_job_around_it(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    main(["conf=small"])
    begun = time.time()
    main(["conf=small", "only=*", "walltime=2h"])
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(begun) + 3600))
    main(["conf=small", "only=*", "walltime=2h"])
    free, own, slurm = runner.ends_at_s
    assert free == math.inf
    assert begun + 7200 <= own < begun + 7260
    assert slurm == int(begun) + 3600


def test_the_sweeps_env_holds_where_the_hub_is_asked_for_the_plan(
    runner: Runner, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def resolve(*_: object, ask_hub: bool, earlier: str | None) -> str:
        asked.append(os.environ.get("HF_ENDPOINT"))
        return "c0ffee"

    monkeypatch.setattr("sweep.planning.plan.resolve_revision", resolve)
    for name in ("HF_ENDPOINT", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "before")
    arguments = ["conf=small", "env.HF_ENDPOINT=http://mirror", "env.VLLM_LOGGING_LEVEL=DEBUG"]
    main(["plan", *arguments, "models.first.path=org/m"])
    assert asked == ["http://mirror"]
    assert os.environ["VLLM_LOGGING_LEVEL"] == "before"  # servers get it from the model's env
    assert "VLLM_LOGGING_LEVEL=DEBUG" in output()


def test_fresh_sets_the_old_directory_aside(runner: Runner, directory: RunDirectory, output: Output) -> None:
    main(["conf=small"])
    assert main(["conf=small", "fresh=true"]) == 0
    assert len(runner.ran[1]) == 4
    (aside,) = (path for path in directory.root.parent.iterdir() if path != directory.root)
    assert f"the old run directory is now {aside}" in output()
    assert len(read_records(RunDirectory(aside))) == 4


@pytest.mark.parametrize("fresh", ["false", "true"])
def test_a_directory_in_use_is_exit_code_2_and_untouched(
    runner: Runner, directory: RunDirectory, output: Output, fresh: str
) -> None:
    store = Store(directory)
    before = sorted(path.name for path in directory.root.iterdir())
    assert main(["conf=small", f"fresh={fresh}"]) == 2
    assert f"in use by process {os.getpid()}" in output()
    assert sorted(path.name for path in directory.root.iterdir()) == before
    assert runner.ran == []
    store.close()


@pytest.mark.parametrize("fresh", ["false", "true"])
def test_a_server_option_that_is_not_set_there_stops_the_launch_before_it_begins(
    runner: Runner, directory: RunDirectory, output: Output, fresh: str
) -> None:
    main(["conf=small"])
    before = directory.plan.read_bytes()
    assert main(["conf=small", "models.second.server.served_model_name=x", "limit=9", f"fresh={fresh}"]) == 2
    assert "models.second.server.served_model_name: not set here" in output()
    assert directory.plan.read_bytes() == before
    assert len(runner.ran) == 1


@pytest.mark.parametrize("command", ["run", "plan", "check"])
def test_options_are_put_to_vllm_before_anything_starts(
    command: str, runner: Runner, directory: RunDirectory, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(servers: Iterable[ServerPlan], *, required: bool, **_: object) -> tuple[str, ...]:
        assert [server.name for server in servers] == ["first", "second"]
        assert required == (command != "plan")
        raise ConfigError("models.first.server.max_num_sqs: vLLM has no such option")

    monkeypatch.setattr("sweep.serving.engine.examine", refuse)
    assert main([command, "conf=small"]) == 2
    assert "models.first.server.max_num_sqs: vLLM has no such option" in output()
    assert runner.ran == []
    assert not directory.root.exists()


def test_every_launch_has_a_key_of_its_own_and_no_file_shows_it(runner: Runner, directory: RunDirectory) -> None:
    main(["conf=small"])
    main(["conf=small", "only=*"])
    assert len(set(runner.keys)) == 2
    assert min(map(len, runner.keys)) > 30
    assert "the key is ***" in directory.driver_log.read_text()


def test_a_secret_of_the_environment_is_in_no_file(
    runner: Runner, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, output: Output
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    arguments = [
        "api_key=${oc.env:OPENAI_API_KEY}",
        "models.first.server.log_config_file=${oc.env:OPENAI_API_KEY}",
    ]
    assert main(["conf=small", *arguments]) == 0
    assert runner.keys == [KEY]
    files = [path for path in directory.root.rglob("*") if path.is_file()]
    assert {"config.yaml", "plan.json", "driver.log"} <= {path.name for path in files}
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    assert KEY not in output()


def test_a_broken_record_is_exit_code_2(runner: Runner, directory: RunDirectory, output: Output) -> None:
    directory.records.mkdir(parents=True)
    (directory.records / "first.gsm8k.json").write_text("{")
    assert main(["conf=small"]) == 2
    assert main(["plan", "conf=small"]) == 2
    assert str(directory.records / "first.gsm8k.json") in output()


# The plan


def test_a_plan_shows_what_the_last_launch_left_owed_and_starts_nothing(
    runner: Runner, directory: RunDirectory, output: Output
) -> None:
    runner.fails = {"second/arc_easy"}
    main(["conf=small"])
    output()
    before = {path: path.stat().st_mtime_ns for path in directory.root.rglob("*")}
    assert main(["plan", "conf=small"]) == 0
    shown = output()
    assert "2 models × 2 tasks, 4 cells" in shown
    assert "3 cells done, 1 owed" in shown
    assert re.search(r"^  first +x gsm8k  x arc_easy$", shown, flags=re.MULTILINE)
    assert re.search(r"^  second +x gsm8k  o arc_easy$", shown, flags=re.MULTILINE)
    assert "first: CPU, concurrency auto, nothing owed: not started" in shown
    assert "--served-model-name second" in shown
    assert {path: path.stat().st_mtime_ns for path in directory.root.rglob("*")} == before
    assert main(["plan", "conf=small", "fresh=true"]) == 0
    assert "0 cells done, 4 owed" in output()


def test_a_plan_knows_the_commits_of_the_last_launch(
    runner: Runner, directory: RunDirectory, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["conf=small", "models.first.path=org/m", "only=first/*"]
    monkeypatch.setattr(
        "sweep.planning.plan.resolve_revision", lambda *_, ask_hub, earlier: "c0ffee" if ask_hub else earlier
    )
    main(arguments)
    assert read_commits(directory) == {"org/m@main": "c0ffee"}
    output()
    assert main(["plan", *arguments[:2]]) == 0
    shown = output()
    assert "2 cells done, 2 owed" in shown
    assert "--revision c0ffee" in shown


def test_the_command_line_itself_is_quick_to_import() -> None:
    code = "import sys, sweep.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "vllm", "ray", "lm_eval", "transformers", "datasets", "wandb", "omegaconf", "aiohttp", "yaml"}
    assert heavy.isdisjoint(loaded)
