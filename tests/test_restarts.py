"""The policy of restarts as tables."""

import pytest

from sweep.running.restarts import BACKOFF_S, HEALTHY_S, LOSSES_MOST, NEVER_LOST, Restarts, healthy


def after(*lives: bool, start_s: float = 100.0) -> Restarts:
    """What is known after lives that were healthy or not, each lost the moment it was started again."""
    known, now = NEVER_LOST, start_s
    for was_healthy in lives:
        known = known.lost(now, healthy=was_healthy)
        now = known.not_before_s
    return known


@pytest.mark.parametrize(
    ("lives", "losses", "pause_s"),
    [
        ([False], 1, 1),
        ([False, False], 2, 2),
        ([False, False, False], 3, 4),
        ([False, False, False, False], 4, 8),
        ([True], 1, 1),
        ([False, False, True], 1, 1),
        ([False, False, True, False], 2, 2),
    ],
)
def test_the_pause_doubles_with_each_loss_in_a_row_and_a_healthy_life_begins_a_new_row(
    lives: list[bool], losses: int, pause_s: float
) -> None:
    known = after(*lives)
    assert known.losses == losses
    assert not known.exhausted
    lost_at = known.not_before_s - pause_s
    assert lost_at == (100.0 if len(lives) == 1 else after(*lives[:-1]).not_before_s)


@pytest.mark.parametrize(("later_s", "rest_s"), [(0, BACKOFF_S), (0.25, BACKOFF_S - 0.25), (BACKOFF_S, 0), (99, 0)])
def test_a_rest_runs_out(later_s: float, rest_s: float) -> None:
    assert NEVER_LOST.lost(7.0).rest_s(7.0 + later_s) == pytest.approx(rest_s)


def test_what_one_outage_takes_is_lost_once() -> None:
    known = NEVER_LOST.lost(10.0, started_s=0.0)
    together = known.lost(10.1, started_s=0.0).lost(10.9, started_s=10.0 + BACKOFF_S / 2)
    assert together == known
    assert known.lost(20.0, started_s=10.0 + BACKOFF_S).losses == 2
    assert known.lost(11.0, started_s=0.0, healthy=True).losses == 1


def test_what_the_infrastructure_takes_rests_and_makes_no_row_longer() -> None:
    known = after(False, False)
    taken = known.lost(200.0, counts=False).lost(300.0, counts=False)
    assert (taken.losses, taken.rest_s(300.0)) == (2, BACKOFF_S * 2)
    assert NEVER_LOST.lost(7.0, counts=False).rest_s(7.0) == BACKOFF_S
    assert known.lost(200.0, healthy=True, counts=False).losses == 0


def test_what_was_never_lost_starts_at_once() -> None:
    assert NEVER_LOST.rest_s(0.0) == 0


@pytest.mark.parametrize(
    ("lives", "exhausted"),
    [
        ([False] * (LOSSES_MOST - 1), False),
        ([False] * LOSSES_MOST, True),
        ([False] * (LOSSES_MOST - 1) + [True], False),
        ([True] * 100, False),
        ([True] + [False] * (LOSSES_MOST - 1), True),
    ],
)
def test_losses_in_a_row_have_a_limit(lives: list[bool], exhausted: bool) -> None:
    assert after(*lives).exhausted is exhausted


@pytest.mark.parametrize(
    ("ready_s", "hang_timeout_s", "finished_cell", "expected"),
    [
        (0, 600, False, False),
        (0, 600, True, True),
        (HEALTHY_S, 600, False, False),
        (599 + HEALTHY_S, 600, False, False),
        (600 + HEALTHY_S, 600, False, True),
        (HEALTHY_S + 1, 1, False, True),
    ],
    ids=["died at once", "finished a cell", "may have hung", "almost", "long enough", "short timeout"],
)
def test_a_life_is_healthy_that_finished_a_cell_or_computed_for_long(
    ready_s: float, hang_timeout_s: float, finished_cell: bool, expected: bool
) -> None:
    assert healthy(ready_s=ready_s, hang_timeout_s=hang_timeout_s, finished_cell=finished_cell) is expected


def test_a_server_that_hangs_at_every_first_request_comes_to_the_limit() -> None:
    known, now = NEVER_LOST, 0.0
    for _ in range(LOSSES_MOST):
        assert not known.exhausted
        ready_s = 600.0 + 60.0  # a minute until the first request came
        known = known.lost(now + ready_s, healthy=healthy(ready_s=ready_s, hang_timeout_s=600.0, finished_cell=False))
        now = known.not_before_s
    assert known.exhausted
