"""Log-probabilities of tokens under the model alone: before temperature, penalties, masks and grammars."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from server.engine.step import ScheduledRequest
from server.runner.input_batch import InputBatch, RequestState
from server.types import TokenLogprobs

# Prompt positions whose logits are held at once: 128 rows of 32,003 float32 are 16 MB.
PROMPT_ROWS = 128

ComputeLogits = Callable[[Tensor], Tensor]


def describe(logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """For each row of logits [R, vocab]: its token's log-probability and its `num_top` likeliest tokens."""
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None]).squeeze(1).tolist()
    values, ids = torch.topk(logprobs, max(num_top), dim=-1)
    rows = zip(token_ids, chosen, ids.tolist(), values.tolist(), num_top, strict=True)
    return [
        TokenLogprobs(token, logprob, tuple(zip(top_ids[:count], top_values[:count], strict=True)))
        for token, logprob, top_ids, top_values, count in rows
    ]


class AnswerLogprobs:
    """The rows of a batch whose requests ask for log-probabilities, kept as they were before sampling changes them."""

    def __init__(self, logits: Tensor, states: Sequence[RequestState]) -> None:
        self._states = [state for state in states if state.source.sampling.num_logprobs is not None]
        rows = [index for index, state in enumerate(states) if state.source.sampling.num_logprobs is not None]
        self._logits = logits[rows] if rows else None

    def describe(self, sampled: dict[str, int]) -> dict[str, TokenLogprobs]:
        """What is to be told of the sampled tokens, by request id."""
        if self._logits is None:
            return {}
        kept = [index for index, state in enumerate(self._states) if state.source.request_id in sampled]
        if not kept:
            return {}
        states = [self._states[index] for index in kept]
        ids = [state.source.request_id for state in states]
        counts = [state.source.sampling.num_logprobs or 0 for state in states]
        described = describe(self._logits[kept], [sampled[request_id] for request_id in ids], counts)
        return dict(zip(ids, described, strict=True))


def prompt_logprobs(
    hidden: Tensor,
    batch: InputBatch,
    scheduled: Sequence[ScheduledRequest],
    states: Sequence[RequestState],
    compute_logits: ComputeLogits,
) -> dict[str, list[TokenLogprobs]]:
    """Log-probabilities of the prompt tokens that the hidden states [T, hidden] of these chunks predict."""
    found = {}
    base = 0
    for item, state, num_tokens in zip(scheduled, states, batch.query_lens, strict=True):
        wanted = state.source.sampling.num_prompt_logprobs
        if wanted is not None:
            prompt = state.source.prompt_token_ids
            start, end = item.num_computed_tokens, item.num_computed_tokens + num_tokens
            targets = prompt[start + 1 : end + 1]
            if targets:
                rows = hidden[base : base + len(targets)]
                found[item.request_id] = [
                    entry
                    for part, ids in _parts(rows, targets)
                    for entry in describe(compute_logits(part), ids, [wanted] * len(ids))
                ]
        base += num_tokens
    return found


def _parts(rows: Tensor, targets: list[int]) -> Iterator[tuple[Tensor, list[int]]]:
    for start in range(0, len(targets), PROMPT_ROWS):
        yield rows[start : start + PROMPT_ROWS], targets[start : start + PROMPT_ROWS]
