import pytest

from sweep.planning.config import Expectation, Model, Task
from sweep.record import Record, Score, Status
from sweep.results.expectations import check


def score(task: str, value: float, metric: str = "acc", depth: int = 0) -> Score:
    return Score(
        task=task,
        version="1",
        filter="none",
        num_fewshot=0,
        metric=metric,
        value=value,
        stderr=0.01,
        higher_is_better=True,
        samples=10,
        depth=depth,
    )


def record(status: Status = Status.DONE) -> Record:
    scores = (score("mmlu", 0.7), score("mmlu_anatomy", 0.5, depth=1))
    return Record(model="m", task="mmlu", fingerprint="f", status=status, scores=scores if status == "done" else ())


def said(name: str, value: float, tolerance: float, **of_model: Expectation) -> tuple[bool, str]:
    task = Task(task="mmlu", expect={name: Expectation(value=value, tolerance=tolerance)})
    (one,) = check({"m": Model(expect={"mmlu": of_model})}, {"mmlu": task}, [record()])
    return one.met, one.said


@pytest.mark.parametrize("name", ["acc", "acc,none", "mmlu/acc", "mmlu/acc,none"])
def test_a_number_is_met_up_to_its_tolerance_by_any_of_its_names(name: str) -> None:
    assert said(name, 0.72, 0.02)[0]  # 0.72 - 0.7 is a little more than 0.02 in binary fractions
    assert said(name, 0.68, 0.02)[0]
    assert not said(name, 0.73, 0.02)[0]


def test_a_subtask_has_a_name_of_its_own() -> None:
    assert said("mmlu_anatomy/acc", 0.5, 0) == (True, "m/mmlu: mmlu_anatomy/acc is 0.5000, as expected: 0.5 ± 0")


def test_what_is_missed_is_said_with_how_far_and_how_sure() -> None:
    assert said("acc", 0.8, 0.05) == (
        False,
        "m/mmlu: acc is 0.7000, not expected: 0.8 ± 0.05 (-0.1000; its standard error is 0.0100)",
    )


def test_a_number_that_is_not_there_is_missed_and_the_others_are_named() -> None:
    met, text = said("em", 0.8, 0.05)
    assert not met
    assert "cannot be checked against 0.8 ± 0.05: there is no such number, only acc,none; did you mean" in text


def test_what_a_model_says_of_itself_replaces_what_its_task_says_of_all() -> None:
    assert said("acc", 0.1, 0.0, acc=Expectation(value=0.7, tolerance=0.0))[0]


def test_a_cell_that_is_not_done_is_not_checked() -> None:
    task = Task(task="mmlu", expect={"acc": Expectation(value=0, tolerance=0)})
    assert check({"m": Model()}, {"mmlu": task}, [record(Status.FAILED)]) == ()
