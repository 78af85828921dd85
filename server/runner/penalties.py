"""Everything that changes logits before a token is chosen: penalties, bias, and tokens that may not come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from server.grammar.vocabulary import expand_bitmask
from server.runner.input_batch import RequestState
from server.runner.transfer import indices, numbers, upload


def adjust_logits(logits: Tensor, states: Sequence[RequestState], forbidden: Sequence[int]) -> None:
    """Change float32 logits [S, vocab] in place, row by row, for the requests that ask for it.

    `forbidden` ids (the image tokens) come last, so that no bias brings them back.
    """
    for row, state in zip(logits, states, strict=True):
        sampling = state.source.sampling
        if sampling.repetition_penalty != 1.0:
            _repetition(row, state, sampling.repetition_penalty, forbidden)
        if sampling.presence_penalty or sampling.frequency_penalty:
            _presence_and_frequency(row, state)
        if sampling.logit_bias:
            ids = indices(list(sampling.logit_bias), row.device)
            row[ids] += numbers(list(sampling.logit_bias.values()), row.device, row.dtype)
        if state.bitmask is not None:
            allowed = torch.from_numpy(expand_bitmask(state.bitmask, row.shape[-1]))
            row.masked_fill_(~upload(allowed, row.device), float("-inf"))
        _hide_endings(row, state)
    logits.index_fill_(1, indices(forbidden, logits.device), float("-inf"))


def _hide_endings(row: Tensor, state: RequestState) -> None:
    """Hide what would end an answer that may not end yet, except where a grammar leaves nothing else."""
    sampling = state.source.sampling
    hidden: list[int] = []
    if state.num_output_tokens < sampling.min_tokens:
        hidden += state.source.masked_token_ids
    if state.matcher is not None and sampling.ignore_eos:
        hidden += state.source.eos_token_ids
    if not hidden:
        return
    ids = indices(hidden, row.device)
    before = row[ids]
    row.index_fill_(0, ids, float("-inf"))
    if state.matcher is not None and bool(row.isneginf().all()):
        row[ids] = before


def _repetition(row: Tensor, state: RequestState, penalty: float, forbidden: Sequence[int]) -> None:
    """Tokens of prompt and answer get logit / penalty if positive, logit × penalty if not (CTRL, arXiv 1909.05858).

    Image tokens stand for pictures, not for words that were said.
    """
    seen = indices(sorted(set(state.token_ids).difference(forbidden)), row.device)
    values = row[seen]
    row[seen] = torch.where(values > 0, values / penalty, values * penalty)


def _presence_and_frequency(row: Tensor, state: RequestState) -> None:
    """OpenAI's additive penalties, over the answer alone."""
    sampling = state.source.sampling
    counts = Counter(state.token_ids[len(state.source.prompt_token_ids) :])
    if not counts:
        return
    ids = indices(list(counts), row.device)
    times = numbers(list(counts.values()), row.device, row.dtype)
    row[ids] -= sampling.presence_penalty + sampling.frequency_penalty * times
