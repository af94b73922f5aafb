"""When something that died may start again, and when it has died too often. Pure: no clock of its own.

The same policy for servers and evaluators. What is lost comes back after a pause that doubles, up to LOSSES_MOST losses
in a row; a life that was healthy begins a new row.
"""

import math
from dataclasses import dataclass

BACKOFF_S = 1.0
"""Pause after the first loss in a row, doubled with each further one: 1, 2, 4 and 8 s. A single crash then costs next
to nothing beside a start of half a minute to ten, and a hub or file system that is out for a minute or two is outlasted
by the pauses and the starts between them."""

LOSSES_MOST = 5
"""In a row: so many starts of a large model hold its GPUs for up to an hour, and what failed five times is no
accident."""

HEALTHY_S = 300.0
"""A server that was ready for so long is no crash loop, even when none of its cells was finished meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Restarts:
    """The losses in a row of one server or one evaluator."""

    losses: int = 0
    not_before_s: float = -math.inf
    """When the next start is due, on the clock of who calls."""

    def lost(
        self, now_s: float, *, started_s: float = math.inf, healthy: bool = False, counts: bool = True
    ) -> "Restarts":
        """After one more loss or passing start failure; after a `healthy` life it is the first in a row.

        One that does not count, since the infrastructure took the life, makes the next start wait and no row longer.

        A life that was started before the rest after the last loss (`started_s`) adds none: replicas that one outage
        takes are lost once.
        """
        if started_s < self.not_before_s and not healthy:
            return self
        losses = (0 if healthy else self.losses) + counts
        return Restarts(losses=losses, not_before_s=now_s + BACKOFF_S * 2 ** max(0, losses - 1))

    def rest_s(self, now_s: float) -> float:
        """How long the next start still has to wait, 0 when it is due."""
        return max(0.0, self.not_before_s - now_s)

    @property
    def exhausted(self) -> bool:
        """No further start."""
        return self.losses >= LOSSES_MOST


NEVER_LOST = Restarts()


def healthy(*, ready_s: float, hang_timeout_s: float, finished_cell: bool) -> bool:
    """Whether a server's life that lasted `ready_s` after it was ready ends a row of losses.

    A hung server is found out after `hang_timeout_s` of doing nothing, and that time must not count: a server that
    hangs at its first request would otherwise be started for ever.
    """
    return finished_cell or ready_s >= hang_timeout_s + HEALTHY_S
