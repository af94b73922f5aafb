"""When a server that runs counts as dead all the same: it is silent, or it has requests and computes nothing. Pure.

Silence is counted by looks, each for no more than a look can take: after a machine was suspended, or the thread that
looks was starved, one look of an hour is one look. `server.py` does the looking.
"""

from sweep.serving.metrics import Snapshot

SILENT_SHARE = 0.1
"""/health is answered by the API server at once whatever the engine does, so a tenth of the patience is plenty. One
that computes is only late, and has all of it: turning 512 echoed prompts into JSON kept one from answering for 66 s."""

BUSY_SHARE = 0.5
"""Of a core: an API server that uses more, or would if it had one, computes."""

PERIOD_S = 2.0
LOOKS_LEAST = 4
"""Looks that must fail in a row, whatever the settings: a single one may fail because of us."""


class Watch:
    """Judges one server from its first look on."""

    def __init__(self, hang_timeout_s: float) -> None:
        self.hang_timeout_s = hang_timeout_s
        self.silent_timeout_s = SILENT_SHARE * hang_timeout_s
        self.answer_timeout_s = self.silent_timeout_s / LOOKS_LEAST / 2
        """How long one look may wait for each answer."""
        self.period_s = min(PERIOD_S, self.answer_timeout_s)
        self._silent_s = 0.0
        self._spent_s = 0.0
        """Of the patience with a silence."""
        self._still_s = 0.0
        self._done: tuple[float, ...] | None = None

    @property
    def doubtful(self) -> bool:
        """Nothing has moved for half of the patience. It may just have nothing to do: a request of ours would tell."""
        return self._still_s >= self.hang_timeout_s / 2

    def look(
        self, *, fault: str | None, seen: Snapshot | None, asked: bool, elapsed_s: float, computed_s: float = 0.0
    ) -> str | None:
        """Why the server counts as dead, None while it does not.

        `fault` is what was wrong with the answer of /health or /metrics, `seen` what the latter told (None: nothing
        that we understand, then only silence counts), `asked` whether a request of ours is unanswered, `elapsed_s` the
        time since the look before, `computed_s` the processor time that its API server used or waited for in it.
        """
        if fault:
            silent_s = min(elapsed_s, self.period_s + self.answer_timeout_s)
            computes = computed_s >= BUSY_SHARE * elapsed_s > 0
            self._silent_s += silent_s
            self._spent_s += silent_s * (SILENT_SHARE if computes else 1.0)
            if self._spent_s < self.silent_timeout_s:
                return None
            but = " though its API server computes" if computes else ""
            return (
                f"was silent for {self._silent_s:.3g} s{but}, the last time {fault} "
                f"({'' if computes else 'a tenth of '}hang_timeout_s = {self.hang_timeout_s:g})"
            )
        self._silent_s = self._spent_s = 0.0
        if seen is None:
            return None
        # Not the requests themselves: clients that give up and come again would look like motion.
        done = (seen.prompt_tokens, seen.generation_tokens, seen.finished, seen.preemptions, seen.kv_cache_use)
        if done != self._done:
            self._done, self._still_s = done, 0.0
            return None
        self._still_s += min(elapsed_s, self.period_s + 2 * self.answer_timeout_s)
        if self._still_s < self.hang_timeout_s or not (seen.running or seen.waiting or asked):
            return None
        # A first step that hangs was never reported: the engine still shows itself idle, and only ours is missing.
        has = f"has {seen.running} running and {seen.waiting} waiting requests" if seen.running or seen.waiting else ""
        ours = "owes the answer to a request for one token" if asked else ""
        return (
            f"hung: it {' and '.join(filter(None, (has, ours)))}, and nothing moved for {self._still_s:.3g} s "
            f"(hang_timeout_s = {self.hang_timeout_s:g})"
        )
