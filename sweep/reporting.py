"""The `report` command, and the end of every sweep: what a run directory says, from its files alone.

It works beside a driver, after one died, and on a run directory that was copied from elsewhere. The page comes after
the tables and costs them nothing when it cannot be made.
"""

from dataclasses import replace

from sweep.errors import ConfigError, StoreError, boundary
from sweep.record import Record, Status
from sweep.results.compare import Findings, examine, examine_sweeps
from sweep.results.page import page
from sweep.results.reading import Sweep
from sweep.results.references import Published, published
from sweep.results.report import counted, markdown
from sweep.results.store import write_file
from sweep.results.summary import compared, headline


def write_page(sweep: Sweep, *, samples: bool = True, findings: Findings | None = None) -> Findings:
    """report.html, and report.md with the comparisons; what was compared, which is `findings` where it was before.
    Without `samples` no prompt or answer is in the page. What cannot be read costs its part and is said there. Raises
    StoreError where nothing can be written.
    """
    findings = examined(sweep) if findings is None else findings
    references: tuple[Published, ...] = ()
    troubles = []
    try:
        references = published(sweep)
    except ConfigError as error:
        troubles.append(f"published scores: {error}")
    if unreadable := sweep.timeline.unreadable:
        troubles.append(
            f"timeline.jsonl: {counted(unreadable, 'line')} cannot be read, so times and GPU-hours may lack some"
        )
    html = page(sweep, findings.comparisons, references, left_out=findings.left_out, troubles=troubles, samples=samples)
    lines = "".join(f"- {name}: {text}\n" for name, text in headline(sweep, findings.comparisons).items())
    table = markdown(sweep.records, sweep.models)
    with boundary(StoreError, f"write the page to {sweep.directory.root}"):
        write_file(sweep.directory.page, html)
        write_file(sweep.directory.report, f"{lines}\n{table}\n**Paired comparisons**\n\n{compared(findings)}")
    return findings


def examined(sweep: Sweep) -> Findings:
    """What was compared; cells whose samples cannot be read are left out and named."""
    try:
        return examine(sweep)
    except StoreError:
        unread = [(record, _unread(sweep, record)) for record in sweep.records]
    findings = examine(replace(sweep, records=tuple(record for record, why in unread if why is None)))
    said = (f"{record.task}: {record.model}: {why}" for record, why in unread if why is not None)
    return replace(findings, left_out=(*said, *findings.left_out))


def _unread(sweep: Sweep, record: Record) -> str | None:
    """Why the samples of a finished cell cannot be read."""
    try:
        for _ in sweep.outcomes(record) if record.status is Status.DONE else ():
            pass
    except StoreError as error:
        return str(error)
    return None


def between(a: Sweep, b: Sweep) -> str:
    """The same models and tasks in two sweeps, as Markdown: checkpoints, versions of vLLM. Raises StoreError."""
    findings = examine_sweeps(a, b)
    verdicts = [one.verdict for one in findings.comparisons]
    by_verdict = [(verdicts.count(v), v) for v in ("better", "worse", "differs", "no difference shown")]
    only = [
        f"- {counted(len(cells), 'cell')} done in {sweep.directory.root} only: {', '.join(sorted(cells)[:3])}"
        + (" …" if len(cells) > 3 else "")
        for sweep, other in ((a, b), (b, a))
        if (cells := _done(sweep) - _done(other))
    ]
    lines = [
        f"- a: {_made_of(a)}",
        f"- b: {_made_of(b)}",
        *only,
        f"- {len(verdicts)} numbers compared: {', '.join(f'{n} {what}' for n, what in by_verdict if n) or 'none'}",
    ]
    return "\n".join([*lines, "", compared(findings, most=None)])


def _done(sweep: Sweep) -> set[str]:
    return {f"{r.model}/{r.task}" for r in sweep.records if r.status is Status.DONE}


def _made_of(sweep: Sweep) -> str:
    """`runs/a, 21 cells, lm_eval 0.4.13, vllm 0.32.0`."""
    versions: dict[str, set[str]] = {}
    for record in sweep.records:
        for name in ("lm_eval", "vllm", "transformers"):
            if version := record.versions.get(name):
                versions.setdefault(name, set()).add(version)
    parts = [f"{name} {' and '.join(sorted(found))}" for name, found in sorted(versions.items())]
    return ", ".join([str(sweep.directory.root), counted(len(_done(sweep)), "cell"), *parts])
