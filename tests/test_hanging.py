"""How long an evaluator may be at one thing, as a table of looks."""

import pytest

from sweep.running.hanging import SLOW_S, Doing, Spells, Verdict

FINE, SLOW, OVER = Verdict.FINE, Verdict.SLOW, Verdict.OVER
LOAD = Doing(what="load a/b", attempt=1, limit_s=1000.0)
AGAIN = Doing(what="load a/b", attempt=2, limit_s=1000.0)
SHORT = Doing(what="leave a/b", limit_s=100.0)


@pytest.mark.parametrize(
    "looks",
    [
        [(0, LOAD, FINE), (SLOW_S, LOAD, FINE), (601, LOAD, SLOW), (602, LOAD, FINE), (1001, LOAD, OVER)],
        [(0, LOAD, FINE), (500, None, FINE), (601, LOAD, FINE), (1200, LOAD, FINE), (1202, LOAD, SLOW)],
        [(0, LOAD, FINE), (601, LOAD, SLOW), (900, AGAIN, FINE), (1501, AGAIN, SLOW), (1901, AGAIN, OVER)],
        [(0, SHORT, FINE), (100, SHORT, FINE), (101, SHORT, OVER)],
    ],
    ids=["spoken of once", "it waited for others meanwhile", "another attempt", "a limit before it is spoken of"],
)
def test_an_evaluator_is_spoken_of_once_and_is_over_at_its_limit(
    looks: list[tuple[float, Doing | None, Verdict]],
) -> None:
    spells = Spells()
    assert [spells.look("one", doing, now_s) for now_s, doing, _ in looks] == [verdict for *_, verdict in looks]


def test_each_evaluator_has_its_own_time_and_one_that_is_gone_has_none() -> None:
    spells = Spells()
    spells.look("one", LOAD, 0)
    spells.look("other", LOAD, 300)
    assert spells.look("one", LOAD, 601) is SLOW
    assert (spells.slow("one"), spells.slow("other")) == (True, False)
    spells.forget("one")
    assert not spells.slow("one")
    assert spells.look("one", LOAD, 2000) is FINE
