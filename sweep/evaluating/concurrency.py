"""How many requests may be in flight at a server, and how evaluators share that number. Pure."""

from collections.abc import Sequence

GPU_BATCH = 256
"""Sequences that vLLM batches by default on a data-centre GPU."""

CPU_BATCH = 32
"""A few dozen sequences saturate the cores; more only lengthen each answer's latency."""

AHEAD = 1.25
"""A quarter more than one batch in flight, so that the server never waits for the next request."""


def automatic_limit(*, max_num_seqs: int | str | None, on_cpu: bool) -> int:
    """Requests in flight at one server for `concurrency: auto`: one batch of it and a quarter more.

    `max_num_seqs` is vLLM's option as the config has it, which may be quoted.
    """
    return int(int(max_num_seqs or (CPU_BATCH if on_cpu else GPU_BATCH)) * AHEAD)


def shares(limit: int, demands: Sequence[int]) -> list[int]:
    """`limit` split among evaluators by how many requests each could have in flight.

    The sum never exceeds `limit`, nobody gets more than it demands, and what one leaves goes to the others.
    """
    given = [0] * len(demands)
    left = limit
    while left > 0 and (hungry := [i for i, demand in enumerate(demands) if given[i] < demand]):
        each = max(1, left // len(hungry))
        for i in hungry:
            take = min(each, demands[i] - given[i], left)
            given[i] += take
            left -= take
    return given
