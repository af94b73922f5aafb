"""When failed cells end the rest."""

from sweep.running.failures import Failures


def given_up(failures: Failures, *cells: str) -> list[list[str | None]]:
    """What each failed cell (`model/task`) gives up."""
    return [[each.model for each in failures.add(cell.split("/")[0], cell, "it broke\nand more")] for cell in cells]


def test_without_limits_cells_fail_on_their_own() -> None:
    failures = Failures(most=None, most_by_model={})
    assert given_up(failures, *(f"m/t{number}" for number in range(50))) == [[]] * 50


def test_a_model_is_given_up_once_after_its_own_failures() -> None:
    failures = Failures(most=None, most_by_model={"m": 2, "n": None})
    assert given_up(failures, "n/a", "m/a", "n/b", "m/b", "m/c") == [[], [], [], ["m"], []]


def test_the_sweep_is_given_up_after_the_failures_of_all_models() -> None:
    failures = Failures(most=3, most_by_model={"m": 2})
    assert given_up(failures, "m/a", "n/a") == [[], []]
    assert given_up(failures, "m/b", "n/b") == [["m", None], []]


def test_the_reason_says_how_many_which_key_and_what_came_last() -> None:
    failures = Failures(most=1, most_by_model={"m": 2})
    (sweep,) = failures.add("m", "m/a", "no data\ntraceback")
    assert (
        sweep.reason
        == "given up: 1 cell has failed, after which the sweep is (`max_failures: 1`); the last: m/a: no data"
    )
    (model,) = failures.add("m", "m/b", "no memory")
    assert model.reason == (
        "given up: 2 cells have failed, after which m is (`models.m.max_failures: 2`); the last: m/b: no memory"
    )
