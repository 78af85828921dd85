"""The names, types, labels and buckets of vLLM 0.32, as it tells them, and what stands behind each of them here."""

from __future__ import annotations

import pytest

from server.observability.metrics import ServerMetrics
from tests.observability.events import BUSY_STEP, record_answer
from tests.observability.scrape import families, values

FIRST_TOKEN = (
    "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0 160.0 640.0 2560.0"
)
TOKEN = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0"
REQUEST = "0.3 0.5 0.8 1.0 1.5 2.0 2.5 5.0 10.0 15.0 20.0 30.0 40.0 50.0 60.0 120.0 240.0 480.0 960.0 1920.0 7680.0"
LENGTH_2048 = "1.0 2.0 5.0 10.0 20.0 50.0 100.0 200.0 500.0 1000.0 2000.0"
STEP = "1.0 8.0 16.0 32.0 64.0 128.0 256.0 512.0 1024.0 2048.0 4096.0 8192.0 16384.0"

ENGINE = {"model_name": ["m"], "engine": ["0"]}
GAUGES = {
    "num_requests_running": ENGINE,
    "num_requests_waiting": ENGINE,
    "num_requests_waiting_by_reason": ENGINE | {"reason": ["capacity", "deferred"]},
    "engine_sleep_state": ENGINE | {"sleep_state": ["awake", "weights_offloaded", "discard_all"]},
    "kv_cache_usage_perc": ENGINE,
    "cache_config_info": {"block_size": ["16"], "num_gpu_blocks": ["100"], "engine": ["0"]},
    "lora_requests_info": {"max_lora": ["0"], "running_lora_adapters": [""], "waiting_lora_adapters": [""]},
}
COUNTERS = {
    "prompt_tokens": ENGINE,
    "prompt_tokens_by_source": ENGINE | {"source": ["local_compute", "local_cache_hit", "external_kv_transfer"]},
    "prompt_tokens_cached": ENGINE,
    "prompt_tokens_cached_by_source": ENGINE | {"source": ["device", "host", "p2p", "disk", "external_unspecified"]},
    "generation_tokens": ENGINE,
    "prefix_cache_queries": ENGINE,
    "prefix_cache_hits": ENGINE,
    "external_prefix_cache_queries": ENGINE,
    "external_prefix_cache_hits": ENGINE,
    "mm_cache_queries": ENGINE,
    "mm_cache_hits": ENGINE,
    "num_preemptions": ENGINE,
    "request_success": ENGINE | {"finished_reason": ["stop", "length", "abort", "error", "repetition"]},
    "admission_rejections": {"model_name": ["m"], "reason": ["max_num_queued_reqs", "max_num_queued_tokens"]},
}
HISTOGRAMS = {
    "time_to_first_token_seconds": FIRST_TOKEN,
    "inter_token_latency_seconds": TOKEN,
    "request_time_per_output_token_seconds": TOKEN,
    "e2e_request_latency_seconds": REQUEST,
    "request_queue_time_seconds": REQUEST,
    "request_inference_time_seconds": REQUEST,
    "request_prefill_time_seconds": REQUEST,
    "request_decode_time_seconds": REQUEST,
    "request_prompt_tokens": LENGTH_2048,
    "request_generation_tokens": LENGTH_2048,
    "request_max_num_generation_tokens": LENGTH_2048,
    "request_params_max_tokens": LENGTH_2048,
    "request_prefill_kv_computed_tokens": LENGTH_2048,
    "request_params_n": "1.0 2.0 5.0 10.0 20.0",
    "request_num_preemptions": "1.0 2.0 3.0 4.0 5.0 10.0 20.0",
    "iteration_tokens_total": STEP,
}


def ready(**options: str) -> ServerMetrics:
    metrics = ServerMetrics("m", **options)  # type: ignore[arg-type]
    metrics.record_engine(max_model_len=2048, num_blocks=100, block_size=16, num_tile_slots=8)
    return metrics


def test_every_family_and_no_other() -> None:
    expected = {*GAUGES, *COUNTERS, *HISTOGRAMS}
    expected |= {f"{name}_created" for name in {*COUNTERS, *HISTOGRAMS}}
    found = {name.removeprefix("vllm:") for name in families(ready()) if name.startswith("vllm:")}
    assert found == expected


@pytest.mark.parametrize(("kind", "table"), [("gauge", GAUGES), ("counter", COUNTERS)])
def test_types_and_labels(kind: str, table: dict[str, dict[str, list[str]]]) -> None:
    found = families(ready())
    for name, labels in table.items():
        family = found[f"vllm:{name}"]
        assert family.type == kind
        suffix = "_total" if kind == "counter" else ""
        assert {sample.name for sample in family.samples} == {f"vllm:{name}{suffix}"}
        for sample in family.samples:
            assert set(sample.labels) == set(labels)
        for label, expected in labels.items():
            # In vLLM's order; a label that does not vary is the same on every sample.
            told = [sample.labels[label] for sample in family.samples]
            assert told == expected if len(expected) == len(told) else set(told) == set(expected)
        if kind == "counter":
            created = found[f"vllm:{name}_created"]
            assert created.type == "gauge"
            assert [sample.labels for sample in created.samples] == [sample.labels for sample in family.samples]
            assert all(sample.value > 1.5e9 for sample in created.samples)


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_buckets(name: str) -> None:
    family = families(ready())[f"vllm:{name}"]
    assert family.type == "histogram"
    buckets = [sample.labels for sample in family.samples if sample.name.endswith("_bucket")]
    assert [labels["le"] for labels in buckets] == [*HISTOGRAMS[name].split(), "+Inf"]
    assert all(labels["model_name"] == "m" and labels["engine"] == "0" and len(labels) == 3 for labels in buckets)
    rest = [(sample.name, sample.labels) for sample in family.samples if not sample.name.endswith("_bucket")]
    labels = {"model_name": "m", "engine": "0"}
    assert rest == [(f"vllm:{name}_count", labels), (f"vllm:{name}_sum", labels)]


def test_the_same_numbers_under_both_names() -> None:
    metrics = ready()
    metrics.record_step(BUSY_STEP, num_deferred=1)
    metrics.record_first_token(0.3)
    for gap in (0.02, 0.02, 0.3):
        metrics.record_gap(gap)
    record_answer(metrics, "length", num_preemptions=2)
    metrics.record_request(n=2, max_tokens=64, longest_answer=8)
    metrics.record_rejection("queue_full")
    metrics.record_rejection("queue_full")
    metrics.record_rejection("server_shutting_down")
    metrics.record_image_lookup(hit=True)
    metrics.record_image_lookup(hit=False)
    expected = {
        "num_requests_running": 2,
        "num_requests_waiting": 3,
        "num_requests_waiting_by_reason{reason=capacity}": 2,
        "num_requests_waiting_by_reason{reason=deferred}": 1,
        "engine_sleep_state{sleep_state=awake}": 1,
        "engine_sleep_state{sleep_state=discard_all}": 0,
        "kv_cache_usage_perc": 0.25,
        "cache_config_info{block_size=16,num_gpu_blocks=100}": 1,
        "prompt_tokens_total": 100,
        "prompt_tokens_by_source_total{source=local_compute}": 40,
        "prompt_tokens_by_source_total{source=local_cache_hit}": 60,
        "prompt_tokens_by_source_total{source=external_kv_transfer}": 0,
        "prompt_tokens_cached_total": 60,
        "prompt_tokens_cached_by_source_total{source=device}": 60,
        "prompt_tokens_cached_by_source_total{source=disk}": 0,
        "generation_tokens_total": 5,
        "prefix_cache_queries_total": 100,
        "prefix_cache_hits_total": 60,
        "external_prefix_cache_hits_total": 0,
        "mm_cache_queries_total": 2,
        "mm_cache_hits_total": 1,
        "num_preemptions_total": 1,
        "request_success_total{finished_reason=length}": 1,
        "request_success_total{finished_reason=stop}": 0,
        "admission_rejections_total{reason=max_num_queued_reqs}": 2,
        "admission_rejections_total{reason=max_num_queued_tokens}": 0,
        "time_to_first_token_seconds_bucket{le=0.25}": 0,
        "time_to_first_token_seconds_bucket{le=0.5}": 1,
        "time_to_first_token_seconds_sum": 0.3,
        "inter_token_latency_seconds_bucket{le=0.01}": 0,
        "inter_token_latency_seconds_bucket{le=0.025}": 2,
        "inter_token_latency_seconds_bucket{le=0.2}": 2,
        "inter_token_latency_seconds_bucket{le=0.3}": 3,
        "inter_token_latency_seconds_sum": pytest.approx(0.34),
        "request_time_per_output_token_seconds_sum": pytest.approx(0.1),
        "e2e_request_latency_seconds_sum": 1.0,
        "request_queue_time_seconds_sum": 0.1,
        "request_prefill_time_seconds_sum": pytest.approx(0.2),
        "request_decode_time_seconds_sum": 0.7,
        "request_inference_time_seconds_sum": pytest.approx(0.9),
        "request_prompt_tokens_sum": 85,
        "request_generation_tokens_sum": 8,
        "request_max_num_generation_tokens_sum": 8,
        "request_params_max_tokens_sum": 64,
        "request_prefill_kv_computed_tokens_sum": 53,
        "request_params_n_sum": 2,
        "request_num_preemptions_sum": 2,
        "request_num_preemptions_bucket{le=1.0}": 0,
        "request_num_preemptions_bucket{le=2.0}": 1,
        "iteration_tokens_total_sum": 45,
        "iteration_tokens_total_bucket{le=32.0}": 0,
        "iteration_tokens_total_bucket{le=64.0}": 1,
    }
    found = values(metrics, "vllm:")
    assert {name: found[name] for name in expected} == expected
    own = values(metrics)
    for name, value in found.items():
        # What has the same name in both must be the same, bucket by bucket; only our prompt tokens are those computed.
        if name in own and name != "prompt_tokens_total":
            assert own[name] == value, name
    assert own["prompt_tokens_total"] == 40


def test_the_switch() -> None:
    assert b"vllm:" not in ready(compat="none").render()[0]
    pages = [ready().render()[0], ready(compat="none").render()[0]]
    # The process grows older between the two.
    both, own = ([line for line in page.splitlines() if not line.startswith(b"process_")] for page in pages)
    assert [line for line in both if b"vllm:" not in line] == own


def test_while_the_model_loads() -> None:
    found = families(ServerMetrics("m"))
    assert "vllm:cache_config_info" not in found  # its sizes would be wrong
    assert [sample.value for sample in found["vllm:num_requests_waiting"].samples] == [0]


def test_sizes_are_integers() -> None:
    [sample] = families(ready())["vllm:cache_config_info"].samples
    assert (int(sample.labels["block_size"]), int(sample.labels["num_gpu_blocks"])) == (16, 100)
    [sample] = families(ready())["vllm:lora_requests_info"].samples
    assert int(sample.labels["max_lora"]) == 0
