"""What a server says of itself at /metrics -> a frozen snapshot.

The names are vLLM's, and an engine that has others gets no snapshot. The watch reads it to see whether a busy server
still computes. Knows no connection: the text comes from `server.py`.
"""

from collections import defaultdict
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

_NAMES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_cache_use": "vllm:kv_cache_usage_perc",
    "preemptions": "vllm:num_preemptions_total",
    "prompt_tokens": "vllm:prompt_tokens_total",
    "generation_tokens": "vllm:generation_tokens_total",
    "finished": "vllm:request_success_total",
}
"""Field -> sample. All of them are in vLLM 0.32 on every device, unless `disable_log_stats` is set."""

_SHOWN = {"looked_up_tokens": "vllm:prefix_cache_queries_total", "cached_tokens": "vllm:prefix_cache_hits_total"}
"""The same for what is only shown, so that a server without is no worse."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One look at a server. vLLM writes it after every step of its engine: a step that hangs leaves the last one."""

    running: int
    """Requests in the batch."""
    waiting: int
    """Requests in the queue, preempted ones among them."""
    kv_cache_use: float
    """Share of the KV cache that requests hold, 0 to 1; of the fullest engine where there are several."""
    preemptions: int
    """Since the start, as all that follows: how often a running request gave up its KV cache to others."""
    prompt_tokens: int
    """Of prompts that are through, cached tokens included."""
    generation_tokens: int
    finished: int
    """Requests that were answered, to the end or with an error; not those whose client had gone."""
    looked_up_tokens: int = 0
    """Of prompts, for which the prefix cache was asked."""
    cached_tokens: int = 0
    """That it had."""


def snapshot(text: str) -> Snapshot:
    """The figures in the text of /metrics, summed over engines. Raises ValueError that names what it lacks."""
    names = (*_NAMES.values(), *_SHOWN.values())
    # Of 600 lines, most of them buckets; reading only ours takes 0.6 ms instead of 40.
    ours = "\n".join(line for line in text.splitlines() if line.startswith(names))
    found: dict[str, list[float]] = defaultdict(list)
    for family in text_string_to_metric_families(ours + "\n"):
        for sample in family.samples:
            found[sample.name].append(sample.value)
    if missing := [name for name in _NAMES.values() if name not in found]:
        raise ValueError(f"/metrics has no {', '.join(missing)}")
    counts = {field: int(sum(found[name])) for field, name in (_NAMES | _SHOWN).items() if field != "kv_cache_use"}
    return Snapshot(kv_cache_use=max(found[_NAMES["kv_cache_use"]]), **counts)
