"""Counting: every recorded number ends in the family of its name, and the page is what Prometheus reads."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import server
from server.errors import CapacityError, EngineDeadError, UnavailableError
from server.observability.instruments import GRAMMAR_KINDS, IMAGE_ERRORS, REJECTION_REASONS
from server.observability.metrics import FAMILY_NAMES, FINISH_REASONS, ServerMetrics
from server.types import FinishReason, GrammarSpec, StepStats
from tests.observability.events import BUSY_STEP, record_answer
from tests.observability.scrape import families, values


def test_a_step() -> None:
    metrics = ServerMetrics("m")
    metrics.record_step(BUSY_STEP)
    metrics.record_step(BUSY_STEP)
    metrics.record_step(StepStats(step_seconds=0.01))
    metrics.record_step(StepStats())  # no step: the engine says that it is idle
    found = values(metrics)
    expected = {
        "num_requests_running": 0,  # gauges are the last step's
        "num_requests_waiting": 0,
        "kv_cache_usage_perc": 0,
        "prompt_tokens_total": 80,
        "generation_tokens_total": 10,
        "num_preemptions_total": 2,
        "prefix_cache_queries_total": 200,
        "prefix_cache_hits_total": 120,
        "tile_cache_queries_total": 10,
        "tile_cache_hits_total": 8,
        "tiles_encoded_total": 2,
        "step_seconds_count": 3,
        "step_seconds_sum": pytest.approx(0.05),
        "step_tokens_count": 3,
        "step_tokens_sum": 90,
        "image_encode_seconds_count": 2,  # not of steps without tiles
        "image_encode_seconds_sum": pytest.approx(0.02),
    }
    assert {name: found[name] for name in expected} == expected
    metrics.record_step(BUSY_STEP, num_deferred=2)
    found = values(metrics)
    assert found["num_requests_running"] == 2
    assert found["num_requests_waiting_by_reason{reason=capacity}"] == 1
    assert found["num_requests_waiting_by_reason{reason=deferred}"] == 2
    assert found["num_requests_waiting"] == 3
    assert found["kv_cache_usage_perc"] == 0.25


def test_the_engines_memory_is_asked_for_at_each_scrape() -> None:
    metrics = ServerMetrics("m")
    assert values(metrics)["engine_resident_memory_bytes"] == 0
    sizes = iter([5.0, 7.0])
    metrics.watch_engine_memory(lambda: next(sizes))
    assert [values(metrics)["engine_resident_memory_bytes"] for _ in range(2)] == [5.0, 7.0]


def test_a_request() -> None:
    metrics = ServerMetrics("m")
    metrics.record_first_token(0.3)
    metrics.record_gap(0.02)
    record_answer(metrics, "stop", num_preemptions=3)
    metrics.record_finished("abort", e2e_seconds=0.5, prompt_tokens=10, generation_tokens=0)
    metrics.record_finished("length", e2e_seconds=0.5, prompt_tokens=10, generation_tokens=1, decode_seconds=0.0)
    metrics.record_request(n=3, max_tokens=16, longest_answer=8)
    found = values(metrics)
    expected = {
        "requests_total{finish_reason=stop}": 1,
        "requests_total{finish_reason=length}": 1,
        "requests_total{finish_reason=abort}": 1,
        "requests_total{finish_reason=error}": 0,  # there from the start, so that its rate is known
        "time_to_first_token_seconds_sum": 0.3,
        "inter_token_latency_seconds_sum": 0.02,
        "e2e_request_latency_seconds_sum": 2.0,
        "e2e_request_latency_seconds_count": 3,
        "request_queue_time_seconds_count": 1,
        "request_queue_time_seconds_sum": 0.1,
        "request_prefill_time_seconds_count": 1,
        "request_prefill_time_seconds_sum": pytest.approx(0.2),
        "request_decode_time_seconds_count": 2,
        "request_decode_time_seconds_sum": 0.7,
        "request_inference_time_seconds_count": 1,
        "request_inference_time_seconds_sum": pytest.approx(0.9),
        "request_time_per_output_token_seconds_count": 1,
        "request_time_per_output_token_seconds_sum": pytest.approx(0.1),
        "request_prompt_tokens_sum": 105,
        "request_prefill_kv_computed_tokens_count": 1,  # not of one that never got there
        "request_prefill_kv_computed_tokens_sum": 53,
        "request_generation_tokens_sum": 9,
        "request_num_preemptions_bucket{le=0.0}": 2,
        "request_num_preemptions_sum": 3,
        "request_params_n_sum": 3,
        "request_params_max_tokens_sum": 16,
        "request_max_num_generation_tokens_sum": 8,
    }
    assert {name: found[name] for name in expected} == expected


def test_gaps_are_told_at_once_and_counted_once() -> None:
    metrics = ServerMetrics("m")
    gaps = [0.02] * 60 + [0.021] * 3 + [7.0]
    for repetition in range(1, 4):
        for gap in gaps:
            metrics.record_gap(gap)
        if repetition == 2:
            metrics.record_step(StepStats())
        found = values(metrics)
        assert found["inter_token_latency_seconds_count"] == 64 * repetition
        assert found["inter_token_latency_seconds_bucket{le=0.02}"] == 60 * repetition
        assert found["inter_token_latency_seconds_bucket{le=0.025}"] == 63 * repetition
        assert found["inter_token_latency_seconds_bucket{le=5.0}"] == 63 * repetition
        assert found["inter_token_latency_seconds_sum"] == pytest.approx(sum(gaps) * repetition)
    for _ in range(1000):
        metrics.record_gap(0.02)
    metrics.record_step(StepStats())
    assert not metrics._gaps  # a server that nobody scrapes keeps none


def test_images_and_http() -> None:
    metrics = ServerMetrics("m")
    metrics.record_images(data=2, http=1)
    metrics.record_images(data=0, http=1)
    metrics.record_image_fetch(0.2)
    metrics.record_image_wait(0.4)
    metrics.record_image_decode(0.1)
    metrics.record_image_decode(0.1, preprocess_seconds=0.3)
    metrics.record_image_lookup(hit=False)
    metrics.record_image_lookup(hit=True)
    metrics.record_image_error("invalid_base64_image")
    metrics.record_http(handler="/x", method="GET", status=200, seconds=0.5)
    found = values(metrics)
    expected = {
        "images_total{source=data}": 2,
        "images_total{source=http}": 2,
        "images_per_request_count": 2,
        "images_per_request_sum": 4,
        "images_per_request_bucket{le=1.0}": 1,
        "image_errors_total{code=invalid_base64_image}": 1,
        "image_errors_total{code=image_too_large}": 0,
        "image_cache_queries_total": 2,
        "image_cache_hits_total": 1,
        "image_fetch_seconds_count": 1,
        "image_wait_seconds_sum": 0.4,
        "image_decode_seconds_count": 2,
        "image_decode_seconds_sum": 0.2,
        "image_preprocess_seconds_count": 1,
        "image_preprocess_seconds_sum": 0.3,
        "http_requests_total{handler=/x,method=GET,status=200}": 1,
        "http_request_duration_seconds_sum{handler=/x,method=GET}": 0.5,
    }
    assert {name: found[name] for name in expected} == expected


def test_grammars() -> None:
    metrics = ServerMetrics("m")
    metrics.record_grammar("regex", seconds=0.25, accepted=True)
    metrics.record_grammar("json_schema", seconds=0.5, accepted=False)
    found = values(metrics)
    assert found["grammar_compiles_total{kind=regex,outcome=accepted}"] == 1
    assert found["grammar_compiles_total{kind=json_schema,outcome=refused}"] == 1
    assert found["grammar_compiles_total{kind=json_schema,outcome=accepted}"] == 0
    assert found["grammar_compile_seconds_sum"] == 0.75
    assert set(GRAMMAR_KINDS) == set(get_args(get_type_hints(GrammarSpec)["kind"]))


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (CapacityError("full").code, "queue_full"),
        (UnavailableError("leaving").code, "draining"),
        ("model_loading", "loading"),
        (EngineDeadError("dead").code, "engine_dead"),
        ("image_worker_unavailable", "other"),
        ("something new", "other"),
    ],
)
def test_rejections(code: str, reason: str) -> None:
    metrics = ServerMetrics("m")
    metrics.record_rejection(code)
    found = values(metrics)
    for known in REJECTION_REASONS:
        assert found[f"admission_rejections_total{{reason={known}}}"] == (known == reason)


def test_a_worker_that_makes_up_codes_makes_no_series() -> None:
    metrics = ServerMetrics("m")
    before = len(values(metrics))
    for number in range(100):
        metrics.record_image_error(f"code {number}")
    found = values(metrics)
    assert len(found) == before
    assert found["image_errors_total{code=other}"] == 100


def test_every_image_error_is_known() -> None:
    codes = set()
    for file in (Path(server.__file__).parent / "inputs").glob("image*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "code" and isinstance(node.value, ast.Constant):
                codes.add(node.value.value)
    assert len(codes) > 7
    assert codes - {"image_worker_unavailable"} <= set(IMAGE_ERRORS)  # that one is the server's fault: no image's


def test_sizes_and_buckets_follow_the_engine() -> None:
    metrics = ServerMetrics("m")
    metrics.record_rejection("model_loading")
    before = values(metrics)
    assert "request_prompt_tokens_bucket{le=500000.0}" in before
    metrics.record_engine(max_model_len=100, num_blocks=64, block_size=16, num_tile_slots=8)
    found = values(metrics)
    bounds = {name.partition("le=")[2] for name in found if name.startswith("request_prompt_tokens_bucket")}
    assert bounds == {"1.0}", "2.0}", "5.0}", "10.0}", "20.0}", "50.0}", "100.0}", "+Inf}"}
    told = "cache_config_info{block_size=16,max_model_len=100,num_blocks=64,num_tile_slots=8}"
    assert found[told] == 1
    assert found["admission_rejections_total{reason=loading}"] == 1  # what was counted before is still there
    assert not any(name.startswith("cache_config_info") for name in before)


def test_two_servers_share_nothing() -> None:
    first, second = ServerMetrics("a"), ServerMetrics("b")
    first.record_image_fetch(1.0)
    assert values(second)["image_fetch_seconds_count"] == 0
    assert b'model_name="b"' not in first.render()[0]


def test_names() -> None:
    metrics = ServerMetrics("m")
    metrics.record_engine(max_model_len=100, num_blocks=64, block_size=16, num_tile_slots=8)
    assert metrics.family_names == FAMILY_NAMES
    assert len(set(FAMILY_NAMES)) == len(FAMILY_NAMES) > 80
    types = dict(line.split()[2:] for line in metrics.render()[0].decode().splitlines() if line.startswith("# TYPE"))
    assert {name for name in types if not name.endswith("_created") and not name.startswith("process_")} == set(
        FAMILY_NAMES
    )
    for family in families(metrics).values():
        assert family.name.startswith(("idefics2:", "vllm:", "process_"))
        assert family.documentation
        assert not (family.name.startswith("idefics2:") and family.name.endswith("_created"))


def test_every_finish_reason_is_known() -> None:
    assert set(FINISH_REASONS) == {reason.value for reason in FinishReason}


def test_the_process_is_told_under_its_usual_names() -> None:
    told = families(ServerMetrics("test"))
    assert told["process_resident_memory_bytes"].samples[0].value > 1e6
    assert told["process_open_fds"].samples[0].value > 2
    assert told["process_cpu_seconds"].type == "counter"
