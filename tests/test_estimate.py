"""What is shown of a metric while a cell runs."""

import logging
from typing import Any

import pytest

from sweep.evaluating import estimate as module
from sweep.evaluating.estimate import Choice, Estimate


def score(doc: dict[str, int], results: list[Any]) -> dict[str, Any]:
    best = max(range(len(results)), key=lambda number: results[number][0])
    return {"acc": float(best == doc["gold"]), "f1": (doc["gold"], best)}


def choices(documents: int, *, task: str = "arc") -> list[Choice]:
    return [
        Choice(task=task, document=d, number=n, doc={"gold": d % 2}, key=f"{task}{d}.{n}".encode())
        for d in range(documents)
        for n in (0, 1)
    ]


def answer(estimate: Estimate, document: int, best: int, *, task: str = "arc") -> None:
    for number in (1, 0):
        estimate.answered(f"{task}{document}.{number}".encode(), 0.0 if number == best else -1.0, False)


def test_the_mean_is_of_documents_whose_every_choice_is_answered() -> None:
    estimate = Estimate({"arc": score})
    estimate.watch(choices(4))
    assert estimate.values() == {}
    answer(estimate, 0, best=0)
    answer(estimate, 2, best=1)
    answer(estimate, 1, best=1)
    estimate.answered(b"arc3.0", 0.0, False)
    assert estimate.values() == {"acc_of_finished": pytest.approx(2 / 3), "finished_documents": 3}


def test_choices_that_are_one_request_are_answered_together() -> None:
    estimate = Estimate({"arc": score})
    estimate.watch([Choice(task="arc", document=d, number=0, doc={"gold": 0}, key=b"same") for d in range(3)])
    estimate.answered(b"same", -1.0, True)
    assert estimate.values() == {"acc_of_finished": 1.0, "finished_documents": 3}


def test_other_tasks_and_answers_are_passed_over() -> None:
    estimate = Estimate({"arc": score})
    estimate.watch(choices(2, task="gsm8k"))
    answer(estimate, 0, best=0, task="gsm8k")
    assert estimate.values() == {}


def test_no_more_than_some_documents_are_scored_and_they_are_the_same_for_every_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "DOCUMENTS_MOST", 5)
    scored: list[list[int]] = []
    for order in (1, -1):
        seen: list[int] = []
        estimate = Estimate({"arc": lambda doc, results, seen=seen: seen.append(doc["gold"]) or {"acc": 1.0}})
        estimate.watch([Choice(task="arc", document=d, number=0, doc={"gold": d}, key=b"%d" % d) for d in range(50)])
        for document in list(range(50))[::order]:
            estimate.answered(b"%d" % document, 0.0, True)
        scored.append(sorted(seen))
    assert len(scored[0]) == 5
    assert scored[0] == scored[1]


def test_a_task_that_cannot_score_ends_the_estimate_and_not_the_cell(caplog: pytest.LogCaptureFixture) -> None:
    def broken(doc: Any, results: Any) -> dict[str, Any]:
        raise KeyError("gold")

    estimate = Estimate({"arc": broken})
    estimate.watch(choices(3))
    with caplog.at_level(logging.INFO):
        for document in range(3):
            answer(estimate, document, best=0)
    assert estimate.values() == {}
    assert len(caplog.records) == 1
