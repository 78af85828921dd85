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
from server.runner.transfer import indices, numbers
from server.runner.truncation import is_truncated, truncate

NO_TOKEN = -1  # of a row in which no logit is finite


class Sampler:
    """`forbidden_token_ids` can never be sampled, whatever a request asks for."""

    def __init__(self, forbidden_token_ids: Sequence[int], device: torch.device) -> None:
        self.forbidden_token_ids = tuple(forbidden_token_ids)
        self._device = device
        self._generator = torch.Generator(device)

    def sample(self, logits: Tensor, states: Sequence[RequestState]) -> Tensor:
        """One id for each row of float32 logits [S, vocab], which change in place: int64 [S] on their device.

        NO_TOKEN where no logit is finite. On CUDA nothing here waits, except for a grammar that may leave no token.
        """
        adjust_logits(logits, states, self.forbidden_token_ids)
        highest, tokens = logits.max(dim=-1)
        drawn = [index for index, state in enumerate(states) if _is_drawn(state)]
        if drawn:
            rows = indices(drawn, self._device)
            tokens[rows] = self._draw(logits[rows], [states[index] for index in drawn])
        return tokens.where(highest.isfinite(), NO_TOKEN)

    def _draw(self, logits: Tensor, states: Sequence[RequestState]) -> Tensor:
        """Ids [R] from rows of logits [R, vocab]."""
        samplings = [state.source.sampling for state in states]
        temperatures = numbers([sampling.temperature for sampling in samplings], self._device, logits.dtype)
        probs = torch.softmax(logits / temperatures[:, None], dim=-1)
        noise = self._noise(states, logits.shape[-1])
        tokens = (probs / noise).argmax(dim=-1)
        truncated = [index for index, sampling in enumerate(samplings) if is_truncated(sampling)]
        if truncated:
            rows = indices(truncated, self._device)
            kept, ids = truncate(probs[rows], [samplings[index] for index in truncated])
            best = (kept / noise[rows].gather(1, ids)).argmax(dim=-1, keepdim=True)
            tokens[rows] = ids.gather(1, best).squeeze(1)
        return tokens

    def _noise(self, states: Sequence[RequestState], vocab: int) -> Tensor:
        """[R, vocab] numbers from the exponential distribution, each row's fixed by a seed and an output index."""
        noise = torch.empty((len(states), vocab), device=self._device)
        for row, state in zip(noise, states, strict=True):
            self._generator.manual_seed(_noise_seed(state.source.sampling.seed or 0, state.num_output_tokens))
            torch.rand(vocab, generator=self._generator, device=self._device, out=row)
        noise.clamp_(min=2.0**-25)  # one draw in 2^24 is exactly 0, and its noise would be infinite
        return noise.log_().neg_()  # torch's own exponential_ takes three times as long on CPU


def _is_drawn(state: RequestState) -> bool:
    sampling = state.source.sampling
    return sampling.temperature > 0 and sampling.top_k != 1


def _noise_seed(seed: int, index: int) -> int:
    """64 bits from a 64-bit seed and an output token's index."""
    digest = hashlib.blake2b(struct.pack("<qq", seed, index), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
