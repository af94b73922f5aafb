"""Arguments -> one of the commands run, plan, check, fetch, status, report, export, tasks. Prints, and decides the exit
code.

Nothing heavy is imported before it is known to be needed: help and mistakes answer at once.
"""

import json
import logging
import math
import os
import secrets
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sweep import ROOT
from sweep.errors import (
    ConfigError,
    ReportError,
    ResourceError,
    StoreError,
    SweepError,
    boundary,
    nearest,
    nearest_file,
)

if TYPE_CHECKING:
    from sweep.planning.config import SweepConfig
    from sweep.planning.plan import Plan
    from sweep.record import Record
    from sweep.results.compare import Findings
    from sweep.results.reading import Sweep
    from sweep.results.store import RunDirectory
    from sweep.results.tracking import Outcome

log = logging.getLogger(__name__)

USAGE = """\
lmsweep: many language models, many lm-eval tasks, one command

  python launch.py conf=NAME [key=value ...]        run a sweep, or go on with it where it stopped
  python launch.py plan conf=NAME [key=value ...]   what it would do: cells, GPUs, server commands; starts nothing
  python launch.py check conf=NAME [key=value ...]  start each server, ask what it can do, stop it: a table, no scores
  python launch.py fetch conf=NAME [key=value ...]  bring weights, tokenizers, data into HF_HOME; needs no GPU
  python launch.py status conf=NAME [key=value ...] what is done, running, owed, failed; from any machine;
                                                    `status DIR` of any run directory, as report DIR and export DIR
  python launch.py report conf=NAME [publish=true]  make report.html, report.md and results.csv anew from the files;
                                                    publish=true: and W&B's runs, with what W&B did not get
                                                    samples=false: no prompt and no answer in the page
  python launch.py report DIR DIR [to=FILE]         the second sweep against the first, by model and task, document by
                                                    document; DIR is a run directory (runs/NAME). pair=M:N,…
                                                    compares model M of the first with model N of the second
  python launch.py export conf=NAME [to=DIR]        scores, samples and responses as Parquet, in runs/NAME/export or DIR
  python launch.py tasks [WORD ...]                 search lm-eval's tasks, groups and tags

conf=NAME       conf/NAME.yaml, or a path to a YAML file
key=value       overrides any key (docs/keys.md): limit=10, models.qwen.chat=true, tasks.gsm8k.num_fewshot=0
only=M/T        run the cells of model M and task T again (shell wildcards), from stored answers where there are any;
                with plan, check and fetch: only what these cells need
fresh=true      set the old run directory aside and begin anew
samples=1       with plan: show one rendered prompt of each cell
cluster=FILE    with plan: what it would take on the cluster that the file describes (conf/cluster/8xH100.yaml)

exit codes      0    every cell is done
                1    some cells failed (of plan: cannot run), a model cannot be served, something could not be fetched,
                     or the walltime was too short to get on at all; it is listed, the rest is done;
                     of tasks: nothing matches
                2    wrong input, the machines lack what the plan needs, or the run directory cannot be used or written
                3    every cell is done, but a number is not as the sweep's `expect` says, or is not there;
                     of status: cells are owed and a driver is at work; 4: and none is
                75   the walltime is over and cells are owed: start the same command again
                130  stopped by Ctrl-C (SIGINT), 143 by SIGTERM, 129 by a closed terminal (SIGHUP); the same command
                     goes on
sweeps here     {sweeps}
"""

COMMANDS = {
    "run": ("only", "fresh"),
    "plan": ("only", "fresh", "samples", "cluster"),
    "check": ("only",),
    "fetch": ("only",),
    "status": (),
    "report": ("samples", "publish", "to", "pair"),
    "export": ("to",),
    "tasks": (),
}
"""The words that each takes beside keys of the sweep file."""

DONE, FAILED, WRONG, MISSED, AGAIN, INTERRUPTED = 0, 1, 2, 3, 75, 130
"""Exit codes. 75 is EX_TEMPFAIL of sysexits.h: a failure that passes when it is tried again."""

WARNED_S = 300.0
"""A batch system that sends SIGTERM so soon before a job's end warns of that end (deploy/slurm.sbatch: two minutes)."""

AT_WORK, ABANDONED = 3, 4
"""Of `status`, while cells are owed."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    command: str
    words: tuple[str, ...]
    """Of `tasks`; of `status`, `report` and `export` the run directories, where there is no conf."""
    conf: str | None = None
    overrides: tuple[str, ...] = ()
    """Dot-list entries for the config."""
    only: str | None = None
    fresh: bool = False
    samples: bool = False
    """Of `plan`."""
    without_samples: bool = False
    """Of `report`: `samples=false`."""
    cluster: str | None = None
    """A file that describes one."""
    publish: bool = False
    to: str | None = None
    """Where to write: a folder, of `report` a file."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Of `report` with two run directories: a model of the first and one of the second."""


def parse(arguments: Sequence[str]) -> Arguments:
    """The command line as data. Raises ConfigError."""
    command, rest = "run", list(arguments)
    if rest and "=" not in rest[0]:
        command = rest.pop(0)
        if command not in COMMANDS:
            known = [*COMMANDS, *(f"conf={name}" for name in _sweeps())]
            raise ConfigError(f"unknown command {command!r}{nearest(command, known)} (--help shows all)")
    if command == "tasks":
        return Arguments(command=command, words=tuple(rest))
    options: dict[str, str] = {}
    overrides = []
    words = [argument for argument in rest if "=" not in argument] if command in _DIRECTORIES else []
    for argument in [argument for argument in rest if argument not in words]:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument!r} is not of the form key=value (--help shows what there is)")
        if key in ("conf", "only", "fresh", "samples", "cluster") or (command in ("report", "export") and key in _KEPT):
            options[key] = value
        else:
            overrides.append(argument)
    if words:
        _require_directories(command, words, [*options.keys() - {"to", "samples", "pair"}, *overrides])
    elif "conf" not in options:
        wanted = "conf=NAME, or a run directory," if command in _DIRECTORIES else "conf=NAME"
        raise ConfigError(f"which sweep? {wanted} is missing; there are {', '.join(_sweeps()) or 'none here'}")
    if options.get("fresh", "false") not in ("true", "false"):
        raise ConfigError(f"fresh={options['fresh']}: true or false")
    if command == "report":
        if options.get("samples", "true") not in ("true", "false"):
            raise ConfigError(f"samples={options['samples']}: false makes the page without samples")
        if "samples" in options and len(words) > 1:
            raise ConfigError("samples= belongs to the page of one sweep; two side by side show none")
    elif options.get("samples", "0") not in ("0", "1"):
        raise ConfigError(f"samples={options['samples']}: 1 shows the first prompt of each cell, 0 none")
    kept = {"conf", *_KEPT, *(["samples"] if command == "report" else [])}
    if command in ("status", "report", "export") and (wrong := options.keys() - kept):
        raise ConfigError(f"{min(wrong)}= has no meaning for `{command}`, which tells of the whole run directory")
    if options.get("publish", "false") not in ("true", "false"):
        raise ConfigError(f"publish={options['publish']}: true or false")
    if command == "report" and "to" in options and len(words) < 2:
        raise ConfigError("to= of `report` belongs to two run directories; the page of one sweep lies in its own")
    if command == "report" and "pair" in options and len(words) < 2:
        raise ConfigError("pair= of `report` belongs to two run directories, whose models it pairs")
    if command == "export" and (wrong := options.keys() & {"publish", "pair"}):
        raise ConfigError(f"{min(wrong)}= belongs to `report`")
    if command in ("check", "fetch") and "fresh" in options:
        raise ConfigError(f"fresh= belongs to a run; `{command}` neither reads results nor writes any")
    if command not in ("plan", "report") and "samples" in options:
        raise ConfigError("samples= belongs to `plan`, which renders prompts without running anything, and to `report`")
    if command != "plan" and "cluster" in options:
        raise ConfigError("cluster= belongs to `plan`; a run takes the cluster that it finds (see ray.address)")
    return Arguments(
        command=command,
        words=tuple(words),
        conf=options.get("conf"),
        overrides=tuple(overrides),
        only=options.get("only"),
        fresh=options.get("fresh") == "true",
        samples=options.get("samples") == "1",
        without_samples=options.get("samples") == "false",
        cluster=options.get("cluster"),
        publish=options.get("publish") == "true",
        to=options.get("to"),
        pairs=_pairs(options["pair"]) if "pair" in options else (),
    )


_KEPT = ("publish", "to", "pair")
"""Options of the commands that tell what is kept."""

_DIRECTORIES = {"status": 1, "report": 2, "export": 1}
"""Commands that take run directories in place of a sweep file, and how many at most."""


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """`base:base-awq,small` -> base with base-awq, and small with small. Raises ConfigError."""
    pairs = []
    for part in text.split(","):
        first, colon, second = (piece.strip() for piece in part.partition(":"))
        if not first or (colon and not second) or ":" in second:
            raise ConfigError(
                f"pair={text}: wants MODEL:MODEL, the second of the second run directory, several with commas between"
            )
        pairs.append((first, second or first))
    return tuple(pairs)


def _require_directories(command: str, words: Sequence[str], others: Sequence[str]) -> None:
    """Raises ConfigError unless `words` are run directories, and all that is said."""
    if others:
        raise ConfigError(f"{min(others)} has no meaning beside a run directory ({words[0]})")
    if len(words) > (most := _DIRECTORIES[command]):
        raise ConfigError(f"`{command}` takes {'two run directories' if most == 2 else 'one run directory'}")
    for word in words:
        if not Path(word).is_dir():
            sweep = f"; did you mean 'conf={word}'?" if word in _sweeps() else nearest_file(Path(word))
            raise ConfigError(f"no folder {word!r}: a run directory, or conf=NAME, is wanted{sweep}")


def main(arguments: Sequence[str]) -> int:
    """Run one command; the exit code."""
    try:
        code = _carry_out(arguments)
        sys.stdout.flush()
        return code
    except (ConfigError, ResourceError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # `| head` has seen enough. What is still in the buffer must not fail again when Python flushes it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _carry_out(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] == "help" or {"-h", "--help"} & set(arguments):
        print(USAGE.format(sweeps=", ".join(_sweeps()) or "none"), end="")
        return DONE if arguments else WRONG
    parsed = parse(arguments)
    if parsed.command == "tasks":
        from sweep.planning.tasks import tasks_command

        text, found = tasks_command(parsed.words)
        print(text)
        return DONE if found else FAILED
    commands = {
        "plan": _plan,
        "check": _check,
        "fetch": _fetch,
        "status": _status,
        "report": _report,
        "export": _export,
        "run": _run,
    }
    try:
        return commands[parsed.command](parsed)
    except ConfigError as error:
        if parsed.conf is None:
            raise
        raise ConfigError(_located(parsed)(str(error))) from error


def _located(arguments: Arguments) -> Callable[[str], str]:
    """What puts the source of the sweep that is meant before messages that begin with a key."""
    from sweep.planning.loading import with_source

    return partial(with_source, conf=str(arguments.conf), overrides=arguments.overrides)


def _sweeps() -> list[str]:
    folders = (Path("conf"), ROOT / "conf")
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def _loaded(arguments: Arguments) -> "SweepConfig":
    """The sweep, whose `env` holds from now on for this process too: the hub is asked, and found in a cache, as on the
    nodes. Must come before huggingface_hub is imported, which reads it once."""
    from sweep.planning.loading import load

    config = load(str(arguments.conf), arguments.overrides, words=COMMANDS[arguments.command])
    # Engines get theirs from their models' `env`; what a shell holds of them is reported as not passed on.
    os.environ.update({name: value for name, value in config.env.items() if not name.startswith("VLLM_")})
    return config


def _plan(arguments: Arguments) -> int:
    from sweep.overview import describe, expected, rendered
    from sweep.planning.loading import load_cluster
    from sweep.planning.plan import make_plan
    from sweep.results.report import counted
    from sweep.results.store import RunDirectory, read_commits, read_records
    from sweep.running.inventory import described
    from sweep.running.machine import local_node

    config = _loaded(arguments)
    nodes = described(load_cluster(arguments.cluster)) if arguments.cluster else (local_node(config.ray),)
    directory = RunDirectory(Path(config.runs_dir) / config.name)
    records, commits = ({}, {}) if arguments.fresh else (read_records(directory), read_commits(directory))
    plan = make_plan(config, records, only=arguments.only, ask_hub=False, commits=commits, located=_located(arguments))
    print(describe(config, plan, directory, only=arguments.only), flush=True)
    # Before what it would take: a time for options that vLLM refuses is none.
    _examine(plan, required=False, told=True)
    print(f"\n{expected(plan, nodes, records.values(), where=arguments.cluster or 'this machine')}")
    failed = 0
    for cell in plan.cells if arguments.samples else ():
        try:
            print(f"\n{rendered(cell)}")
        except SweepError as error:
            failed += 1
            print(f"\n{cell.key}: {error}")
    if plan.refused:
        print(f"\n{counted(len(plan.refused), 'cell')} cannot run: see the lines with ! above")
    return FAILED if failed or plan.refused else DONE


def _check(arguments: Arguments) -> int:
    from sweep.planning.loading import secrets_of
    from sweep.planning.plan import make_plan
    from sweep.results.store import RunDirectory, read_commits
    from sweep.running.machine import prepare_ray, starts_local

    config = _loaded(arguments)
    directory = RunDirectory(Path(config.runs_dir) / config.name)
    plan = make_plan(
        config, {}, only=arguments.only, ask_hub=True, commits=read_commits(directory), located=_located(arguments)
    )
    if plan.owed:
        prepare_ray(config.ray, plan.owed_servers)
    _examine(plan, required=starts_local(config.ray))
    api_key = config.api_key or secrets.token_urlsafe(32)
    hidden = (*secrets_of(config), api_key)
    # A folder of its own: a run of the same sweep may be at work in the other.
    logs = RunDirectory(directory.root / "check")
    with _logged_to(logs.driver_log, hidden):
        from sweep.checkup import check

        return check(config, plan, logs, api_key=api_key, secrets=hidden)


def _fetch(arguments: Arguments) -> int:
    from sweep.fetch import fetch
    from sweep.planning.loading import secrets_of
    from sweep.planning.plan import make_plan
    from sweep.results.store import RunDirectory, read_commits, read_records

    config = _loaded(arguments)
    directory = RunDirectory(Path(config.runs_dir) / config.name)
    records, commits = read_records(directory), read_commits(directory)
    plan = make_plan(config, records, only=arguments.only, ask_hub=True, commits=commits, located=_located(arguments))
    return fetch(plan, secrets_of(config))


def _status(arguments: Arguments) -> int:
    from sweep.results.store import RunDirectory
    from sweep.status import describe, standing

    (root,) = _kept(arguments)
    directory = RunDirectory(root)
    stands = standing(directory, now=time.time())
    # What goes into a file or another program is whole.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(describe(stands, directory.root, width=width))
    if stands.finished:
        return FAILED if stands.errors else DONE
    return AT_WORK if stands.alive else ABANDONED


def _kept(arguments: Arguments) -> list[Path]:
    """The run directories that are meant."""
    from sweep.planning.loading import load

    def found(overrides: Sequence[str]) -> Path:
        config = load(str(arguments.conf), overrides, words=COMMANDS[arguments.command])
        return Path(config.runs_dir) / config.name

    if arguments.words:
        return [Path(word) for word in arguments.words]
    root = found(arguments.overrides)
    with suppress(ConfigError):  # without them there is no sweep at all
        # What is published goes where the sweep file with its overrides says.
        if arguments.overrides and not arguments.publish and found(()) == root:
            names = ", ".join(override.partition("=")[0] for override in arguments.overrides)
            _note(f"{names}: without effect here, where it is about what was launched into {root}")
    return [root]


def _report(arguments: Arguments) -> int:
    from sweep.results.reading import read_sweep
    from sweep.results.store import write_file

    sweep, *others = [read_sweep(root) for root in _kept(arguments)]
    from sweep.reporting import between, write_page
    from sweep.results.summary import headline, in_lines

    if others:
        text = between(sweep, others[0], pairs=arguments.pairs)
        print(text)
        if arguments.to is not None:
            with boundary(StoreError, f"write {arguments.to}"):
                write_file(Path(arguments.to), text)
        return DONE
    _write_tables(sweep)
    findings = write_page(sweep, samples=not arguments.without_samples)
    directory = sweep.directory
    print(f"page     {directory.page}\ntables   {directory.report}, {directory.csv}")
    print("\n".join(in_lines(headline(sweep, findings.comparisons))))
    if not arguments.publish:
        return DONE
    from sweep.planning.loading import secrets_of
    from sweep.results.publish import publish

    config = _loaded(arguments)
    outcome = publish(sweep, config, secrets=secrets_of(config), texts=_chapters(findings))
    print(_said_of_wandb(outcome, "the same command tries again"))
    return DONE if outcome.mode == "online" and not outcome.errors else FAILED


class _Examined:
    """What was compared at the end of a launch, for the next who wants it: it reads every sample, maybe for minutes."""

    def __init__(self) -> None:
        self._known: tuple[object, Findings] | None = None

    def __call__(self, sweep: "Sweep") -> "Findings":
        from sweep.reporting import examined

        # Not the order of tasks and records, which tells nothing of what is compared.
        asked = (sweep.models, {(record.model, record.task): record for record in sweep.records})
        if self._known is None or self._known[0] != asked:
            self._known = (asked, examined(sweep))
        return self._known[1]


def _tables_and_chapters(sweep: "Sweep", examined: _Examined) -> dict[str, str]:
    """The tables come first: comparisons may take minutes, in which a batch system may end everything."""
    _write_tables(sweep)
    return _chapters(examined(sweep))


def _chapters(findings: "Findings") -> dict[str, str]:
    """Of W&B's Report, Markdown by title."""
    from sweep.results.summary import compared

    return {"Paired comparisons": compared(findings)}


def _export(arguments: Arguments) -> int:
    from sweep.results.reading import read_sweep

    (root,) = _kept(arguments)
    sweep = read_sweep(root)
    from sweep.results.export import export

    export(sweep, Path(arguments.to) if arguments.to else root / "export", say=print)
    return DONE


def _examine(plan: "Plan", *, required: bool, told: bool = False) -> None:
    """Check every server's options against its vLLM's own parser, and print what became of options of older versions,
    unless that was `told` already.

    Raises ConfigError; when it is `required`, also where there is no vLLM to ask.
    """
    from sweep.serving.engine import examine, notices

    servers = [server for server in plan.owed_servers.values() if not server.external]
    known = [] if told else [notice for server in servers for notice in notices(server)]
    for notice in dict.fromkeys((*known, *examine(servers, required=required, say=_note))):
        _note(notice)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _run(arguments: Arguments) -> int:
    from sweep.masking import masked
    from sweep.overview import document, replaced
    from sweep.planning.loading import dump, secrets_of
    from sweep.planning.plan import as_of, make_plan
    from sweep.results.report import counted
    from sweep.results.store import (
        RunDirectory,
        Store,
        masked_json,
        read_cells,
        read_commits,
        read_records,
        set_aside,
        write_file,
    )
    from sweep.running.machine import prepare_ray, require_kept, starts_local
    from sweep.running.walltime import ends_at

    began_s = time.time()
    config = _loaded(arguments)
    directory = RunDirectory(Path(config.runs_dir) / config.name)
    require_kept(directory.root)
    before, commits = ({}, {}) if arguments.fresh else (read_records(directory), read_commits(directory))
    plan = make_plan(config, before, only=arguments.only, ask_hub=True, commits=commits, located=_located(arguments))
    whole = plan
    if arguments.only is not None:
        whole = make_plan(config, before, ask_hub=False, commits=plan.commits, located=_located(arguments))
    if not arguments.fresh:
        _require_same_sweep(whole, directory, read_cells(directory).keys())
    if not plan.owed and not plan.refused:
        print(f"all {len(plan.cells)} cells are done; `only=model/task` runs one again, `fresh=true` all of them")
        return _conclude(config, plan, plan.done, directory, before, _Examined(), launched=False)
    document(whole)  # refuses options before anything is written
    if plan.owed:
        prepare_ray(config.ray, plan.owed_servers)
    _examine(plan, required=starts_local(config.ray))
    if arguments.fresh and (aside := set_aside(directory)) is not None:
        print(f"the old run directory is now {aside}")
    api_key = config.api_key or secrets.token_urlsafe(32)
    hidden = (*secrets_of(config), api_key)
    store = Store(directory, secrets=hidden)
    try:
        # The hub and vLLM's parser took their time: another driver may have ended cells since the plan was made.
        records, planned_done = read_records(directory), whole.done.keys()
        whole = as_of(whole, records)
        plan = whole if arguments.only is None else as_of(plan, records, chosen_from=whole.cells)
        if more := whole.done.keys() - planned_done:
            print(f"another driver has finished {counted(len(more), 'cell')} meanwhile")
        for line in replaced(plan):
            print(line)
        planned = document(whole)
        with boundary(StoreError, f"write to {directory.root}"):
            write_file(directory.config, dump(config))
            write_file(directory.plan, masked_json(json.dumps(planned, indent=1).encode(), hidden))
        store.keep_sweep_id()
        for record in plan.refused.values():
            store.write_record(record, {})
        carried, ends_at_s, examined = None, math.inf, _Examined()
        if plan.owed:
            with _logged_to(directory.driver_log, hidden):
                from sweep.running.launching import carry_out

                ends_at_s = ends_at(config.walltime, os.environ, began_s=began_s, now_s=time.time())
                carried = carry_out(
                    config,
                    plan,
                    store,
                    api_key=api_key,
                    secrets=hidden,
                    ends_at_s=ends_at_s,
                    texts=partial(_tables_and_chapters, examined=examined),
                )
    finally:
        store.close()
    records = read_records(directory)
    ended = {**plan.refused, **(carried.records if carried else {})}
    stopped = carried is not None and bool(carried.signal or carried.out_of_time)
    code = _conclude(config, whole, ended, directory, records, examined, stopped=stopped)
    if carried is None:
        return code
    sweep = (f"conf={arguments.conf}", *arguments.overrides)
    later = f"publish it later with: {_command('report', *sweep, 'publish=true')}"
    print(_said_of_wandb(carried.wandb, masked(later, hidden)))
    same = "the same command without fresh=true" if arguments.fresh else "the same command"
    only = () if arguments.only is None else (f"only={arguments.only}",)
    again = masked(f"{same} goes on where it stopped: {_command(*sweep, *only)}", hidden)
    warned = carried.signal == signal.SIGTERM and time.time() > ends_at_s - WARNED_S
    if (carried.out_of_time or warned) and not carried.got_on:
        print("the walltime is too short: it was over before anything was answered; give it a longer one")
        return FAILED
    if carried.signal:
        print(f"stopped by {signal.Signals(carried.signal).name}; {again}")
        return 128 + carried.signal
    if carried.out_of_time:
        print(f"the walltime is over; {again}")
        return AGAIN
    return code


def _command(*words: str) -> str:
    return shlex.join(["python", "launch.py", *words])


def _require_same_sweep(plan: "Plan", directory: "RunDirectory", cells: Set[str]) -> None:
    """Raises StoreError where the last launch into the directory had not one cell of this sweep: a file of the same
    `name:` would overwrite its plan and tables."""
    if cells and not cells & {cell.key for cell in plan.cells}:
        raise StoreError(
            f"{directory.root} holds another sweep, of {len(cells)} cells such as {min(cells)}, and none of these: "
            "choose another name=, or fresh=true to set it aside"
        )


def _conclude(
    config: "SweepConfig",
    whole: "Plan",
    ended: "Mapping[str, Record]",
    directory: "RunDirectory",
    records: "Mapping[tuple[str, str], Record]",
    examined: _Examined,
    *,
    launched: bool = True,
    stopped: bool = False,
) -> int:
    """Print the tables of the `whole` sweep and write them and its page; the exit code, which is about the cells that
    have `ended`. A launch that was `stopped` makes no page, and one that `launched` nothing only what is out of date.
    """
    from sweep.planning.loading import secrets_of
    from sweep.record import Status
    from sweep.results.expectations import check
    from sweep.results.reading import read_sweep
    from sweep.results.report import failures, markdown

    # In the order of the config, whatever order the cells ended in. Results of other settings may be there too: of a
    # launch with another limit, say, when this one was stopped before it came to the cell.
    found = [(cell, r) for cell in whole.cells if (r := records.get((cell.model.name, cell.task_name))) is not None]
    shown = [record for cell, record in found if record.fingerprint == cell.fingerprint]
    if others := len(found) - len(shown):
        print(f"\n{others} cells are left out of the tables: what they have was computed under other settings")
    done = sum(record.status is Status.DONE for record in shown)
    sweep = replace(
        read_sweep(directory.root),
        models=tuple(config.models),
        tasks=tuple(dict.fromkeys(cell.task_name for cell in whole.cells)),
        records=tuple(shown),
        owed=len(whole.cells) - done,
    )
    shown_already = not launched and _is_shown(directory, whole)
    if not shown_already:
        _write_tables(sweep)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    if shown:
        print(f"\n{markdown(shown, list(config.models), subtasks=False, width=width)}")
    print(f"{done} of {len(whole.cells)} cells are done")
    print(f"tables   {directory.report}, {directory.csv}\nsamples  {directory.results}")
    if stopped:  # whoever has stopped a sweep does not wait for it
        print(f"page     none; of what is there makes one: {_command('report', str(directory.root))}")
    elif shown_already:
        print(f"page     {directory.page}")
    else:
        _show(sweep, secrets_of(config), examined)
    failed = [record for record in ended.values() if record.status is Status.FAILED]
    if failed:
        print(f"\n{failures(failed)}")
    checked = check(config.models, config.tasks, shown)
    missed = [one for one in checked if not one.met]
    if checked:
        print(f"expected {len(checked) - len(missed)} of {len(checked)} numbers are as the sweep file expects them")
    for one in missed:
        print(f"         {one.said}")
    return FAILED if failed else MISSED if missed else DONE


def _write_tables(sweep: "Sweep") -> None:
    from sweep.results.report import csv_text, markdown
    from sweep.results.store import write_file

    with boundary(StoreError, f"write the tables to {sweep.directory.root}"):
        write_file(sweep.directory.report, markdown(sweep.records, sweep.models))
        write_file(sweep.directory.csv, csv_text(sweep.records, sweep.models))


def _is_shown(directory: "RunDirectory", whole: "Plan") -> bool:
    """Whether tables and page are there, of these cells and no older than any record."""
    from sweep.results.store import read_cells

    made = (directory.report, directory.csv, directory.page)
    if not all(path.exists() for path in made):
        return False
    newest = max((record.stat().st_mtime for record in directory.records.glob("*.json")), default=0.0)
    planned = {cell.key: cell.fingerprint for cell in whole.cells}
    return min(path.stat().st_mtime for path in made) >= newest and read_cells(directory) == planned


def _show(sweep: "Sweep", hidden: Sequence[str], examined: _Examined) -> None:
    """Make the page and say where it is and what it says; a sweep is finished without it, too."""
    from sweep.reporting import write_page
    from sweep.results.summary import headline, in_lines

    try:
        with boundary(ReportError, "make the page"):
            said = in_lines(headline(sweep, write_page(sweep, findings=examined(sweep)).comparisons))
    except SweepError as error:
        with _logged_to(sweep.directory.driver_log, hidden):
            log.exception("there is no new page")
        print(f"page     none: {error} (more in {sweep.directory.driver_log}; `report` tries again)")
        return
    print("\n".join([f"page     {sweep.directory.page}", *said]))


def _said_of_wandb(outcome: "Outcome", later: str) -> str:
    """`later` is what helps where W&B has not everything."""
    lines = [f"W&B      {outcome.mode}{f' ({outcome.why})' if outcome.why else ''}"]
    if outcome.overview_url:
        lines.append(f"         {outcome.overview_url}")
    if outcome.report_url:
        lines.append(f"         Report: {outcome.report_url}")
    lines += [f"         {error}" for error in outcome.errors]
    if outcome.mode == "offline" or outcome.errors:
        lines.append(f"         {later}")
    return "\n".join(lines)


@contextmanager
def _logged_to(path: Path, hidden: Sequence[str]) -> Iterator[None]:
    """The driver's log in the run directory, without any secret."""

    from sweep.masking import masked

    class Masked(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return masked(super().format(record), hidden)

    with boundary(StoreError, f"write to {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(Masked("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("sweep")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
