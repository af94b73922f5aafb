"""A claim about speed, what was measured of it, and the JSON line that says so."""

import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

ROUNDS = 3
"""Fewest runs of each side that a median is taken of."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table of claims."""

    row: str
    """What is compared with what."""
    ratio: float
    """The other side's figure over ours: above 1 we are better."""
    bar: float
    """What the ratio must reach."""
    medians: Mapping[str, float]
    """The raw figures; each name carries its unit."""

    @property
    def holds(self) -> bool:
        return self.ratio >= self.bar

    def line(self) -> str:
        """One line of JSON."""
        figures = {name: round(value, 6) for name, value in self.medians.items()}
        measured = {"ratio": round(self.ratio, 3), "bar": self.bar, "holds": self.holds}
        return json.dumps({"row": self.row, **measured, "medians": figures}, ensure_ascii=False)


def in_turn(sides: Mapping[str, T], number: int) -> list[tuple[str, T]]:
    """The sides in the order of this round: each is the first one in its turn."""
    some = list(sides.items())
    first = number % len(some)
    return some[first:] + some[:first]


def alternately(sides: Mapping[str, Callable[[], object]], *, rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each side. The sides take turns, so that what else the machine does falls on all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, run in in_turn(sides, number):
            gc.collect()  # nobody pays for what the one before left
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(some) for name, some in seconds.items()}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of a table of figures that are compared with a number, not with another side."""

    row: str
    """What was measured; it carries the unit."""
    value: float
    bar: float
    at_most: bool
    """Whether the bar is an upper bound."""
    seen: Mapping[str, float]
    """What else was measured; each name carries its unit."""

    @property
    def holds(self) -> bool:
        return self.value <= self.bar if self.at_most else self.value >= self.bar

    def line(self) -> str:
        """One line of JSON."""
        figures = {name: round(value, 3) for name, value in self.seen.items()}
        measured = {"value": round(self.value, 3), "bar": self.bar, "holds": self.holds}
        return json.dumps({"row": self.row, **measured, "seen": figures}, ensure_ascii=False)
