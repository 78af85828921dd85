"""Top-k, top-p and min-p: which tokens a request leaves to chance. Each row is cut by its own probabilities alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server.runner.transfer import indices, numbers
from server.types import SamplingParams

TOP_CANDIDATES = 512  # enough for nearly every top-k and top-p; the rest falls back to a full sort


def is_truncated(sampling: SamplingParams) -> bool:
    return sampling.top_k != 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def truncate(probs: Tensor, samplings: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """What is left of each row of probs [R, vocab], likeliest first: probabilities [R, n], 0 past the end, and ids.

    Order as in the field: top-k first, then top-p over what is left, renormalised, then min-p.
    """
    device, vocab = probs.device, probs.shape[-1]
    top_k = indices([min(sampling.top_k, vocab) or vocab for sampling in samplings], device)[:, None]
    # A request without top-p keeps what comes after any share of the whole.
    shares = [sampling.top_p if sampling.top_p < 1.0 else float("inf") for sampling in samplings]
    top_p = numbers(shares, device, torch.float64)[:, None]
    min_p = numbers([sampling.min_p for sampling in samplings], device, probs.dtype)[:, None]
    kept, ids = _sorted(probs, samplings)
    kept = kept.where(torch.arange(kept.shape[-1], device=device) < top_k, 0.0)
    total = torch.where(top_k == vocab, probs.sum(-1, keepdim=True), kept.sum(-1, keepdim=True))
    before = torch.cumsum(kept, dim=-1, dtype=torch.float64) - kept
    inside = before < top_p * total
    inside[:, 0] = True
    kept = kept.where(inside & (kept >= min_p * kept[:, :1]), 0.0)
    return kept, ids


def _sorted(probs: Tensor, samplings: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Each row's probabilities from the highest down, as many as its limits need, and their ids; both [R, n]."""
    if probs.device.type != "cpu":  # a full sort takes microseconds there; to know that less will do is to wait
        return torch.sort(probs, descending=True)
    vocab = probs.shape[-1]
    wanted = min(max(min(sampling.top_k, vocab) or vocab for sampling in samplings), TOP_CANDIDATES)
    kept, ids = torch.topk(probs, wanted)
    covered = (kept.sum(-1) / probs.sum(-1)).tolist()
    ratios = (kept[:, -1] / kept[:, 0]).tolist()
    short = [
        row
        for row, sampling in enumerate(samplings)
        if not _is_enough(sampling, wanted, vocab, covered=covered[row], last_to_first=ratios[row])
    ]
    if not short:
        return kept, ids
    all_kept, all_ids = (torch.zeros(probs.shape, dtype=tensor.dtype) for tensor in (kept, ids))
    all_kept[:, :wanted], all_ids[:, :wanted] = kept, ids
    all_kept[short], all_ids[short] = torch.sort(probs[short], descending=True)
    return all_kept, all_ids


def _is_enough(sampling: SamplingParams, count: int, vocab: int, *, covered: float, last_to_first: float) -> bool:
    """Whether the `count` likeliest are all that the limits can leave."""
    top_k = min(sampling.top_k, vocab) or vocab
    if top_k <= count:
        return True
    if sampling.top_p < 1.0:
        # With a large top-k, top-p is a share of all that it leaves, which only the full sort tells.
        return top_k == vocab and covered >= sampling.top_p
    return last_to_first < sampling.min_p
