"""Runs the steps that the scheduler plans: encode tiles, embed and merge, forward, sample.

Knows tensors and the plan's plain data; knows nothing of queues, blocks' owners or text.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import torch

from server.engine.step import ModelRunnerOutput, ScheduledRequest, SchedulerOutput
from server.model.attention.base import AttentionBackend, LayerCache
from server.model.idefics2 import Idefics2Model
from server.runner.grammars import GrammarBank, advance, compute_bitmasks
from server.runner.input_batch import InputBatch, RequestState, build_input_batch
from server.runner.logprobs import AnswerLogprobs, prompt_logprobs
from server.runner.sampler import Sampler
from server.runner.vision_runner import VisionRunner
from server.types import EngineRequest

BROKEN = "the model's numbers broke down for this request"
DEAD_END = "no token is left that this request's grammar and its other settings allow"


class ModelRunner:
    """The model, its caches and the requests in flight."""

    def __init__(
        self,
        model: Idefics2Model,
        *,
        attention: AttentionBackend,
        caches: list[LayerCache],
        vision: VisionRunner,
        sampler: Sampler,
        grammars: GrammarBank,
        device: torch.device,
    ) -> None:
        self._model = model
        self._attention = attention
        self._caches = caches
        self._vision = vision
        self._sampler = sampler
        self._grammars = grammars
        self._device = device
        self._dtype = next(model.parameters()).dtype
        self._block_size = caches[0].key.shape[1]
        self._states: dict[str, RequestState] = {}

    def prepare(self, request: EngineRequest, done: Callable[[str | None], None]) -> None:
        self._grammars.prepare(request, done)

    def forget(self, request_ids: list[str]) -> None:
        self._grammars.drop(request_ids)
        for request_id in request_ids:
            self._states.pop(request_id, None)

    @torch.inference_mode()
    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step to its end. What fails for one request alone is in `failed`; anything else raises."""
        self._take_in(step)
        started = time.perf_counter()
        failed_slots = self._vision.encode(step.tiles, self._states) if step.tiles else set()
        encode_seconds = time.perf_counter() - started
        failed = {
            item.request_id: "a picture of this request could not be encoded"
            for item in step.scheduled
            if not failed_slots.isdisjoint(item.tile_slots.values())
        }
        scheduled = [item for item in step.scheduled if item.request_id not in failed]
        computed = self._compute(scheduled, failed) if scheduled else ModelRunnerOutput(sampled={})
        return dataclasses.replace(
            computed, failed=failed, failed_slots=frozenset(failed_slots), encode_seconds=encode_seconds
        )

    def _take_in(self, step: SchedulerOutput) -> None:
        self.forget(step.finished)
        for new in step.new_requests:
            self._states[new.request_id] = RequestState(
                source=new,
                token_ids=list(new.prompt_token_ids),
                matcher=self._grammars.get(new.request_id) if new.sampling.grammar is not None else None,
            )
        for item in step.scheduled:
            state = self._states[item.request_id]
            if item.resumed:
                state.block_ids = list(item.new_block_ids)
            else:
                state.block_ids += item.new_block_ids

    def _compute(self, scheduled: Sequence[ScheduledRequest], failed: dict[str, str]) -> ModelRunnerOutput:
        """Forward and sample. Adds to `failed` the requests whose logits are of no use."""
        batch = build_input_batch(
            scheduled, self._states, rows_per_tile=self._vision.slab.shape[1], device=self._device
        )
        hidden = self._forward(batch)
        # On a GPU the forward pass still runs while these are found.
        failed |= compute_bitmasks(batch.sampled)
        failed |= _broken(hidden, scheduled)
        of_prompts = prompt_logprobs(
            hidden, batch, scheduled, [self._states[item.request_id] for item in scheduled], self._model.compute_logits
        )
        if not batch.sampled:
            return ModelRunnerOutput(sampled={}, prompt_logprobs=of_prompts)
        logits = self._model.compute_logits(hidden[batch.logits_indices])
        of_answers = AnswerLogprobs(logits, batch.sampled)
        sampled = self._sample(logits, batch.sampled, failed)
        complete = advance(batch.sampled, sampled, failed)
        return ModelRunnerOutput(
            sampled=sampled,
            complete=complete,
            logprobs=of_answers.describe(sampled),
            prompt_logprobs=of_prompts,
        )

    def _sample(self, logits: torch.Tensor, states: Sequence[RequestState], failed: dict[str, str]) -> dict[str, int]:
        sampled = {}
        for state, token in zip(states, self._sampler.sample(logits, states), strict=True):
            request_id = state.source.request_id
            if request_id in failed:
                continue
            if token is None:
                failed[request_id] = BROKEN if state.matcher is None else DEAD_END
                continue
            state.token_ids.append(token)
            sampled[request_id] = token
        return sampled

    def _forward(self, batch: InputBatch) -> torch.Tensor:
        """Hidden states [T, hidden] of a batch; its keys and values are in the cache afterwards."""
        metadata = self._attention.build_metadata(
            query_lens=batch.query_lens,
            seq_lens=batch.seq_lens,
            block_tables=batch.block_tables,
            block_size=self._block_size,
            device=self._device,
            dtype=self._dtype,
        )
        embeddings = self._model.embed(batch.token_ids)
        if batch.image_rows.numel():
            rows = self._vision.rows[batch.image_rows]
            embeddings = self._model.merge(embeddings, rows, batch.image_positions)
        hidden: torch.Tensor = self._model(embeddings, batch.positions, self._caches, metadata)
        return hidden


def _broken(hidden: torch.Tensor, scheduled: Sequence[ScheduledRequest]) -> dict[str, str]:
    """The requests with a hidden state [T, hidden] that is not finite, at any token of their chunk.

    The last token alone would not tell: attention stores what is not finite as 0, so a later chunk looks healthy.
    """
    if bool(hidden.isfinite().all()):
        return {}
    chunks = torch.split(hidden, [item.num_tokens for item in scheduled])
    return {
        item.request_id: BROKEN
        for item, chunk in zip(scheduled, chunks, strict=True)
        if not bool(chunk.isfinite().all())
    }
