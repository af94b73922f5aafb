"""When a server that runs counts as dead, as tables: no server, no clock."""

from dataclasses import replace

import pytest

from sweep.serving.metrics import Snapshot
from sweep.serving.watch import Watch

IDLE = Snapshot(running=0, waiting=0, kv_cache_use=0.0, preemptions=0, prompt_tokens=9, generation_tokens=9, finished=9)
BUSY = replace(IDLE, running=3, waiting=2, kv_cache_use=0.5)


def looks(
    watch: Watch,
    times: int,
    seen: Snapshot | None,
    *,
    fault: str | None = None,
    asked: bool = False,
    each_s: float = 2,
    computed_s: float = 0.0,
) -> str | None:
    """The first verdict in so many equal looks."""
    for _ in range(times):
        if verdict := watch.look(fault=fault, seen=seen, asked=asked, elapsed_s=each_s, computed_s=computed_s):
            return verdict
    return None


def test_a_server_that_answers_and_has_nothing_to_do_may_be_still_for_ever() -> None:
    assert looks(Watch(600), 10_000, IDLE) is None


def test_a_busy_server_whose_figures_stand_still_for_the_time_set_counts_as_hung() -> None:
    watch = Watch(600)
    assert looks(watch, 300, BUSY) is None
    assert looks(watch, 1, BUSY) == (
        "hung: it has 3 running and 2 waiting requests, and nothing moved for 600 s (hang_timeout_s = 600)"
    )


@pytest.mark.parametrize("waits", [replace(IDLE, waiting=1), replace(IDLE, running=1)])
def test_one_request_is_enough(waits: Snapshot) -> None:
    assert looks(Watch(600), 301, waits)


@pytest.mark.parametrize(
    "moved",
    [
        {"prompt_tokens": 10},
        {"generation_tokens": 10},
        {"finished": 10},
        {"preemptions": 1},
        # A long prompt that is computed in pieces shows nowhere else.
        {"kv_cache_use": 0.51},
    ],
    ids=lambda moved: next(iter(moved)),
)
def test_any_figure_that_moves_starts_the_time_anew(moved: dict[str, float]) -> None:
    watch = Watch(600)
    assert looks(watch, 300, BUSY) is None
    after = replace(BUSY, **moved)
    assert looks(watch, 300, after) is None
    assert looks(watch, 1, after)


def test_clients_that_come_and_go_are_no_motion() -> None:
    watch = Watch(600)
    assert any(looks(watch, 1, replace(BUSY, running=n % 5, waiting=n % 7)) for n in range(310))


def test_an_engine_that_shows_itself_idle_is_hung_when_it_owes_an_answer_to_us() -> None:
    watch = Watch(600)
    assert looks(watch, 150, IDLE) is None
    assert not watch.doubtful
    assert looks(watch, 1, IDLE) is None
    assert watch.doubtful
    assert looks(watch, 149, IDLE, asked=True) is None
    assert looks(watch, 1, IDLE, asked=True) == (
        "hung: it owes the answer to a request for one token, and nothing moved for 600 s (hang_timeout_s = 600)"
    )


def test_the_answer_to_us_is_motion() -> None:
    watch = Watch(600)
    looks(watch, 151, IDLE)
    assert watch.doubtful
    looks(watch, 1, replace(IDLE, finished=10))
    assert not watch.doubtful


def test_a_server_that_is_silent_for_a_tenth_of_the_time_counts_as_dead() -> None:
    watch = Watch(600)
    assert looks(watch, 29, None, fault="/health gave TimeoutError: timed out") is None
    assert looks(watch, 1, None, fault="/health gave TimeoutError: timed out") == (
        "was silent for 60 s, the last time /health gave TimeoutError: timed out (a tenth of hang_timeout_s = 600)"
    )


def test_one_answer_ends_a_silence() -> None:
    watch = Watch(600)
    assert looks(watch, 29, None, fault="/health answered 503") is None
    assert looks(watch, 1, BUSY) is None
    assert looks(watch, 29, None, fault="/health answered 503") is None


def test_a_silent_server_whose_api_server_computes_has_all_of_the_time() -> None:
    watch = Watch(600)
    assert looks(watch, 299, None, fault="/health gave TimeoutError: timed out", computed_s=1.9) is None
    assert looks(watch, 2, None, fault="/health gave TimeoutError: timed out", computed_s=1.9) == (
        "was silent for 600 s though its API server computes, the last time /health gave TimeoutError: timed out "
        "(hang_timeout_s = 600)"
    )


def test_a_silent_server_that_stops_computing_has_a_tenth_of_the_time_that_is_left() -> None:
    watch = Watch(600)
    assert looks(watch, 150, None, fault="x", computed_s=1.0) is None
    assert looks(watch, 14, None, fault="x", computed_s=0.9) is None
    assert looks(watch, 2, None, fault="x", computed_s=0.9)


def test_figures_that_are_not_understood_are_no_proof_of_anything() -> None:
    assert looks(Watch(600), 10_000, None) is None


@pytest.mark.parametrize("hang_timeout_s", [600, 20, 0.5])
def test_a_machine_that_was_suspended_is_no_silent_server(hang_timeout_s: float) -> None:
    """An hour between two looks counts for no more than a look takes."""
    watch = Watch(hang_timeout_s)
    assert looks(watch, 3, None, fault="ConnectionRefusedError", each_s=3600) is None
    assert looks(watch, 1, BUSY, each_s=3600) is None
    assert looks(watch, 10, BUSY, each_s=3600) is None


@pytest.mark.parametrize("hang_timeout_s", [600, 20, 0.5])
def test_several_looks_must_fail_whatever_the_setting(hang_timeout_s: float) -> None:
    watch = Watch(hang_timeout_s)
    failed = 0
    while not watch.look(fault="x", seen=None, asked=False, elapsed_s=watch.period_s + watch.answer_timeout_s):
        failed += 1
    assert failed >= 3
    assert watch.period_s <= 2
