"""Arguments -> one of the commands run, plan, tasks. Prints, and decides the exit code.

Nothing heavy is imported before it is known to be needed: help and mistakes answer at once.
"""

import logging
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sweep.errors import ConfigError, ResourceError, StoreError, SweepError, nearest

if TYPE_CHECKING:
    from sweep.config import SweepConfig
    from sweep.plan import Plan
    from sweep.record import Record
    from sweep.store import RunDirectory
    from sweep.tracking import Outcome

USAGE = """\
lmsweep: many language models, many lm-eval tasks, one command

  python launch.py conf=NAME [key=value ...]        run a sweep, or go on with it where it stopped
  python launch.py plan conf=NAME [key=value ...]   what it would do: cells, GPUs, server commands; starts nothing
  python launch.py tasks [WORD ...]                 search lm-eval's tasks, groups and tags

conf=NAME       conf/NAME.yaml, or a path to a YAML file
key=value       overrides any key of it: limit=10, models.qwen.chat=true, tasks.gsm8k.num_fewshot=0
only=M/T        run the cells of model M and task T again (shell wildcards), from stored answers where there are any
fresh=true      set the old run directory aside and begin anew
samples=1       with plan: show one rendered prompt of each cell

exit code       0 all cells done, 1 some failed, 2 wrong input or missing GPUs, 130/143 stopped by Ctrl-C/SIGTERM
sweeps here     {sweeps}
"""

COMMANDS = ("run", "plan", "tasks")

DONE, FAILED, WRONG = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Arguments:
    command: str
    words: tuple[str, ...]
    """Of `tasks`."""
    conf: str | None = None
    overrides: tuple[str, ...] = ()
    """Dot-list entries for the config."""
    only: str | None = None
    fresh: bool = False
    samples: int = 0


def parse(arguments: Sequence[str]) -> Arguments:
    """The command line as data. Raises ConfigError."""
    command, rest = "run", list(arguments)
    if rest and "=" not in rest[0]:
        command = rest.pop(0)
        if command not in COMMANDS:
            raise ConfigError(f"unknown command {command!r}{nearest(command, COMMANDS)} (--help shows all)")
    if command == "tasks":
        return Arguments(command=command, words=tuple(rest))
    options: dict[str, str] = {}
    overrides = []
    for argument in rest:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument!r} is not of the form key=value (--help shows what there is)")
        if key in ("conf", "only", "fresh", "samples"):
            options[key] = value
        else:
            overrides.append(argument)
    if "conf" not in options:
        raise ConfigError(f"which sweep? conf=NAME is missing; there are {', '.join(_sweeps()) or 'none here'}")
    if options.get("fresh", "false") not in ("true", "false"):
        raise ConfigError(f"fresh={options['fresh']}: true or false")
    if not options.get("samples", "0").isdigit():
        raise ConfigError(f"samples={options['samples']}: a number")
    if command != "plan" and "samples" in options:
        raise ConfigError("samples= belongs to `plan`, which renders prompts without running anything")
    return Arguments(
        command=command,
        words=(),
        conf=options["conf"],
        overrides=tuple(overrides),
        only=options.get("only"),
        fresh=options.get("fresh") == "true",
        samples=int(options.get("samples", "0")),
    )


def main(arguments: Sequence[str]) -> int:
    """Run one command; the exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE.format(sweeps=", ".join(_sweeps()) or "none"), end="")
        return DONE if arguments else WRONG
    try:
        parsed = parse(arguments)
        if parsed.command == "tasks":
            from sweep.tasks import tasks_command

            print(tasks_command(parsed.words))
            return DONE
        return _plan(parsed) if parsed.command == "plan" else _run(parsed)
    except (ConfigError, ResourceError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG
    except BrokenPipeError:
        # `| head` has seen enough.
        sys.stderr.close()
        return DONE


def _sweeps() -> list[str]:
    return sorted(path.stem for path in Path("conf").glob("*.yaml"))


def _plan(arguments: Arguments) -> int:
    from sweep.config import load
    from sweep.overview import describe, rendered
    from sweep.plan import make_plan
    from sweep.store import RunDirectory, read_records

    config = load(str(arguments.conf), arguments.overrides)
    directory = RunDirectory(Path(config.runs_dir) / config.name)
    records = {} if arguments.fresh else read_records(directory)
    plan = make_plan(config, records, only=arguments.only, ask_hub=False)
    print(describe(config, plan, directory))
    failed = 0
    for cell in plan.cells if arguments.samples else ():
        try:
            print(f"\n{rendered(cell)}")
        except SweepError as error:
            failed += 1
            print(f"\n{cell.key}: {error}")
    return FAILED if failed else DONE


def _run(arguments: Arguments) -> int:
    from sweep import config as configuration
    from sweep.machine import local_capacity, prepare_local_ray, require, starts_local
    from sweep.plan import make_plan
    from sweep.store import RunDirectory, Store, read_records, set_aside, write_file

    config = configuration.load(str(arguments.conf), arguments.overrides)
    directory = RunDirectory(Path(config.runs_dir) / config.name)
    before = {} if arguments.fresh else read_records(directory)
    plan = make_plan(config, before, only=arguments.only, ask_hub=True)
    if not plan.owed:
        print(f"all {len(plan.cells)} cells are done; `only=model/task` runs one again, `fresh=true` all of them")
        return _conclude(config, plan, directory, before)
    if starts_local(config.ray):
        require(plan.owed_servers, local_capacity(config.ray))
        prepare_local_ray()
    if arguments.fresh and (aside := set_aside(directory)) is not None:
        print(f"the old run directory is now {aside}")
    store = Store(directory)
    try:
        api_key = config.api_key or secrets.token_urlsafe(32)
        hidden = (*configuration.secrets(config), api_key)
        write_file(directory.config, configuration.dump(config))
        with _logged_to(directory.driver_log, hidden):
            from sweep.runner import carry_out

            carried = carry_out(config, plan, store, api_key=api_key, secrets=hidden)
    finally:
        store.close()
    code = _conclude(config, plan, directory, read_records(directory))
    print(_said_of_wandb(carried.wandb))
    if carried.signal:
        print(f"stopped by signal {carried.signal}; the same command goes on where it stopped")
        return 128 + carried.signal
    return code


def _conclude(
    config: "SweepConfig", plan: "Plan", directory: "RunDirectory", records: "Mapping[tuple[str, str], Record]"
) -> int:
    """Write and print the tables of everything that this sweep has results for; the exit code."""
    from sweep.record import Status
    from sweep.report import csv_text, failures, markdown
    from sweep.store import write_file

    # In the order of the config, whatever order the cells ended in; what was taken out of the config is not shown.
    shown = [r for model in config.models for task in config.tasks if (r := records.get((model, task))) is not None]
    write_file(directory.report, markdown(shown, list(config.models)))
    write_file(directory.csv, csv_text(shown, list(config.models)))
    print(f"\n{markdown(shown, list(config.models), subtasks=False)}")
    print(f"tables   {directory.report}, {directory.csv}\nsamples  {directory.results}")
    keys = {(cell.model.name, cell.task_name) for cell in plan.cells}
    failed = [r for r in shown if r.status is Status.FAILED and (r.model, r.task) in keys]
    if failed:
        print(f"\n{failures(failed)}")
    return FAILED if failed else DONE


def _said_of_wandb(outcome: "Outcome") -> str:
    lines = [f"W&B      {outcome.mode}{f' ({outcome.why})' if outcome.why else ''}"]
    if outcome.overview_url:
        lines.append(f"         {outcome.overview_url}")
    if outcome.publish:
        lines.append(f"         publish it later with: {outcome.publish}")
    return "\n".join([*lines, *(f"         {error}" for error in outcome.errors)])


@contextmanager
def _logged_to(path: Path, hidden: Sequence[str]) -> Iterator[None]:
    """The driver's log in the run directory, without any secret."""

    class Masked(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            text = super().format(record)
            for secret in hidden:
                text = text.replace(secret, "***")
            return text

    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(Masked("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("sweep")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
