"""Evaluators that are at one thing for too long; pure."""

from dataclasses import dataclass
from enum import Enum

SLOW_S = 600.0
"""An evaluator that loads or scores for longer is spoken of, and cells wait no longer for checks of others."""

GIVE_BACK_S = 300.0
"""An evaluator whose cell is over has so long to come back before it is ended. It may be loading data, of which the
next one goes on; all that ending it costs is a start of 8 to 14 s."""

CURES = {
    "load_timeout_s": "if its data is only slow to come, bring it with `fetch` or raise the limit",
    "scoring_timeout_s": "if it is only slow, raise the limit; its answers are kept",
}


@dataclass(frozen=True, kw_only=True)
class Doing:
    """What an evaluator is at without waiting for a server or for answers: nothing but time tells whether it hangs."""

    what: str
    """`load task mmlu`"""
    attempt: int = 0
    """At its cell."""
    limit_s: float
    key: str = ""
    """Of the sweep file, which sets the limit."""


class Verdict(Enum):
    FINE = "fine"
    SLOW = "slow"
    """Seen for the first time to take longer than SLOW_S."""
    OVER = "over"
    """It has taken longer than its limit."""


@dataclass(kw_only=True)
class _Spell:
    doing: Doing
    since_s: float
    slow: bool = False


class Spells:
    """Since when each evaluator has been at what it does, as far as it was looked at."""

    def __init__(self) -> None:
        self._known: dict[str, _Spell] = {}

    def look(self, evaluator: str, doing: Doing | None, now_s: float) -> Verdict:
        """`doing`: None while it waits for others or for work."""
        known = self._known.get(evaluator)
        if doing is None:
            self.forget(evaluator)
        elif known is None or known.doing != doing:
            self._known[evaluator] = _Spell(doing=doing, since_s=now_s)
        elif now_s > known.since_s + doing.limit_s:
            return Verdict.OVER
        elif now_s > known.since_s + SLOW_S and not known.slow:
            known.slow = True
            return Verdict.SLOW
        return Verdict.FINE

    def slow(self, evaluator: str) -> bool:
        return evaluator in self._known and self._known[evaluator].slow

    def forget(self, evaluator: str) -> None:
        self._known.pop(evaluator, None)
