"""Room for evaluators on the nodes, and which of it is to be filled. Pure: no clock of its own."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sweep.running.inventory import Node
from sweep.running.restarts import NEVER_LOST, Restarts


@dataclass(kw_only=True)
class Seat:
    """Room for one evaluator."""

    node: str
    evaluator: str | None = None
    """None while it rests."""
    restarts: Restarts = NEVER_LOST


class Seats:
    """The seats of a launch. They follow the nodes: who joins brings some, and those of a node that has left are gone
    with their evaluators."""

    def __init__(self) -> None:
        self._seats: list[Seat] = []
        self._given_up: Counter[str] = Counter()
        """By node, where evaluators died one after the other."""

    def __len__(self) -> int:
        return len(self._seats)

    def due(self, nodes: Sequence[Node], most: int, now_s: float) -> list[Seat]:
        """The seats that want an evaluator now, `most` with one at a time; spread over the nodes, in their order."""
        here = {node.name for node in nodes}
        self._seats = [seat for seat in self._seats if seat.evaluator is not None or seat.node in here]
        taken = Counter(seat.node for seat in self._seats) + self._given_up
        while len(self._seats) < most:
            free = [node for node in nodes if taken[node.name] < node.evaluators]
            if not free:
                break
            node = min(free, key=lambda node: taken[node.name])
            taken[node.name] += 1
            self._seats.append(Seat(node=node.name))
        return [seat for seat in self._seats if seat.evaluator is None and not seat.restarts.rest_s(now_s)]

    def of(self, evaluator: str) -> Seat | None:
        return next((seat for seat in self._seats if seat.evaluator == evaluator), None)

    def node_of(self, evaluator: str) -> str:
        return seat.node if (seat := self.of(evaluator)) is not None else ""

    def elsewhere(self, evaluators: Sequence[str], nodes: Collection[str]) -> list[str]:
        """Those of the evaluators that are on none of these nodes; all of them where there is no seat but on these."""
        there = {seat.evaluator for seat in self._seats if seat.node not in nodes}
        return [name for name in evaluators if name in there] if there else [*evaluators]

    def give_up(self, seat: Seat) -> None:
        self._seats.remove(seat)
        self._given_up[seat.node] += 1

    def idle(self, work: Mapping[str, str | None], nodes: Sequence[Node]) -> list[str]:
        """The evaluators that may get work: they have none, and their node answers."""
        here = {node.name for node in nodes}
        there = [seat.evaluator for seat in self._seats if seat.evaluator is not None and seat.node in here]
        return [evaluator for evaluator in there if work.get(evaluator, "") is None]
