"""What is told of a request after a step. Knows no queue, no cache and no other request."""

from __future__ import annotations

from collections.abc import Sequence

from server.engine.request import Request
from server.engine.step import ModelRunnerOutput, ScheduledRequest
from server.types import EngineOutput, TokenLogprobs


def output_of(
    request: Request,
    token_ids: list[int],
    *,
    error: str | None = None,
    error_code: str | None = None,
    logprobs: Sequence[TokenLogprobs] = (),
    prompt_logprobs: Sequence[TokenLogprobs] = (),
) -> EngineOutput:
    """New tokens of a request, or its end, with what else is to be known by now."""
    first = request.num_output_tokens <= 1 and request.first_scheduled_time is not None
    return EngineOutput(
        request_id=request.request_id,
        new_token_ids=token_ids,
        finish_reason=request.finish_reason,
        stop_token_id=request.stop_token_id,
        num_cached_tokens=request.num_cached_tokens,
        queue_seconds=(request.first_scheduled_time or 0.0) - request.source.arrival_time if first else None,
        num_preemptions=request.num_preemptions,
        logprobs=list(logprobs),
        prompt_logprobs=list(prompt_logprobs),
        error=error,
        error_code=error_code,
    )


def take_prompt_logprobs(request: Request, item: ScheduledRequest, result: ModelRunnerOutput) -> list[TokenLogprobs]:
    """A chunk's log-probabilities of prompt tokens, noted as told; those from before a preemption have been."""
    found = result.prompt_logprobs.get(item.request_id, [])
    told = max(request.num_prompt_logprobs - item.num_computed_tokens, 0)
    new = found[told:]
    request.num_prompt_logprobs += len(new)
    return new
