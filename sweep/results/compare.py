"""Paired statistics between models."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`model_b` against `model_a` on the same documents."""

    task: str
    metric: str
    filter: str
    higher_is_better: bool | None
    model_a: str
    model_b: str
    n: int
    unpaired: int
    value_a: float
    value_b: float
    difference: float
    stderr: float
    low: float
    high: float
    p: float
    p_adjusted: float
    test: str
    strata: int
    clusters: int | None
    detectable: float
    notes: tuple[str, ...]

    @property
    def verdict(self) -> str:
        if self.p_adjusted >= 0.05 or self.higher_is_better is None:
            return "no difference shown"
        return "better" if (self.difference > 0) == self.higher_is_better else "worse"


def leaders(comparisons: Sequence[Comparison]) -> dict[tuple[str, str, str], tuple[str, ...]]:
    """(task, metric, filter) -> the models that no other is shown to be better than."""
    found: dict[tuple[str, str, str], dict[str, bool]] = {}
    for c in comparisons:
        of = found.setdefault((c.task, c.metric, c.filter), {})
        of[c.model_a] = of.get(c.model_a, True) and c.verdict != "better"
        of[c.model_b] = of.get(c.model_b, True) and c.verdict != "worse"
    return {key: tuple(m for m, leads in of.items() if leads) for key, of in found.items()}
