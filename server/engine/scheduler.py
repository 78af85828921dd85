"""Decides each step's work: which requests advance, by how many tokens, with which blocks and tiles.

There is no prefill or decode phase. Each request's computed tokens catch up with its tokens under one token budget
and one budget of pixels, so that neither a long prompt nor a large picture stalls a running stream: single tokens
(decodes) are served first, and a tile that is too large for a step is encoded over several.
Knows nothing of tensors, text or time beyond the clock it is given.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

from server.engine.counts import Counts
from server.engine.encoder_cache import EncoderCache
from server.engine.held import HeldRequests
from server.engine.integrity import check_books
from server.engine.kv_cache_manager import KVCacheManager
from server.engine.limits import SchedulerLimits
from server.engine.outputs import output_of, take_prompt_logprobs
from server.engine.queue import WaitingQueue
from server.engine.request import Request, RequestStatus, split_choices
from server.engine.step import ModelRunnerOutput, ScheduledRequest, SchedulerOutput
from server.engine.step_plan import StepPlan
from server.types import EngineOutput, EngineRequest, FinishReason, StepStats

MAX_TRIES = 3  # to compute a request's next token while memory lacks


class Scheduler:
    """Owns every request between `add` and its last output."""

    def __init__(self, limits: SchedulerLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self.kv = KVCacheManager(
            num_blocks=limits.num_blocks,
            block_size=limits.block_size,
            enable_prefix_caching=limits.enable_prefix_caching,
        )
        self.encoder = EncoderCache(limits.num_tile_slots)
        self._clock = clock
        self._held = HeldRequests()
        self._waiting = WaitingQueue()
        self._running: list[Request] = []
        self._requests: dict[str, Request] = {}
        self._finished: list[str] = []  # ended since the last step; the runner may forget them
        self._known_to_runner: set[str] = set()
        self._num_added = 0
        self._counts = Counts()

    # -- requests come and go ------------------------------------------------------------------------------------

    def add(self, source: EngineRequest, *, held: bool = False) -> None:
        """Queue a request, with `held` only once it is released.

        Its further answers follow when the first has computed the prompt. Raises ValueError for a request that breaks a
        limit: the input processor refuses those first.
        """
        if not self._requests.keys().isdisjoint(source.choice_ids):
            raise ValueError(f"request id {source.request_id} is in use")
        total = len(source.prompt_token_ids) + source.max_tokens
        if not source.prompt_token_ids or source.max_tokens < 1 or total > self.limits.max_model_len:
            raise ValueError(
                f"{len(source.prompt_token_ids)} prompt and {source.max_tokens} output tokens do not fit "
                f"a context of {self.limits.max_model_len}"
            )
        first, *others = [
            Request(choice, self._num_added + index, group=source.request_id)
            for index, choice in enumerate(split_choices(source))
        ]
        self._num_added += 1 + len(others)
        for request in (first, *others):
            self._requests[request.request_id] = request
            if held:
                self._known_to_runner.add(request.request_id)  # it has begun to prepare them
        if held:
            self._hold(first, _prepared(first.request_id))
        else:
            self._waiting.push(first)
        for request in others:
            self._hold(request, _prompt_computed(first.request_id))

    def _hold(self, request: Request, event: str) -> None:
        request.status = RequestStatus.HELD
        self._held.hold(request, event)

    def _release_held(self, event: str) -> None:
        for request in self._held.release(event):
            request.status = RequestStatus.WAITING
            self._waiting.push(request)

    def release(self, request_id: str) -> None:
        """Let a request run that was added as held. Unknown ids (ended meanwhile) are ignored."""
        self._release_held(_prepared(request_id))

    def refuse(self, request_id: str, message: str) -> EngineOutput | None:
        """End a request that was added as held, with an error; None if it has ended meanwhile."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._finish(request, FinishReason.ERROR)
        return output_of(request, [], error=message)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests without an output. Unknown ids (already ended) are ignored."""
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None:
                self._finish(request, FinishReason.ABORT)

    @property
    def has_work(self) -> bool:
        """Whether a step has anything to do; held requests give it nothing."""
        return len(self._requests) > len(self._held)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._held)

    # -- one step ------------------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        """Plan one step. Blocks and slots in the plan are taken; every planned request must go through `update`."""
        step = StepPlan(self.limits, self.encoder, self._counts)
        # A decode needs one token; serving those first keeps streams flowing while prompts are computed in chunks.
        decodes = [request for request in self._running if request.num_uncomputed_tokens == 1]
        prefills = [request for request in self._running if request.num_uncomputed_tokens > 1]
        self._advance_all(step, decodes)
        self._seat_newcomer(step)
        self._advance_all(step, sorted(prefills, key=lambda request: self._waiting.served(request.key)))
        if not step.has_preempted:
            self._admit(step)
        return step.build(self.take_finished())

    def _advance_all(self, step: StepPlan, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.status is RequestStatus.RUNNING:  # else: preempted a moment ago, for one before it
                self._advance(step, request)

    def _advance(self, step: StepPlan, request: Request) -> None:
        """Plan a running request's next chunk, preempting those of lower rank for blocks if need be."""
        num_tokens = min(request.num_uncomputed_tokens, step.tokens_left)
        num_tokens = step.reach(request, request.num_computed_tokens, num_tokens)
        if num_tokens == 0:
            return
        while (added := self.kv.extend(request, num_tokens)) is None:
            victim = max(self._running, key=lambda candidate: candidate.rank)
            self._preempt(step, victim)
            if victim is request:
                return
        step.add(request, num_tokens, added)

    def _admit(self, step: StepPlan) -> None:
        """Start waiting requests, in order, while they fit. The first that does not fit ends the step's intake."""
        while (request := self._waiting.peek()) is not None:
            prefix = self.kv.find_prefix(request)
            if not self._has_place(request, prefix) or not self._start(step, request, prefix):
                return

    def _seat_newcomer(self, step: StepPlan) -> None:
        """Start the next request if its key has none running, if need be in the place of the key that has most.

        Otherwise one key's long answers could hold every place, however fair the turns of those that wait.
        """
        request = self._waiting.peek()
        if request is None or step.has_preempted or any(running.key == request.key for running in self._running):
            return
        prefix = self.kv.find_prefix(request)
        while not self._has_place(request, prefix):
            victim = self._greediest()
            if victim is None:
                return
            self._preempt(step, victim)
            prefix = self.kv.find_prefix(request)  # what the victim gave back may have been part of it
        self._start(step, request, prefix)

    def _greediest(self) -> Request | None:
        """The request of lowest rank of the key that runs most; None if no key runs two."""
        keys = Counter(request.key for request in self._running)
        key, count = max(keys.items(), key=lambda item: item[1], default=("", 0))
        if count < 2:
            return None
        return max((request for request in self._running if request.key == key), key=lambda request: request.rank)

    def _has_place(self, request: Request, prefix: list[int]) -> bool:
        """Whether the batch has a place and the pool has the blocks."""
        has_place = len(self._running) < self.limits.max_num_seqs
        return has_place and self.kv.can_admit(request, prefix, spare=len(self._running))

    def _start(self, step: StepPlan, request: Request, prefix: list[int]) -> bool:
        """Start a waiting request for which there is a place; False if the step has no budget for it.

        One that begins with a tile takes its place before it has a chunk: only who runs has tiles encoded.
        """
        if step.tokens_left == 0:
            return False
        self._waiting.take(request)  # not always the next any more: one preempted for it may have gone before it
        self.kv.start(request, prefix)
        request.status = RequestStatus.RUNNING
        self._running.append(request)
        start = request.num_computed_tokens
        self._note_start(step, request, start)
        num_tokens = step.reach(request, start, min(request.num_uncomputed_tokens, step.tokens_left))
        if num_tokens:
            added = self.kv.extend(request, num_tokens)
            if added is None:
                raise RuntimeError("blocks vanished between can_admit and extend")
            step.add(request, num_tokens, added)
        return True

    def _note_start(self, step: StepPlan, request: Request, num_cached: int) -> None:
        if request.first_scheduled_time is None:
            # Not after a preemption: what it finds then it has computed itself.
            self._counts.prefix_queries += request.num_tokens
            self._counts.prefix_hits += num_cached
            request.first_scheduled_time = self._clock()
            request.num_cached_tokens = num_cached
            step.introduce(request)
            self._known_to_runner.add(request.request_id)

    def _preempt(self, step: StepPlan, victim: Request) -> None:
        """Send a running request back to the queue, for the blocks that it holds."""
        step.withdraw(victim)
        self._send_back(victim)

    def _send_back(self, request: Request) -> None:
        """Let a running request wait again; its tokens are recomputed, mostly from cached blocks."""
        self._release(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        request.status = RequestStatus.WAITING
        self._running.remove(request)
        self._waiting.push(request)
        self._counts.num_preemptions += 1

    # -- what came of it -----------------------------------------------------------------------------------------

    def update(self, step: SchedulerOutput, result: ModelRunnerOutput) -> list[EngineOutput]:
        """Take a step's results: advance, end, defer or fail each planned request, and publish full blocks."""
        outputs = []
        self._counts.num_tile_shares += len(step.tiles)
        self._counts.num_encoded_tiles += sum(tile.is_last_share for tile in step.tiles)
        chunks = {item.request_id: item for item in step.scheduled}
        for request_id in step.request_ids:
            request = self._requests.get(request_id)
            # One that was preempted while a tile was encoded for it is told of what came of that when it tries again.
            if request is None or request.status is not RequestStatus.RUNNING:
                continue
            output = None
            if request_id in result.failed:
                self._fail(request)
                output = output_of(request, [], error=result.failed[request_id])
            elif request_id in result.deferred:
                output = self._defer(request)
            elif request_id in chunks:
                output = self._advance_computed(request, chunks[request_id], result)
            if output is not None:
                outputs.append(output)
        for tile in step.tiles:
            if tile.slot in result.failed_slots:  # nobody needs it any more, not even one preempted within the step
                self.encoder.discard(tile.key)
        return outputs

    def _defer(self, request: Request) -> EngineOutput | None:
        """Let a request that had no memory wait for its next try, or end it when it has had enough of them."""
        request.num_deferrals += 1
        if request.num_deferrals < MAX_TRIES:
            self._send_back(request)
            return None
        self._finish(request, FinishReason.ERROR)
        return output_of(
            request,
            [],
            error=f"the server had too little memory for this request in {MAX_TRIES} tries",
            error_code="out_of_memory",
        )

    def _advance_computed(
        self, request: Request, item: ScheduledRequest, result: ModelRunnerOutput
    ) -> EngineOutput | None:
        """Book what a chunk computed; None if there is nothing to tell of it."""
        self._counts.num_prompt_tokens += max(
            0, min(item.num_tokens, request.num_prompt_tokens - item.num_computed_tokens)
        )
        request.num_computed_tokens += item.num_tokens
        self._counts.num_computed_tokens += item.num_tokens
        self.kv.publish(request)
        for index in list(request.tile_slots):
            if request.source.placeholders[index].end <= request.num_computed_tokens:
                self._unpin_tile(request, index)
        prompt_logprobs = take_prompt_logprobs(request, item, result)
        token = result.sampled.get(item.request_id)
        if token is None:
            return output_of(request, [], prompt_logprobs=prompt_logprobs) if prompt_logprobs else None
        request.append(token, is_complete=item.request_id in result.complete)
        request.num_deferrals = 0
        self._counts.num_generated_tokens += 1
        self._waiting.charge(request.key, 1)
        if request.num_output_tokens == 1:
            self._release_held(_prompt_computed(request.request_id))
        if request.finish_reason is not None:
            self._finish(request, request.finish_reason)
        logprobs = result.logprobs.get(item.request_id)
        return output_of(
            request, [token], logprobs=[] if logprobs is None else [logprobs], prompt_logprobs=prompt_logprobs
        )

    def fail_step(self, step: SchedulerOutput, message: str) -> list[EngineOutput]:
        """A step broke and nobody can tell for whom: end all that were in it, keep all others."""
        failed = dict.fromkeys(step.request_ids, message)
        slots = frozenset(tile.slot for tile in step.tiles)
        return self.update(step, ModelRunnerOutput(sampled={}, failed=failed, failed_slots=slots))

    # -- the one place where things are given back ---------------------------------------------------------------

    def _fail(self, request: Request) -> None:
        keys = [request.source.tiles[index].key for index in request.tile_slots]
        self._finish(request, FinishReason.ERROR)
        for key in keys:
            self.encoder.discard(key)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.status is RequestStatus.RUNNING:
            self._running.remove(request)
        elif request.status is RequestStatus.HELD:
            self._held.remove(request.request_id)
        else:
            self._waiting.remove(request.request_id)
        # Nobody else will compute the prompt for those that wait for it.
        self._release_held(_prompt_computed(request.request_id))
        self._release(request)
        self.encoder.abandon(request.request_id)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        del self._requests[request.request_id]
        if request.request_id in self._known_to_runner:
            self._known_to_runner.discard(request.request_id)
            self._finished.append(request.request_id)

    def _release(self, request: Request) -> None:
        """Give back every block and slot."""
        self.kv.free(request)
        for index in list(request.tile_slots):
            self._unpin_tile(request, index)

    def _unpin_tile(self, request: Request, index: int) -> None:
        del request.tile_slots[index]
        self.encoder.unpin(request.source.tiles[index].key)

    def take_finished(self) -> list[str]:
        """Ids that ended since the last step, for a runner that gets no step soon."""
        finished, self._finished = self._finished, []
        return finished

    # -- looking in ----------------------------------------------------------------------------------------------

    def take_stats(self, *, step_seconds: float = 0.0, encode_seconds: float = 0.0) -> StepStats:
        """Gauges as they are and counts since the last call."""
        counts, self._counts = self._counts, Counts()
        return StepStats(
            num_running=len(self._running),
            num_waiting=self.num_waiting,
            num_held=len(self._held),
            num_blocks=self.kv.pool.num_blocks,
            num_used_blocks=self.kv.pool.num_used,
            step_seconds=step_seconds,
            encode_seconds=encode_seconds,
            **asdict(counts),
        )

    @property
    def holds_nothing(self) -> bool:
        """What must be true whenever no request is here; cheap enough to ask each time."""
        return self.kv.pool.num_used == 0 and not self.encoder.pin_counts()

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the requests that are here hold exactly what is taken. For tests."""
        check_books(self.kv, self.encoder, self._requests.values())
        if len(self._running) + len(self._waiting) + len(self._held) != len(self._requests):
            raise RuntimeError("a request is neither running nor waiting nor held")


def _prepared(request_id: str) -> str:
    """The event that a held request waits for."""
    return f"prepared:{request_id}"


def _prompt_computed(request_id: str) -> str:
    """The event that the further answers to a request's prompt wait for."""
    return f"prompt:{request_id}"
