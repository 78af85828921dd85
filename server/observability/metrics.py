"""All metrics of a server: what is recorded, and the page that Prometheus scrapes. Callers hand in plain numbers.

Everything is counted once, in `Instruments`; `names.py` and `vllm_names.py` only tell it. What happens once a token is
one append to a list, counted with the next step.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Literal

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from server.observability.exposition import CONTENT_TYPE, Family
from server.observability.instruments import FINISH_REASONS, IMAGE_ERRORS, EngineFacts, Instruments, StallCause
from server.observability.names import own_families
from server.observability.vllm_names import vllm_families
from server.types import StepStats

__all__ = ["FAMILY_NAMES", "FINISH_REASONS", "ServerMetrics"]

# The code of an error that says "not now" → why. Other codes count as "other", so that there are no more series.
_REJECTIONS = {
    "queue_full": "queue_full",
    "server_shutting_down": "draining",
    "model_loading": "loading",
    "engine_restarting": "restarting",
    "engine_unavailable": "engine_dead",
}

# Statuses that say more to an operator who looks at one key than their hundreds do.
_KEY_OUTCOMES = {429: "limited", 499: "left"}


class ServerMetrics:
    """Made once a server; two servers in a process share nothing. All methods are cheap and thread-safe."""

    def __init__(self, model_name: str, *, compat: Literal["vllm", "none"] = "vllm") -> None:
        """`compat` "vllm" tells the same numbers under vLLM's names too."""
        self._model_name = model_name
        self._compat = compat
        self._created = time.time()
        self._numbers = Instruments()
        self._families = self._name(None)
        self._gaps: list[float] = []
        self._lock = threading.Lock()
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)  # processor time, memory and files, under their usual names

    def _name(self, facts: EngineFacts | None) -> list[Family]:
        families = own_families(self._numbers, self._model_name, facts)
        if self._compat == "vllm":
            families += vllm_families(self._numbers, self._model_name, facts, created=self._created)
        return families

    # -- the engine ----------------------------------------------------------------------------------------------

    def record_engine(self, *, max_model_len: int, num_blocks: int, block_size: int, num_tile_slots: int) -> None:
        """The engine is ready: tell its sizes, and no bucket that its context cannot reach. Before any request."""
        facts = EngineFacts(
            max_model_len=max_model_len, num_blocks=num_blocks, block_size=block_size, num_tile_slots=num_tile_slots
        )
        with self._lock:
            self._families = self._name(facts)

    def record_engine_up(self, num_up: int) -> None:
        """How many engines take requests."""
        with self._lock:
            self._numbers.engine_up.value = float(num_up)

    def watch_engine_memory(self, resident_bytes: Callable[[], float]) -> None:
        """Ask this at each scrape how much memory the engine's process holds."""
        with self._lock:
            self._numbers.engine_memory.ask = resident_bytes

    def record_engine_restart(self, reason: str) -> None:
        """Another engine is started, or tried to be, because the last one `died` or `hung`."""
        with self._lock:
            self._numbers.engine_restarts[reason,].value += 1

    def record_step(self, stats: StepStats, *, num_deferred: int = 0) -> None:
        """A step, or only gauges and counts where `step_seconds` is 0.

        `num_deferred` of those that wait do so for something else than room: a grammar, or a prompt that they share.
        """
        numbers = self._numbers
        with self._lock:
            if self._gaps:
                self._count_gaps()
            numbers.running.value = float(stats.num_running)
            numbers.waiting.value = float(stats.num_waiting)
            numbers.waiting_by_reason["capacity",].value = float(stats.num_waiting - num_deferred)
            numbers.waiting_by_reason["deferred",].value = float(num_deferred)
            numbers.kv_usage.value = stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0
            numbers.prompt_tokens.value += stats.num_prompt_tokens
            numbers.generation_tokens.value += stats.num_generated_tokens
            numbers.preemptions.value += stats.num_preemptions
            numbers.prefix_queries.value += stats.prefix_queries
            numbers.prefix_hits.value += stats.prefix_hits
            numbers.tile_queries.value += stats.tile_queries
            numbers.tile_hits.value += stats.tile_hits
            numbers.tiles_encoded.value += stats.num_encoded_tiles
            if stats.step_seconds:
                numbers.step_seconds.observe(stats.step_seconds)
                numbers.step_tokens.observe(stats.num_prompt_tokens + stats.num_generated_tokens)
            if stats.num_tile_shares:
                numbers.encode_seconds.observe(stats.encode_seconds)

    # -- requests and answers ------------------------------------------------------------------------------------

    def record_first_token(self, seconds: float) -> None:
        """Time from a request's arrival to an answer's first token."""
        with self._lock:
            self._numbers.first_token.observe(seconds)

    def record_gap(self, seconds: float) -> None:
        """Time between two tokens of an answer. Once a token: counted with the next step or scrape."""
        self._gaps.append(seconds)

    def _count_gaps(self) -> None:
        """Streams that had a token in both of two steps have the very same gap, so few numbers differ."""
        gaps = self._gaps[:]  # others may append meanwhile
        del self._gaps[: len(gaps)]
        for seconds, times in Counter(gaps).items():
            self._numbers.gap.observe(seconds, times)

    def record_finished(
        self,
        reason: str,
        *,
        e2e_seconds: float,
        prompt_tokens: int,
        generation_tokens: int,
        queue_seconds: float | None = None,
        decode_seconds: float | None = None,
        first_token_seconds: float | None = None,
        cached_tokens: int = 0,
        num_preemptions: int = 0,
    ) -> None:
        """An answer has ended, also by abort or error.

        `queue_seconds` is from arrival to the batch, None if it never got there; `first_token_seconds` is from arrival
        to the first token and `decode_seconds` from there to the last, None if there was none.
        """
        numbers = self._numbers
        with self._lock:
            numbers.finished[reason,].value += 1
            numbers.e2e.observe(e2e_seconds)
            numbers.prompt_length.observe(prompt_tokens)
            numbers.answer_length.observe(generation_tokens)
            numbers.request_preemptions.observe(num_preemptions)
            if queue_seconds is not None:
                numbers.queue.observe(queue_seconds)
            if first_token_seconds is not None:
                numbers.computed_prompt.observe(prompt_tokens - cached_tokens)
            if decode_seconds is not None:
                numbers.decode.observe(decode_seconds)
                if generation_tokens > 1:
                    numbers.time_per_token.observe(decode_seconds / (generation_tokens - 1))
            if queue_seconds is not None and first_token_seconds is not None:
                prefill_seconds = first_token_seconds - queue_seconds
                numbers.prefill.observe(prefill_seconds)
                numbers.inference.observe(prefill_seconds + (decode_seconds or 0.0))

    def record_request(self, *, n: int, max_tokens: int, longest_answer: int) -> None:
        """All `n` answers of a request have ended; they were allowed `max_tokens` each."""
        with self._lock:
            self._numbers.num_answers.observe(n)
            self._numbers.max_tokens.observe(max_tokens)
            self._numbers.longest_answer.observe(longest_answer)

    def record_rejection(self, code: str) -> None:
        """A request is refused because of the server's state; `code` is the error's."""
        with self._lock:
            self._numbers.rejections[_REJECTIONS.get(code, "other"),].value += 1

    def record_grammar(self, kind: str, *, seconds: float, accepted: bool) -> None:
        """A grammar has been compiled or refused; `kind` is GrammarSpec's."""
        with self._lock:
            self._numbers.grammars[kind, "accepted" if accepted else "refused"].value += 1
            self._numbers.compile_seconds.observe(seconds)

    # -- images --------------------------------------------------------------------------------------------------

    def record_images(self, *, data: int, http: int) -> None:
        """A request's images are loaded: so many came as data URLs, so many were downloaded."""
        with self._lock:
            self._numbers.images["data",].value += data
            self._numbers.images["http",].value += http
            self._numbers.images_per_request.observe(data + http)

    def record_image_lookup(self, *, hit: bool) -> None:
        """Whether an image was found among those decoded before."""
        with self._lock:
            self._numbers.image_queries.value += 1
            self._numbers.image_hits.value += hit

    def record_image_fetch(self, seconds: float) -> None:
        with self._lock:
            self._numbers.fetch_seconds.observe(seconds)

    def record_image_wait(self, seconds: float) -> None:
        """Time until a worker was free for an image."""
        with self._lock:
            self._numbers.image_wait_seconds.observe(seconds)

    def record_image_decode(self, seconds: float, *, preprocess_seconds: float | None = None) -> None:
        """An image has been decoded, and then cut and resized."""
        with self._lock:
            self._numbers.decode_seconds.observe(seconds)
            if preprocess_seconds is not None:
                self._numbers.preprocess_seconds.observe(preprocess_seconds)

    def record_image_error(self, code: str) -> None:
        """A request is refused for an image; `code` is the error's, as the client sees it."""
        with self._lock:
            self._numbers.image_errors[code if code in IMAGE_ERRORS else "other",].value += 1

    # -- HTTP ----------------------------------------------------------------------------------------------------

    def record_http(self, *, handler: str, method: str, status: int, seconds: float, key: str = "") -> None:
        """`handler` is the route's template, never the path; `key` the name of the API key, "" for none."""
        with self._lock:
            self._numbers.http_requests[handler, method, str(status)].value += 1
            self._numbers.http_seconds[handler, method].observe(seconds)
            if key:
                self._numbers.key_requests[key, _key_outcome(status)].value += 1

    def record_connections(self, num_open: int) -> None:
        self._numbers.connections.value = float(num_open)

    def record_refused_connection(self, reason: str) -> None:
        """`reason` is one of REFUSAL_REASONS."""
        with self._lock:
            self._numbers.refused_connections[reason,].value += 1

    def record_loop_lag(self, seconds: float, *, cause: StallCause | None = None) -> None:
        """How late a timer on the event loop was, and what held the loop up if that was for long."""
        with self._lock:
            self._numbers.loop_lag.value = max(self._numbers.loop_lag.value, seconds)
            if cause is not None:
                self._numbers.loop_stalls[cause,].value += 1

    def render(self) -> tuple[bytes, str]:
        """The text that Prometheus scrapes, and its content type."""
        with self._lock:
            self._count_gaps()
            text = "".join([family.render() for family in self._families])
        return text.encode() + generate_latest(self._process), CONTENT_TYPE

    @property
    def family_names(self) -> tuple[str, ...]:
        """As their TYPE lines have them: counters end in `_total`. `_created` lines go with another name."""
        return tuple(family.name for family in self._families)


def _key_outcome(status: int) -> str:
    return _KEY_OUTCOMES.get(status) or ("answered" if status < 400 else "refused" if status < 500 else "failed")


def _all_names() -> tuple[str, ...]:
    metrics = ServerMetrics("")
    metrics.record_engine(max_model_len=1, num_blocks=1, block_size=1, num_tile_slots=1)
    return metrics.family_names


# Every name that a server tells once it is ready.
FAMILY_NAMES = _all_names()
