"""Which failures cost a cell, and which the rest of a model or of the sweep. Pure: no clock of its own."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class GivenUp:
    """What has no further cell to run."""

    model: str | None
    """None for the whole sweep."""
    reason: str


@dataclass(kw_only=True)
class Failures:
    """The failed cells of a launch against `max_failures`."""

    most: int | None
    """Of the sweep."""
    most_by_model: Mapping[str, int | None]
    _by_model: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Failed cells, in words."""

    def add(self, model: str, cell: str, error: str) -> list[GivenUp]:
        """Count a failed cell; what is given up by it, once each."""
        self._by_model[model].append(f"{cell}: {error.splitlines()[0]}")
        mine, most = self._by_model[model], self.most_by_model.get(model)
        found = []
        if most is not None and len(mine) == most:
            found.append(GivenUp(model=model, reason=_reason(f"{model} is", mine, f"models.{model}.max_failures")))
        everything = [words for each in self._by_model.values() for words in each]
        if self.most is not None and len(everything) == self.most:
            found.append(GivenUp(model=None, reason=_reason("the sweep is", everything, "max_failures")))
        return found


def _reason(what: str, failed: list[str], key: str) -> str:
    cells = "1 cell has" if len(failed) == 1 else f"{len(failed)} cells have"
    return f"given up: {cells} failed, after which {what} (`{key}: {len(failed)}`); the last: {failed[-1]}"
