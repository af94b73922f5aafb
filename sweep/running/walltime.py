"""When a launch has to be over, and what still pays before that; pure.

Every answer is kept the moment it comes, so work that is broken off loses nothing but the loading before it: a start
pays when it leaves as much time for work as it takes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

CELL_START_S = 15.0
"""A warm evaluator loads a task's data and builds its requests in about so long."""

LEAVE_S = 60.0
"""Before the end everything is stopped: servers within 20 s, then W&B takes what it can, and the tables are written."""


@dataclass(frozen=True, kw_only=True)
class Walltime:
    end_s: float = math.inf
    """On the clock whose `now_s` the methods are given; infinite where nothing ends the launch."""

    def left_s(self, now_s: float) -> float:
        """For work; what comes after it has its own time."""
        return self.end_s - LEAVE_S - now_s

    def over(self, now_s: float) -> bool:
        return self.left_s(now_s) <= 0

    def pays(self, start_s: float, now_s: float) -> bool:
        """Whether a start of this length leaves as much for work; when it once does not, it never will again."""
        return self.left_s(now_s) >= 2 * start_s


UNLIMITED = Walltime()


def ends_at(walltime_s: float | None, environment: Mapping[str, str], *, began_s: float, now_s: float) -> float:
    """The earlier end of the sweep's own and of the Slurm job that this is a part of; infinite without either.

    All are Unix times. An end that Slurm has set and that is past is of a job that is over, whose variables live on in
    some shell.
    """
    own = math.inf if walltime_s is None else began_s + walltime_s
    said = environment.get("SLURM_JOB_END_TIME", "")
    slurm = float(said) if said.isdecimal() and float(said) > now_s else math.inf
    return min(own, slurm)
