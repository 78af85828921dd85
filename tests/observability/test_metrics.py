"""Counting: every recorded number ends in the family of its name, and the page is what Prometheus reads."""

from __future__ import annotations

import ast
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import server
from server.observability.metrics import FINISH_REASONS, ServerMetrics
from server.types import FinishReason, StepStats


def values(metrics: ServerMetrics) -> dict[str, float]:
    """Sample name, with its labels other than the model's, to value."""
    found = {}
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key != "model_name"}
            found[sample.name + (str(sorted(labels.items())) if labels else "")] = sample.value
    return found


def test_a_step() -> None:
    metrics = ServerMetrics("m")
    stats = StepStats(
        num_running=2,
        num_waiting=3,
        num_blocks=8,
        num_used_blocks=2,
        num_prompt_tokens=40,
        num_generated_tokens=5,
        num_preemptions=1,
        prefix_queries=100,
        prefix_hits=60,
        tile_queries=5,
        tile_hits=4,
        num_encoded_tiles=1,
        step_seconds=0.02,
        encode_seconds=0.01,
    )
    metrics.record_step(stats)
    metrics.record_step(stats)
    metrics.record_step(StepStats(step_seconds=0.01))
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
        "image_encode_seconds_count": 2,  # not of steps without tiles
        "image_encode_seconds_sum": pytest.approx(0.02),
    }
    assert {name: found[f"idefics2:{name}"] for name in expected} == expected
    metrics.record_step(stats)
    found = values(metrics)
    assert found["idefics2:num_requests_running"] == 2
    assert found["idefics2:num_requests_waiting"] == 3
    assert found["idefics2:kv_cache_usage_perc"] == 0.25


def test_a_request() -> None:
    metrics = ServerMetrics("m")
    metrics.record_first_token(0.3)
    metrics.record_gap(0.02)
    metrics.record_finished(
        "stop", e2e_seconds=1.0, prompt_tokens=85, generation_tokens=8, queue_seconds=0.1, decode_seconds=0.7
    )
    metrics.record_finished("abort", e2e_seconds=0.5, prompt_tokens=10, generation_tokens=0)
    metrics.record_finished("length", e2e_seconds=0.5, prompt_tokens=10, generation_tokens=1, decode_seconds=0.0)
    found = values(metrics)
    expected = {
        "requests_total[('finish_reason', 'stop')]": 1,
        "requests_total[('finish_reason', 'length')]": 1,
        "requests_total[('finish_reason', 'abort')]": 1,
        "requests_total[('finish_reason', 'error')]": 0,  # there from the start, so that its rate is known
        "time_to_first_token_seconds_sum": 0.3,
        "inter_token_latency_seconds_sum": 0.02,
        "e2e_request_latency_seconds_sum": 2.0,
        "e2e_request_latency_seconds_count": 3,
        "request_queue_time_seconds_count": 1,
        "request_queue_time_seconds_sum": 0.1,
        "request_time_per_output_token_seconds_count": 1,
        "request_time_per_output_token_seconds_sum": pytest.approx(0.1),
        "request_prompt_tokens_sum": 105,
        "request_generation_tokens_sum": 9,
    }
    assert {name: found[f"idefics2:{name}"] for name in expected} == expected


def test_images_and_http() -> None:
    metrics = ServerMetrics("m")
    metrics.record_image_fetch(0.2)
    metrics.record_image_decode(0.1)
    metrics.record_image_decode(0.1)
    metrics.record_image_error("invalid_base64_image")
    metrics.record_http(handler="/x", method="GET", status=200, seconds=0.5)
    found = values(metrics)
    expected = {
        "images_total": 2,
        "image_errors_total[('code', 'invalid_base64_image')]": 1,
        "image_fetch_seconds_count": 1,
        "image_decode_seconds_count": 2,
        "http_requests_total[('handler', '/x'), ('method', 'GET'), ('status', '200')]": 1,
        "http_request_duration_seconds_sum[('handler', '/x'), ('method', 'GET')]": 0.5,
    }
    assert {name: found[f"idefics2:{name}"] for name in expected} == expected


def test_two_servers_share_nothing() -> None:
    first, second = ServerMetrics("a"), ServerMetrics("b")
    first.record_image_fetch(1.0)
    assert values(second)["idefics2:image_fetch_seconds_count"] == 0
    assert b'model_name="b"' not in first.render()[0]


def test_all_names_have_the_prefix_and_help() -> None:
    for family in text_string_to_metric_families(ServerMetrics("m").render()[0].decode()):
        assert family.name.startswith("idefics2:")
        assert family.documentation


def test_every_finish_reason_is_known() -> None:
    assert set(FINISH_REASONS) == {reason.value for reason in FinishReason}


def test_a_scrape_is_cheap() -> None:
    """Some scrape twenty times a second."""
    metrics = ServerMetrics("m")
    metrics.render()
    started = time.process_time()
    for _ in range(10):
        metrics.render()
    assert (time.process_time() - started) / 10 < 0.02


def test_only_one_module_knows_the_library() -> None:
    root = Path(server.__file__).parent
    users = set()
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name.partition(".")[0] == "prometheus_client" for name in names):
                users.add(file.relative_to(root).as_posix())
    assert users == {"observability/metrics.py"}
