"""A run directory as Parquet, for notebooks and warehouses: scores, samples, responses.

`scores.parquet`: the columns of results.csv. A row for each number, and for each cell that has none.

| column | |
|---|---|
| model, task | the cell |
| lm_eval_task | task, subtask or group in lm-eval that the number belongs to |
| version, filter, num_fewshot, metric, higher_is_better | as lm-eval gives them |
| value, stderr, samples | the number, its standard error, documents |
| status, error, wall_s | of the cell |
| asked, reused, truncated, empty, length_stopped | requests of the cell, by what became of them |

`samples.parquet`: a row for each document, filter and finished cell; what lm-eval's `samples_*.jsonl` hold.

| column | |
|---|---|
| model, task, subtask, filter | where it belongs |
| doc_id, doc_hash, prompt_hash, target_hash | pair documents by hash: a position means nothing elsewhere |
| doc, target, arguments, resps, filtered_resps, metrics | JSON, as in the file |
| metric_NAME | its own number, for each metric of the sweep; null where it has none or more than a number |

`responses.parquet`: a row for each answer that a model gave, as it is stored, in the order of arrival.

| column | |
|---|---|
| key | of model and request, hexadecimal |
| model, task | the cell that asked first |
| method, engine | how it was computed, and by which version of vLLM |
| logprob, is_greedy | of a scored continuation |
| text, finish_reason, stop_token | of a generation, with the reasoning |
| tokens, cut | of the answer; cut from the left of its prompt |

Written in groups of rows, so that a million take no more memory than a few thousand. Prompts are in `samples`; the
database knows only their hash.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from sweep.errors import StoreError, boundary
from sweep.record import Status
from sweep.results.reading import Sample, Sweep
from sweep.results.report import rows
from sweep.results.store import Response, stored_responses

GROUP_ROWS = 16_384
GROUP_BYTES = 32 * 2**20
"""Of texts in a group of rows: a document may be a whole book."""

_WORD, _TEXT = pa.dictionary(pa.int32(), pa.string()), pa.string()

SCORES = pa.schema(
    {
        **dict.fromkeys(("model", "task", "lm_eval_task", "version", "filter"), _TEXT),
        "num_fewshot": pa.int64(),
        "metric": _TEXT,
        "higher_is_better": pa.bool_(),
        "value": pa.float64(),
        "stderr": pa.float64(),
        "samples": pa.int64(),
        "status": _TEXT,
        "error": _TEXT,
        "wall_s": pa.float64(),
        **dict.fromkeys(("asked", "reused", "truncated", "empty", "length_stopped"), pa.int64()),
    }
)

_JSON = ("doc", "target", "arguments", "resps", "filtered_resps", "metrics")

SAMPLES = pa.schema(
    {
        **dict.fromkeys(("model", "task", "subtask", "filter"), _WORD),
        "doc_id": pa.int64(),
        **dict.fromkeys(("doc_hash", "prompt_hash", "target_hash", *_JSON), _TEXT),
    }
)
"""And a column for each metric."""

RESPONSES = pa.schema(
    {
        "key": _TEXT,
        **dict.fromkeys(("model", "task", "method", "engine"), _WORD),
        "logprob": pa.float64(),
        "is_greedy": pa.bool_(),
        "text": _TEXT,
        "finish_reason": _WORD,
        "stop_token": pa.int64(),
        "tokens": pa.int64(),
        "cut": pa.int64(),
    }
)


class _Answer(msgspec.Struct):
    """What the kinds of answers have in common and apart."""

    logprob: float | None = None
    is_greedy: bool | None = None
    text: str | None = None
    finish_reason: str | None = None
    stop_token: int | None = None
    tokens: int | None = None
    cut: int | None = None
    engine: str | None = None


def export(sweep: Sweep, folder: Path, *, say: Callable[[str], None]) -> None:
    """Write the three files into `folder`, and `say` of each where it is.

    Raises StoreError for what cannot be read or written; the responses come last, since a driver at work keeps them to
    itself.
    """
    metrics = sorted({score.metric for record in sweep.records for score in record.scores})
    with_metrics = SAMPLES
    for name in metrics:
        with_metrics = with_metrics.append(pa.field(f"metric_{name}", pa.float64()))
    _write(folder / "scores.parquet", SCORES, rows(sweep.records, sweep.models), say)
    _write(folder / "samples.parquet", with_metrics, _samples(sweep, metrics), say)
    if not sweep.directory.responses.exists():
        say(f"no responses: there is no {sweep.directory.responses}")
        return
    try:
        with stored_responses(sweep.directory) as responses:
            _write(folder / "responses.parquet", RESPONSES, map(_response, responses), say)
    except StoreError as error:
        raise StoreError(f"the responses are not exported: {error}") from error


def _samples(sweep: Sweep, metrics: Iterable[str]) -> Iterator[dict[str, Any]]:
    for record in sweep.records:
        if record.status is Status.DONE:
            for sample in sweep.samples(record):
                yield {"model": record.model, "task": record.task, **_sample(sample, metrics)}


def _sample(sample: Sample, metrics: Iterable[str]) -> dict[str, Any]:
    plain = {name: getattr(sample, name) for name in SAMPLES.names if hasattr(sample, name)}
    texts = {name: msgspec.json.encode(plain[name]).decode() for name in _JSON}
    return plain | texts | {f"metric_{name}": _number(sample.metrics.get(name)) for name in metrics}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _response(response: Response) -> dict[str, Any]:
    model, _, task = response.cell.partition("/")
    answer = msgspec.json.decode(response.answer, type=_Answer)
    return {
        "key": response.key.hex(),
        "model": model,
        "task": task,
        "method": response.method,
        **msgspec.structs.asdict(answer),
    }


def _write(path: Path, schema: pa.Schema, found: Iterable[Mapping[str, Any]], say: Callable[[str], None]) -> None:
    """Replace the file in one step."""
    temporary, count = path.with_name(f".{path.name}.tmp"), 0
    with boundary(StoreError, f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
                for group in _groups(found):
                    writer.write_table(pa.Table.from_pylist(group, schema=schema))
                    count += len(group)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    say(f"{count:>9,} rows  {path}")


def _groups(found: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    group: list[Mapping[str, Any]] = []
    size = 0
    for row in found:
        group.append(row)
        size += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(group) >= GROUP_ROWS or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
