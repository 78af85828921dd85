"""What a server counts, each thing once, under no name: `names.py` and `vllm_names.py` tell it.

Bounds are at least as fine as those of every name that a histogram is told under.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal, get_args

from server.observability.exposition import Asked, Histogram, Number, Peak

FINISH_REASONS = ("stop", "length", "abort", "error")
WAITING_REASONS = ("capacity", "deferred")
REJECTION_REASONS = ("queue_full", "draining", "loading", "restarting", "engine_dead", "other")
ENGINE_LOSSES = ("died", "hung")
IMAGE_SOURCES = ("data", "http")
# What a picture can be refused for; whatever else an image worker says counts as "other".
IMAGE_ERRORS = (
    *("empty_image_file", "failed_to_download_image", "image_file_too_large", "image_parse_error", "image_too_large"),
    *("invalid_base64_image", "invalid_image_format", "invalid_image_url", "too_many_images", "other"),
)
GRAMMAR_KINDS = ("json_schema", "regex", "choice", "grammar")
GRAMMAR_OUTCOMES = ("accepted", "refused")
# Why a connection was not taken: so many are open, or the process may open no more files.
REFUSAL_REASONS = ("limit", "open_files")
# What held the event loop up for longer than this: code on the loop, other threads of the process, or neither of them.
LOOP_STALL_SECONDS = 0.1
StallCause = Literal["loop", "threads", "machine"]

WORK_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
TOKEN_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
REQUEST_SECONDS = (
    *(0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
STEP_TOKENS = (1.0, *(float(2**power) for power in range(3, 15)))
ANSWERS = (1.0, 2.0, 5.0, 10.0, 20.0)
PREEMPTIONS = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0)
IMAGES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0)


Labelled = dict[tuple[str, ...], Number]


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """What the engine turned out to be. `max_model_len` is in tokens, `block_size` tokens in a block."""

    max_model_len: int
    num_blocks: int
    block_size: int
    num_tile_slots: int


class Instruments:
    """All numbers of one server. Those by label are there from the start where the labels are known."""

    def __init__(self) -> None:
        # The engine.
        self.running = Number()
        self.waiting = Number()
        self.waiting_by_reason: Labelled = {(reason,): Number() for reason in WAITING_REASONS}
        self.kv_usage = Number()
        self.prompt_tokens = Number()
        self.generation_tokens = Number()
        self.prefix_queries = Number()
        self.prefix_hits = Number()
        self.tile_queries = Number()
        self.tile_hits = Number()
        self.tiles_encoded = Number()
        self.preemptions = Number()
        self.engine_up = Number()
        self.engine_memory = Asked()
        self.engine_restarts: Labelled = {(reason,): Number() for reason in ENGINE_LOSSES}
        self.step_seconds = Histogram(WORK_SECONDS)
        self.step_tokens = Histogram(STEP_TOKENS)
        self.encode_seconds = Histogram(WORK_SECONDS)
        # Requests and answers.
        self.finished: Labelled = {(reason,): Number() for reason in FINISH_REASONS}
        self.rejections: Labelled = {(reason,): Number() for reason in REJECTION_REASONS}
        self.first_token = Histogram(FIRST_TOKEN_SECONDS)
        self.gap = Histogram(TOKEN_SECONDS)
        self.time_per_token = Histogram(TOKEN_SECONDS)
        self.e2e = Histogram(REQUEST_SECONDS)
        self.queue = Histogram(REQUEST_SECONDS)
        self.prefill = Histogram(REQUEST_SECONDS)
        self.decode = Histogram(REQUEST_SECONDS)
        self.inference = Histogram(REQUEST_SECONDS)
        self.prompt_length = Histogram(TOKENS)
        self.computed_prompt = Histogram(TOKENS)
        self.answer_length = Histogram(TOKENS)
        self.longest_answer = Histogram(TOKENS)
        self.max_tokens = Histogram(TOKENS)
        self.num_answers = Histogram(ANSWERS)
        self.request_preemptions = Histogram(PREEMPTIONS)
        # Images.
        self.images: Labelled = {(source,): Number() for source in IMAGE_SOURCES}
        self.image_errors: Labelled = {(code,): Number() for code in IMAGE_ERRORS}
        self.image_queries = Number()
        self.image_hits = Number()
        self.images_per_request = Histogram(IMAGES)
        self.fetch_seconds = Histogram(WORK_SECONDS)
        self.image_wait_seconds = Histogram(WORK_SECONDS)
        self.decode_seconds = Histogram(WORK_SECONDS)
        self.preprocess_seconds = Histogram(WORK_SECONDS)
        # Grammars.
        self.grammars: Labelled = {(kind, outcome): Number() for kind in GRAMMAR_KINDS for outcome in GRAMMAR_OUTCOMES}
        self.compile_seconds = Histogram(WORK_SECONDS)
        # The event loop.
        self.loop_lag = Peak()
        self.loop_stalls: Labelled = {(cause,): Number() for cause in get_args(StallCause)}
        # Connections and HTTP.
        self.connections = Number()
        self.refused_connections: Labelled = {(reason,): Number() for reason in REFUSAL_REASONS}
        self.http_requests: Labelled = defaultdict(Number)
        self.key_requests: Labelled = defaultdict(Number)
        self.http_seconds: dict[tuple[str, ...], Histogram] = defaultdict(lambda: Histogram(REQUEST_SECONDS))
