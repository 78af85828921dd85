"""What happened to a server, for its metrics to tell."""

from __future__ import annotations

from server.observability.metrics import ServerMetrics
from server.types import StepStats

BUSY_STEP = StepStats(
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
    num_tile_shares=1,
    step_seconds=0.02,
    encode_seconds=0.01,
)


def record_answer(metrics: ServerMetrics, finish_reason: str, *, num_preemptions: int) -> None:
    """Of 8 tokens to a prompt of 85, 32 of which were cached: 0.1 s in the queue, 0.2 to the first token, 0.7 more."""
    metrics.record_finished(
        finish_reason,
        e2e_seconds=1.0,
        prompt_tokens=85,
        generation_tokens=8,
        queue_seconds=0.1,
        first_token_seconds=0.3,
        decode_seconds=0.7,
        cached_tokens=32,
        num_preemptions=num_preemptions,
    )
