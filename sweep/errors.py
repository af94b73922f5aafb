"""The tree of errors: who raises each, who catches it, what it costs.

SweepError
├── ConfigError    raised by config, tasks and plan for what the user wrote; exit code 2, nothing started
├── ResourceError  raised by cluster when the machines cannot carry the plan; exit code 2
├── StoreError     raised by store (full disk, locked or foreign run directory); exit code 2, nothing overwritten
├── ReportError    raised by cli when the page of a finished sweep cannot be made; said in one line, costs the page;
│                  by page for one chart, which it goes without and says so; by the runner
│                  when no time is left for W&B's Report
├── ServerError    raised by server and preflight; costs the cells of the models that this server was for
│   └── ServerFault   the same for a cause that another start may not meet; the runner starts the server again
├── TaskError      raised by evaluation (data set, prompt, metric); costs the cells of this task or this one cell
└── RequestError   raised by client when a server refuses a request for good; costs one cell
    └── RequestFault  the same for servers that failed at it again and again; the runner may run the cell again

PassingFault   no SweepError: raised inside client and by scoring, caught by client, which asks again

Below a boundary code raises plain errors; one `boundary(ServerError, "start vLLM for qwen2-5-7b")` classifies them.
Only the runner decides what happens next. Messages say what failed with its values, where to look, what to change.
"""

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class SweepError(Exception):
    """Takes one message, so that it survives pickling and crosses process boundaries unchanged."""


class ConfigError(SweepError):
    """The user's input is wrong: file, key and cure are in the message."""


class ResourceError(SweepError):
    """The cluster lacks what the plan needs: which, how many, and what there is."""


class StoreError(SweepError):
    """The run directory cannot be used or written."""


class ReportError(SweepError):
    """The page cannot be made of what the run directory holds; the tables can."""


class ServerError(SweepError):
    """A server did not start, died for good or answers wrongly."""


class ServerFault(ServerError):
    """A server did not start for a reason that has passed when it is started again, or that nobody knows."""


class TaskError(SweepError):
    """lm-eval cannot load or score a task."""


class RequestError(SweepError):
    """A server refused a request and would refuse it again."""


class RequestFault(RequestError):
    """Servers failed at a request as often as it was tried; later they may not."""


@contextmanager
def boundary(kind: type[SweepError], doing: str) -> Iterator[None]:
    """Turn any foreign exception of the block into `kind`, with what was being done; ours pass unchanged."""
    try:
        yield
    except SweepError:
        raise
    except Exception as error:
        text = str(error).strip() or repr(error)
        raise kind(f"{doing}: {type(error).__name__}: {text}") from error


def may_pass(error: BaseException) -> bool:
    """Whether the same work may succeed another time: all but what one of ours says of its own knowledge."""
    return not isinstance(error, SweepError) or isinstance(error, (ServerFault, RequestFault)) or bool(error.__cause__)


class PassingFault(Exception):
    """A fault of one request that the next try may not meet."""


def nearest(name: str, known: Iterable[str], *, most: int = 3) -> str:
    """`"; did you mean 'a' or 'b'?"` with the known names closest to `name`, or an empty string when none is close."""
    # Of two short words three letters are soon the same: `none` is not nearly `online`.
    close = difflib.get_close_matches(name, list(known), n=most, cutoff=0.6 if len(name) > 4 else 0.65)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def nearest_file(path: Path) -> str:
    """The same for a path that does not exist, among what lies beside the first part of it that is missing:
    `"; there is no folder 'modles' in '/home/me'; did you mean 'models'?"`."""
    path = path.absolute()
    missing = next((part for part in reversed((path, *path.parents)) if not os.path.lexists(part)), path)
    above = missing.parent
    if not (above.is_dir() and os.access(above, os.R_OK | os.X_OK)):
        return ""
    without = f"; there is no folder {missing.name!r} in {str(above)!r}" if missing != path else ""
    return without + nearest(missing.name, os.listdir(above))
