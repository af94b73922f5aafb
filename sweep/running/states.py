"""What the loop knows of each cell, each server and each of a server's lives."""

from dataclasses import dataclass, field

from sweep.evaluating import evaluator as ev
from sweep.evaluating.concurrency import Leases, Load
from sweep.planning.plan import Cell, ServerPlan
from sweep.running.restarts import NEVER_LOST, Restarts
from sweep.serving.server import Endpoint


@dataclass(kw_only=True)
class CellState:
    cell: Cell
    state: str = "checking"
    """checking -> waiting -> running -> done or failed; back to waiting when its evaluator or turn is lost."""
    attempt: int = 0
    """Of this many runs the last: what is heard of an earlier one comes too late."""
    losses: int = 0
    """Evaluators that died at it since its last new answer."""
    errors: Restarts = NEVER_LOST
    """Attempts that ended with an error of the cell's own which may pass."""
    needs_server: bool | None = None
    """None until an evaluator has compared the cell's requests with the stored answers."""
    by_stored_facts: bool = False
    """Its attempt goes by facts of another launch or life, which its server has not borne out."""
    misled: bool = False
    """An attempt failed by such facts: the next one is begun when a server has told its own."""
    evaluator: str | None = None
    progress: ev.CellProgress | None = None
    rate: float = 0.0
    first_answers: tuple[float, int] = (0.0, 0)
    """When the first answers came, and how many; for the rate."""
    told: ev.PoolChanged | None = None
    """What its evaluator was told last of its pool."""
    unreached: dict[str, str] = field(default_factory=dict)
    """Servers that this attempt's evaluator cannot reach, each with the reason."""
    cut_off: set[str] = field(default_factory=set)
    """Nodes from which none could be reached, since its last new answer."""
    loads: bool = False
    """Its evaluator has not asked for stored answers yet."""
    taken_back: bool = False
    """Its evaluator has been told to give it back."""
    expected_s: float = 0.0
    """Of one server of its model alone."""

    @property
    def unfinished(self) -> bool:
        return self.state not in ("done", "failed")

    @property
    def asks(self) -> bool:
        """Its evaluator is at work on it and has requests that are not answered yet."""
        return self.state == "running" and self.progress is not None and not self.answered

    @property
    def answered(self) -> bool:
        """Nothing is left but to score it."""
        return self.progress is not None and self.progress.done >= self.progress.total > 0

    def share(self, *, reused: bool) -> float:
        """How much of its requests is answered, with those that were stored before or without."""
        if self.progress is None or not self.progress.total:
            return 0.0
        return (self.progress.done - (0 if reused else self.progress.reused)) / self.progress.total


@dataclass(kw_only=True)
class Life:
    """One server process."""

    server: str
    nodes: tuple[str, ...] = ()
    started_at_s: float
    """On the runner's clock."""
    endpoint: Endpoint | None = None
    """None while it starts."""
    ready_at_s: float = 0.0
    """Set with the endpoint."""
    finished_cell: bool = False
    """One of its server's cells was finished while it was ready."""
    retiring: bool = False
    """Asked to stop."""
    lost: bool = False
    """Dead, and what is left of it still holds its GPUs."""
    load: Load | None = None
    """Set with the endpoint."""
    leases: Leases = field(default_factory=Leases)
    """Who has how much of its limit."""
    pressure: tuple[int, int] = (0, 0)
    """What its controller was told last."""

    @property
    def state(self) -> str:
        """In a word, for people."""
        if self.lost:
            return "lost"
        if self.retiring:
            return "stopping"
        return "starting" if self.endpoint is None else "ready"


@dataclass(kw_only=True)
class ServerState:
    plan: ServerPlan
    replicas: int | None
    """None: as many as help."""
    started: int = 0
    restarts: Restarts = NEVER_LOST
    concurrency: int | None = None
    """What its last life settled on; None for a number that the config gives."""
    stored_concurrency: int | None = None
    cells: list[CellState] = field(default_factory=list)
    """Of its models, in the order in which they are begun."""
    start_s: float = 0.0
    """What a start is expected to take, then what the last one took."""
    looked_s: float = 0.0
    spent_s: float = 0.0
    """Of its lives' time, while cells asked."""
