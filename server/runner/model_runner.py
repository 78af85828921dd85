"""Runs the steps that the scheduler plans: encode tiles, embed and merge, forward, sample.

Knows tensors and the plan's plain data; knows nothing of queues, blocks' owners or text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from server.engine.step import ModelRunnerOutput, ScheduledRequest, SchedulerOutput
from server.model.attention.base import AttentionBackend, AttentionMetadata, LayerCache
from server.model.idefics2 import Idefics2Model
from server.runner.decode_graphs import (
    DecodeAttention,
    Decoded,
    DecodeGraphs,
    DecodeInputs,
    Recorder,
    graph_sizes,
)
from server.runner.grammars import GrammarBank, advance, compute_bitmasks
from server.runner.input_batch import InputBatch, RequestState, build_input_batch
from server.runner.isolation import isolate
from server.runner.logprobs import AnswerLogprobs, prompt_logprobs
from server.runner.sampler import NO_TOKEN, Sampler
from server.runner.transfer import upload
from server.runner.vision_runner import VisionRunner
from server.types import EngineRequest, TokenLogprobs

BROKEN = "the model's numbers broke down for this request"
CRASHED = "the engine failed while computing this request"
NO_PICTURE = "a picture of this request could not be encoded"
DEAD_END = "no token is left that this request's grammar and its other settings allow"


@dataclass
class _Computed:
    """What was made of requests, as in ModelRunnerOutput, before anything is kept of it."""

    sampled: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    crashed: set[str] = field(default_factory=set)
    logprobs: dict[str, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)

    def crash(self, request_id: str, message: str) -> None:
        self.failed[request_id] = message
        self.crashed.add(request_id)

    def add(self, other: _Computed) -> None:
        """Take in what was made of other requests."""
        self.sampled |= other.sampled
        self.failed |= other.failed
        self.crashed |= other.crashed
        self.logprobs |= other.logprobs
        self.prompt_logprobs |= other.prompt_logprobs


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
        self._graphs: DecodeGraphs | None = None

    @property
    def can_record_decodes(self) -> bool:
        return isinstance(self._attention, DecodeAttention)

    @torch.inference_mode()
    def record_decodes(self, record: Recorder, *, max_num_seqs: int, max_model_len: int) -> None:
        """From now on replay steps of decodes alone. Raises ValueError unless `can_record_decodes`."""
        attention = self._attention
        if not isinstance(attention, DecodeAttention):
            raise ValueError("the attention backend keeps what changes between steps on the host")

        def compute(inputs: DecodeInputs, metadata: AttentionMetadata) -> Decoded:
            embeddings = self._model.embed(inputs.token_ids)
            hidden = self._model(embeddings, inputs.positions, self._caches, metadata)
            return Decoded(hidden, self._model.compute_logits(hidden))

        self._graphs = DecodeGraphs(
            compute,
            attention,
            record,
            sizes=graph_sizes(max_num_seqs),
            block_size=self._block_size,
            max_model_len=max_model_len,
            device=self._device,
        )

    def prepare(self, request: EngineRequest, done: Callable[[str | None], None]) -> None:
        self._grammars.prepare(request, done)

    def forget(self, request_ids: list[str]) -> None:
        self._grammars.drop(request_ids)
        for request_id in request_ids:
            self._states.pop(request_id, None)

    @torch.inference_mode()
    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step to its end. What one request is to blame for, or has no memory for, ends or defers it alone.

        Raises EngineBrokenError when the device is of no use any more.
        """
        self._take_in(step)
        started = time.perf_counter()
        unfilled = self._vision.encode(step.tiles, self._states)
        encode_seconds = time.perf_counter() - started
        computed = _Computed()
        broken, deferred = (_who_needs(slots, step) for slots in (unfilled.broken, unfilled.starved))
        for request_id in broken:
            computed.crash(request_id, NO_PICTURE)
        deferred -= broken
        scheduled = [item for item in step.scheduled if item.request_id not in broken | deferred]
        found = isolate(scheduled, self._compute, _name)
        for part in found.results:
            computed.add(part)
        for item in found.broken:
            computed.crash(item.request_id, CRASHED)
        deferred |= {item.request_id for item in found.starved}
        complete = self._keep(computed)
        return ModelRunnerOutput(
            sampled=computed.sampled,
            failed=computed.failed,
            crashed=frozenset(computed.crashed),
            deferred=frozenset(deferred),
            failed_slots=frozenset(unfilled.broken | unfilled.starved),
            encode_seconds=encode_seconds,
            complete=complete,
            logprobs=computed.logprobs,
            prompt_logprobs=computed.prompt_logprobs,
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

    def _compute(self, scheduled: Sequence[ScheduledRequest]) -> _Computed:
        """Forward and sample. Leaves nothing behind but keys and values, which a repetition writes again."""
        computed = _Computed()
        batch = build_input_batch(scheduled, self._states, rows_per_tile=self._vision.slab.shape[1])
        decoded = self._graphs.run(batch) if self._graphs is not None and self._graphs.fits(batch) else None
        hidden = self._forward(batch) if decoded is None else decoded.hidden
        # On a GPU the forward pass still runs while these are found.
        computed.failed |= compute_bitmasks(batch.sampled)
        is_finite = hidden.isfinite().all(dim=-1)
        computed.prompt_logprobs = prompt_logprobs(
            hidden, batch, scheduled, [self._states[item.request_id] for item in scheduled], self._model.compute_logits
        )
        if not batch.sampled:
            _note_broken(is_finite.tolist(), scheduled, computed)
            return computed
        if decoded is None:
            logits = self._model.compute_logits(hidden[upload(batch.logits_indices, self._device)])
        else:
            logits = decoded.logits
        of_answers = AnswerLogprobs(logits, batch.sampled)
        tokens = self._sampler.sample(logits, batch.sampled)
        # All that the host needs to know of the step, in the one copy that waits for it.
        told = torch.cat((tokens, is_finite)).tolist()
        _note_broken(told[len(tokens) :], scheduled, computed)
        _note_tokens(told[: len(tokens)], batch.sampled, computed)
        computed.logprobs = of_answers.describe(computed.sampled)
        return computed

    def _keep(self, computed: _Computed) -> frozenset[str]:
        """Take the tokens into the answers and their grammars. Returns the answers that are complete by that."""
        states = [self._states[request_id] for request_id in computed.sampled]
        for state in states:
            state.token_ids.append(computed.sampled[state.source.request_id])
        return advance(states, computed.sampled, computed.failed)

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
        embeddings = self._model.embed(upload(batch.token_ids, self._device))
        if batch.image_rows.numel():
            rows = self._vision.rows[upload(batch.image_rows, self._device)]
            embeddings = self._model.merge(embeddings, rows, upload(batch.image_positions, self._device))
        positions = upload(batch.positions, self._device)
        hidden: torch.Tensor = self._model(embeddings, positions, self._caches, metadata)
        return hidden


def _who_needs(slots: set[int], step: SchedulerOutput) -> set[str]:
    """Those with a chunk that touches one of these slots, and those whose tile was to go there."""
    touching = {item.request_id for item in step.scheduled if not slots.isdisjoint(item.tile_slots.values())}
    return touching | {tile.request_id for tile in step.tiles if tile.slot in slots}


def _name(item: ScheduledRequest) -> str:
    return f"request {item.request_id}"


def _note_broken(is_finite: Sequence[int], scheduled: Sequence[ScheduledRequest], computed: _Computed) -> None:
    """Crash the requests with a hidden state that is not finite, at any of the T tokens of their chunks.

    The last token alone would not tell: attention stores what is not finite as 0, so a later chunk looks healthy.
    """
    if all(is_finite):
        return
    start = 0
    for item in scheduled:
        if not all(is_finite[start : start + item.num_tokens]):
            computed.crash(item.request_id, BROKEN)
        start += item.num_tokens


def _note_tokens(tokens: Sequence[int], states: Sequence[RequestState], computed: _Computed) -> None:
    for state, token in zip(states, tokens, strict=True):
        request_id = state.source.request_id
        if request_id in computed.failed:
            continue
        if token != NO_TOKEN:
            computed.sampled[request_id] = token
        elif state.matcher is not None:
            computed.failed[request_id] = DEAD_END
        else:
            computed.crash(request_id, BROKEN)
