"""Reading what vLLM 0.32 writes at /metrics."""

import pytest

from sweep.serving.metrics import Snapshot, snapshot

TEXT = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 7.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 3.0
# HELP vllm:num_requests_waiting_by_reason Number of waiting requests by reason.
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="deferred"} 1.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
# HELP vllm:num_preemptions_total Cumulative number of preemption from the engine.
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0",model_name="m"} 4.0
# HELP vllm:num_preemptions_created Cumulative number of preemption from the engine.
# TYPE vllm:num_preemptions_created gauge
vllm:num_preemptions_created{engine="0",model_name="m"} 1.7954047242592266e+09
# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="m"} 1059.0
# TYPE vllm:prompt_tokens_cached_total counter
vllm:prompt_tokens_cached_total{engine="0",model_name="m"} 13.0
# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="m"} 6177.0
# HELP vllm:request_success_total Count of successfully processed requests.
# TYPE vllm:request_success_total counter
vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 5.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 6.0
vllm:request_success_total{engine="0",finished_reason="abort",model_name="m"} 0.0
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 900.0
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 13.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="m"} 0.0
"""


def test_the_figures_are_read_and_their_namesakes_are_not() -> None:
    assert snapshot(TEXT) == Snapshot(
        running=7,
        waiting=3,
        kv_cache_use=0.25,
        preemptions=4,
        prompt_tokens=1059,
        generation_tokens=6177,
        finished=11,
        looked_up_tokens=900,
        cached_tokens=13,
    )


def test_a_server_that_tells_nothing_of_its_prefix_cache_is_as_good() -> None:
    seen = snapshot("".join(f"{line}\n" for line in TEXT.splitlines() if "prefix_cache" not in line))
    assert (seen.running, seen.looked_up_tokens, seen.cached_tokens) == (7, 0, 0)


def test_several_engines_are_summed_and_the_fullest_counts() -> None:
    second = "".join(
        line + "\n" for line in TEXT.replace('engine="0"', 'engine="1"').splitlines() if not line.startswith("#")
    ).replace(" 0.25", " 0.75")
    both = snapshot(TEXT + second)
    assert (both.running, both.waiting, both.prompt_tokens, both.finished) == (14, 6, 2118, 22)
    assert both.kv_cache_use == 0.75


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match=r"/metrics has no vllm:prompt_tokens_total$"):
        snapshot("\n".join(line for line in TEXT.splitlines() if not line.startswith("vllm:prompt_tokens_total")))
    with pytest.raises(ValueError, match="vllm:num_requests_running, vllm:num_requests_waiting, "):
        snapshot("process_open_fds 12.0\n")
