"""Samples on their way into the page: what is kept of them, how much, and what the script can filter by."""

import base64
import gzip
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from sweep.results.answers import Block, _Task, blocks
from sweep.results.reading import Sample, Sweep, read_sweep
from tests.synthetic import write


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    directory = write(tmp_path_factory.mktemp("runs") / "some", models=3, tasks=6, samples=1800)
    return read_sweep(directory.root)


def content(block: Block) -> dict[str, Any]:
    decoded: dict[str, Any] = msgspec.json.decode(gzip.decompress(base64.b64decode(block.data)))
    return decoded


def test_what_is_not_shown_of_a_sample_is_not_kept(sweep: Sweep) -> None:
    seen = []

    def told(samples: Iterator[Sample]) -> Iterator[Sample]:
        for one in samples:
            seen.append(weakref.ref(one))
            yield one
            del one

    task = _Task()
    task.add("m", told(sweep.samples(sweep.records[0])))
    assert len(seen) > 50
    assert not any(ref() for ref in seen)


def test_memory_is_bounded_while_a_task_is_read_and_the_smallest_hashes_stay(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 50_000
    monkeypatch.setattr("sweep.results.answers.MEMORY_BYTES", limit)
    task, sizes, known = _Task(), [], {}

    def told(samples: Iterator[Sample]) -> Iterator[Sample]:
        for one in samples:
            known[one.subtask, one.doc_hash, one.doc_id] = one
            yield one
            sizes.append(task.size)

    for record in [record for record in sweep.records if record.task == sweep.tasks[1]]:
        task.add(record.model, told(sweep.samples(record)))
    assert max(sizes) <= limit
    assert len(task.documents) + len(task.gone) == len(known)
    ordered = sorted(known, key=lambda key: (key[1], key))
    assert sorted(task.documents, key=lambda key: (key[1], key)) == ordered[: len(task.documents)]
    assert 0 < len(task.documents) < len(known)
    kept = task.size
    task.keep(len(task.documents))
    assert task.size == kept  # what was counted line by line is what is there


def test_each_measure_of_a_task_is_there_with_its_direction_whichever_subtask_has_it(sweep: Sweep) -> None:
    group = next(task for task in sweep.tasks if task.startswith("group"))
    last = max({s.subtask for r in sweep.records if r.task == group for s in sweep.samples(r)})
    records = tuple(
        replace(r, scores=tuple(replace(s, metric="brier", higher_is_better=False) for s in r.scores if s.task == last))
        for r in sweep.records
        if r.task == group
    )

    class Other(Sweep):
        def samples(self, record: Any) -> Iterator[Sample]:
            for one in super().samples(record):
                yield replace(one, metrics={"brier": 0.2}) if one.subtask == last else one

    changed = Other(**{**vars(sweep), "records": records})
    (block,) = blocks(changed)
    assert ["none", "brier", False] in content(block)["measures"]
    opposed = tuple(
        replace(
            r,
            scores=tuple(replace(s, metric="brier", higher_is_better=high) for s in r.scores for high in (True, False)),
        )
        for r in records
    )
    (block,) = blocks(Other(**{**vars(sweep), "records": opposed}))
    assert ["none", "brier", None] in content(block)["measures"], "subtasks that disagree have no direction together"
    (perplexity,) = [b for b in blocks(sweep) if b.task.startswith("perplexity")]
    assert content(perplexity)["measures"] == [["none", "bits_per_byte", False]]
