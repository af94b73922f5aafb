"""How a server's limit is found and shared."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweep.evaluating.concurrency import automatic_limit, shares


@pytest.mark.parametrize(
    ("max_num_seqs", "on_cpu", "limit"),
    [(None, False, 320), (None, True, 40), (64, False, 80), (64, True, 80), (1, True, 1)],
)
def test_the_automatic_limit_is_one_batch_of_the_server_and_a_quarter(
    max_num_seqs: int | None, on_cpu: bool, limit: int
) -> None:
    assert automatic_limit(max_num_seqs=max_num_seqs, on_cpu=on_cpu) == limit


@pytest.mark.parametrize(
    ("limit", "demands", "expected"),
    [
        (10, [], []),
        (10, [10], [10]),
        (10, [10, 10], [5, 5]),
        (10, [2, 10], [2, 8]),
        (10, [10, 0, 1], [9, 0, 1]),
        (10, [3, 3], [3, 3]),
        (1, [5, 5], [1, 0]),
        (11, [20, 20], [6, 5]),
        (0, [5], [0]),
    ],
)
def test_what_one_evaluator_leaves_goes_to_the_others(limit: int, demands: list[int], expected: list[int]) -> None:
    assert shares(limit, demands) == expected


@given(st.integers(0, 600), st.lists(st.integers(0, 400), max_size=12))
def test_shares_use_the_whole_limit_and_exceed_neither_it_nor_any_demand(limit: int, demands: list[int]) -> None:
    given_out = shares(limit, demands)
    assert sum(given_out) == min(limit, sum(demands))
    assert all(share <= demand for share, demand in zip(given_out, demands, strict=True))


@given(st.integers(1, 600), st.integers(1, 12))
def test_equal_demands_get_shares_that_differ_by_one_at_most(limit: int, count: int) -> None:
    given_out = shares(limit, [limit] * count)
    assert max(given_out) - min(given_out) <= 1
