"""From logits to token ids. Each row is decided by its own logits, parameters, seed and position, and nothing else.

Randomness is stateless: the noise for output token i of a request follows from (seed, i) alone, so neither batch-mates
nor a preemption change what a seed gives on one kind of device.

A token is drawn as the argmax of probability over exponential noise, one number for each id of the vocabulary (the
Gumbel-max trick). Inverting the cumulative distribution would cost a third, but there a rounding difference of 1e-6 in
any logit, as another batch size makes it, shifts every boundary; here it matters only when the two best are that near.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from server.runner.input_batch import RequestState
from server.runner.penalties import adjust_logits
from server.types import SamplingParams

TOP_CANDIDATES = 512  # enough for nearly every top-k and top-p; the rest falls back to a full sort


class Sampler:
    """`forbidden_token_ids` can never be sampled, whatever a request asks for."""

    def __init__(self, forbidden_token_ids: Sequence[int], device: torch.device) -> None:
        self._forbidden = torch.tensor(list(forbidden_token_ids), dtype=torch.int64, device=device)
        self._generator = torch.Generator(device)

    def sample(self, logits: Tensor, states: Sequence[RequestState]) -> list[int | None]:
        """One id for each row of float32 logits [S, vocab], changed in place. None where no logit is finite."""
        adjust_logits(logits, states, self._forbidden)
        highest, greedy = logits.max(dim=-1)
        tokens: list[int | None] = list(greedy.tolist())
        for index, (state, finite) in enumerate(zip(states, highest.isfinite().tolist(), strict=True)):
            sampling = state.source.sampling
            if not finite:
                tokens[index] = None
            elif sampling.temperature > 0 and sampling.top_k != 1:
                noise = self._noise(sampling.seed or 0, state.num_output_tokens, logits.shape[-1])
                tokens[index] = _draw(logits[index], sampling, noise)
        return tokens

    def _noise(self, seed: int, index: int, vocab: int) -> Tensor:
        """[vocab] numbers from the exponential distribution, fixed by a 64-bit seed and an output token's index."""
        digest = hashlib.blake2b(struct.pack("<qq", seed, index), digest_size=8).digest()
        self._generator.manual_seed(int.from_bytes(digest, "little", signed=True))
        uniform = torch.rand(vocab, generator=self._generator, device=self._generator.device)
        uniform.clamp_(min=2.0**-25)  # one draw in 2^24 is exactly 0, and its noise would be infinite
        return uniform.log_().neg_()  # torch's own exponential_ takes three times as long on CPU


def _draw(row: Tensor, sampling: SamplingParams, noise: Tensor) -> int:
    """One id from a row of logits [vocab], given noise [vocab]."""
    probs = torch.softmax(row / sampling.temperature, dim=-1)
    if sampling.top_k == 0 and sampling.top_p >= 1.0 and sampling.min_p == 0.0:
        return int((probs / noise).argmax())
    kept, ids = _truncate(probs, sampling)
    return int(ids[(kept / noise[ids]).argmax()])


def _truncate(probs: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
    """The candidates that top-k, top-p and min-p leave, most likely first: probabilities and ids, each [n].

    Order as in the field: top-k first, then top-p over what is left, renormalised, then min-p.
    """
    vocab = probs.shape[-1]
    top_k = min(sampling.top_k, vocab) if sampling.top_k else vocab
    wanted = min(top_k, TOP_CANDIDATES, vocab)
    kept, ids = torch.topk(probs, wanted)
    total = probs.sum() if top_k == vocab else None
    if wanted < top_k:
        covers_top_p = total is not None and float(kept.sum() / total) >= sampling.top_p and sampling.top_p < 1.0
        # With a large top-k, top-p is a share of all that it leaves, which only the full sort tells.
        needs_total = total is None and sampling.top_p < 1.0
        covers_min_p = sampling.min_p > 0 and float(kept[-1]) < sampling.min_p * float(kept[0]) and not needs_total
        if not covers_top_p and not covers_min_p:
            kept, ids = torch.sort(probs, descending=True)
            kept, ids = kept[:top_k], ids[:top_k]
    if sampling.top_p < 1.0:
        total = kept.sum() if total is None else total
        before = torch.cumsum(kept, dim=-1, dtype=torch.float64) - kept
        count = max(1, int((before < sampling.top_p * total).sum()))
        kept, ids = kept[:count], ids[:count]
    if sampling.min_p > 0.0:
        count = max(1, int((kept >= sampling.min_p * kept[0]).sum()))
        kept, ids = kept[:count], ids[:count]
    return kept, ids
