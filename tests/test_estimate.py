"""What is shown of a metric while a cell runs."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sweep.evaluating import estimate as module
from sweep.evaluating.estimate import BUDGET_S, DOCUMENT_S, Estimate, Request, in_words


def score(doc: dict[str, int], results: list[Any]) -> dict[str, Any]:
    best = max(range(len(results)), key=lambda number: results[number])
    return {"acc": float(best == doc["gold"]), "f1": (doc["gold"], best)}


class Clock:
    """Stands still but while a document is scored."""

    def __init__(self, *, document_s: float = 0.0) -> None:
        self.now_s = 0.0
        self.document_s = document_s

    def __call__(self) -> float:
        return self.now_s

    def scorer(self, doc: Any, results: list[Any]) -> dict[str, Any]:
        self.now_s += self.document_s
        return {"acc": 1.0}


def request(
    document: int,
    number: int = 0,
    *,
    task: str = "arc",
    key: bytes | None = None,
    repeat: int = 0,
    result: Callable[[Any], Any] = lambda answer: answer,
) -> Request:
    return Request(
        task=task,
        document=document,
        number=(number, repeat),
        doc={"gold": document % 2},
        key=key if key is not None else f"{task}{document}.{number}.{repeat}".encode(),
        result=result,
    )


def choices(documents: int, *, task: str = "arc") -> Iterator[Request]:
    return (request(d, n, task=task) for d in range(documents) for n in (0, 1))


def answer(estimate: Estimate, document: int, best: int, *, task: str = "arc") -> None:
    for number in (1, 0):
        estimate.answered(f"{task}{document}.{number}.0".encode(), 0.0 if number == best else -1.0)


def test_the_mean_is_of_documents_whose_every_request_is_answered() -> None:
    estimate = Estimate({"arc": score}, Clock())
    estimate.watch(choices(4))
    assert estimate.values() == {}
    answer(estimate, 0, best=0)
    answer(estimate, 2, best=1)
    answer(estimate, 1, best=1)
    estimate.answered(b"arc3.0.0", 0.0)
    assert estimate.values() == {"acc_of_finished": pytest.approx(2 / 3), "finished_documents": 3}


def test_requests_that_are_one_answer_are_answered_together() -> None:
    estimate = Estimate({"arc": score}, Clock())
    estimate.watch([request(document, key=b"same") for document in (0, 2, 4)])
    estimate.answered(b"same", -1.0)
    assert estimate.values() == {"acc_of_finished": 1.0, "finished_documents": 3}


def test_repeats_come_in_their_order_and_as_lm_eval_is_handed_them() -> None:
    seen: list[list[str]] = []

    def remember(doc: Any, results: list[Any]) -> dict[str, Any]:
        seen.append(results)
        return {"exact_match": True}

    estimate = Estimate({"arc": remember}, Clock())
    estimate.watch([request(0, repeat=repeat, result=str.upper) for repeat in range(3)])
    for repeat, text in ((2, "c"), (0, "a"), (1, "b")):
        assert estimate.values() == {}
        estimate.answered(f"arc0.0.{repeat}".encode(), text)
    assert estimate.values() == {"exact_match_of_finished": 1.0, "finished_documents": 1}
    assert seen == [["A", "B", "C"]]


def test_documents_of_other_tasks_are_not_chosen_and_their_answers_passed_over() -> None:
    estimate = Estimate({"arc": score}, Clock())
    assert estimate.chosen([("arc", 1), ("gsm8k", 1), ("arc", 1)]) == {("arc", 1)}
    estimate.watch(choices(2))
    answer(estimate, 0, best=0, task="gsm8k")
    assert estimate.values() == {}


def test_some_documents_are_chosen_and_they_are_the_same_for_every_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DOCUMENTS_MOST", 5)
    documents = [("arc", number) for number in range(50)]
    chosen = Estimate({"arc": score}).chosen(documents)
    assert len(chosen) == 5
    assert chosen < set(documents)
    assert chosen != set(documents[:5])
    assert Estimate({"arc": score}).chosen(reversed(documents)) == chosen


def test_an_update_scores_for_no_longer_than_its_budget_and_the_next_goes_on() -> None:
    """A resumed cell has thousands of answers at once."""
    clock = Clock(document_s=BUDGET_S / 3.5)
    estimate = Estimate({"arc": clock.scorer}, clock)
    estimate.watch([request(document) for document in range(10)])
    for document in range(10):
        estimate.answered(f"arc{document}.0.0".encode(), 0.0)
    assert clock.now_s == 0.0, "taking an answer in scores nothing"
    counts = [estimate.values()["finished_documents"] for _ in range(4)]
    assert counts == [4, 8, 10, 10]


def test_a_document_that_takes_long_ends_the_estimate(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock(document_s=DOCUMENT_S / 10)
    estimate = Estimate({"arc": clock.scorer}, clock)
    estimate.watch([request(document) for document in range(4)])
    estimate.answered(b"arc0.0.0", 0.0)
    assert estimate.values()["finished_documents"] == 1
    clock.document_s = DOCUMENT_S * 1.1
    with caplog.at_level(logging.DEBUG, logger="sweep.evaluating.estimate"):
        for document in (1, 2, 3):
            estimate.answered(b"arc%d.0.0" % document, 0.0)
            assert estimate.values() == {}
    assert clock.now_s == pytest.approx(DOCUMENT_S * 1.2), "only the first of them was tried"
    (said,) = caplog.records
    assert (said.levelname, "arc: a document took 0.055 s to score" in said.message) == ("DEBUG", True)


def test_a_task_that_cannot_score_ends_the_estimate_and_not_the_cell(caplog: pytest.LogCaptureFixture) -> None:
    def broken(doc: Any, results: Any) -> dict[str, Any]:
        raise KeyError("gold")

    estimate = Estimate({"arc": score, "broken": broken}, Clock())
    estimate.watch([*choices(3), *choices(3, task="broken")])
    answer(estimate, 0, best=0)
    assert estimate.values()["finished_documents"] == 1
    with caplog.at_level(logging.DEBUG, logger="sweep.evaluating.estimate"):
        for document in range(3):
            answer(estimate, document, best=0, task="broken")
        answer(estimate, 1, best=0)
        assert estimate.values() == {}
    (said,) = caplog.records
    assert (said.levelname, "broken: KeyError: 'gold'" in said.message) == ("DEBUG", True)
    assert estimate.chosen([("arc", 9)]) == set()


def test_a_terminal_is_told_the_first_of_the_numbers() -> None:
    assert in_words({}) == ""
    live = {"exact_match__strict-match_of_finished": 0.61294, "exact_match__other_of_finished": 1.0}
    assert in_words({**live, "finished_documents": 93.0}) == "exact_match,strict-match 0.613 of 93 done"
