"""All metrics of a server. The only module that knows prometheus_client; callers hand in plain numbers.

Names begin with `idefics2:`. Labels are few and bounded: never a user, an URL or a request id.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from server.types import StepStats

PREFIX = "idefics2:"
FINISH_REASONS = ("stop", "length", "abort", "error")

_MILLISECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_TOKEN_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0),
)
_FIRST_TOKEN_SECONDS = (
    *(0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
)
_REQUEST_SECONDS = (
    *(0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0),
    *(10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 240.0, 480.0, 960.0),
)
_TOKENS = tuple(float(digit * 10**power) for power in range(5) for digit in (1, 2, 5))


class ServerMetrics:
    """Made once a server; two servers in a process share nothing. All methods are cheap and thread-safe."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self._init_engine()
        self._init_requests()
        self._init_images()
        self._http_requests = Counter(
            f"{PREFIX}http_requests",
            "HTTP requests answered; 499 is a client that left.",
            ("handler", "method", "status"),
            registry=self._registry,
        )
        self._http_seconds = Histogram(
            f"{PREFIX}http_request_duration_seconds",
            "From the first byte of a request to the last of its answer.",
            ("handler", "method"),
            buckets=_REQUEST_SECONDS,
            registry=self._registry,
        )

    def _init_engine(self) -> None:
        self._running = self._gauge("num_requests_running", "Requests in the running batch.")
        self._waiting = self._gauge("num_requests_waiting", "Requests queued for the batch.")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens computed.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._tile_queries = self._counter("tile_cache_queries", "Tiles looked up in the encoder cache.")
        self._tile_hits = self._counter("tile_cache_hits", "Tiles found in the encoder cache.")
        self._tiles_encoded = self._counter("tiles_encoded", "Tiles run through the vision tower.")
        self._preemptions = self._counter("num_preemptions", "Requests put back into the queue for lack of blocks.")
        self._step_seconds = self._histogram("step_seconds", "Length of an engine step.", _MILLISECONDS)
        self._encode_seconds = self._histogram(
            "image_encode_seconds", "Time in the vision tower, in steps that encode tiles.", _MILLISECONDS
        )

    def _init_requests(self) -> None:
        self._requests = Counter(
            f"{PREFIX}requests",
            "Requests ended, by reason.",
            ("model_name", "finish_reason"),
            registry=self._registry,
        )
        for reason in FINISH_REASONS:
            self._requests.labels(self._model_name, reason)
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN_SECONDS
        )
        self._gap = self._histogram("inter_token_latency_seconds", "Between two tokens.", _TOKEN_SECONDS)
        self._time_per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean of a request, after its first token.", _TOKEN_SECONDS
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.", _REQUEST_SECONDS)
        self._queue = self._histogram("request_queue_time_seconds", "From arrival to the batch.", _REQUEST_SECONDS)
        self._prompt_length = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._answer_length = self._histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)

    def _init_images(self) -> None:
        self._images = self._counter("images", "Images accepted.")
        self._image_errors = Counter(
            f"{PREFIX}image_errors", "Images refused, by error code.", ("model_name", "code"), registry=self._registry
        )
        self._fetch_seconds = self._histogram("image_fetch_seconds", "Download of one image.", _MILLISECONDS)
        self._decode_seconds = self._histogram("image_decode_seconds", "Decode and resize of one image.", _MILLISECONDS)

    def record_step(self, stats: StepStats) -> None:
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._kv_usage.set(stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0)
        self._prompt_tokens.inc(stats.num_prompt_tokens)
        self._generation_tokens.inc(stats.num_generated_tokens)
        self._preemptions.inc(stats.num_preemptions)
        self._prefix_queries.inc(stats.prefix_queries)
        self._prefix_hits.inc(stats.prefix_hits)
        self._tile_queries.inc(stats.tile_queries)
        self._tile_hits.inc(stats.tile_hits)
        self._tiles_encoded.inc(stats.num_encoded_tiles)
        self._step_seconds.observe(stats.step_seconds)
        if stats.num_encoded_tiles:
            self._encode_seconds.observe(stats.encode_seconds)

    def record_first_token(self, seconds: float) -> None:
        """Time from a request's arrival to its first token."""
        self._first_token.observe(seconds)

    def record_gap(self, seconds: float) -> None:
        """Time between two tokens of a request."""
        self._gap.observe(seconds)

    def record_finished(
        self,
        reason: str,
        *,
        e2e_seconds: float,
        prompt_tokens: int,
        generation_tokens: int,
        queue_seconds: float | None = None,
        decode_seconds: float | None = None,
    ) -> None:
        """A request has ended, also by abort or error.

        `queue_seconds` is from arrival to the batch, None if it never got there; `decode_seconds` is from the first
        token to the last, None if there was none.
        """
        self._requests.labels(self._model_name, reason).inc()
        self._e2e.observe(e2e_seconds)
        self._prompt_length.observe(prompt_tokens)
        self._answer_length.observe(generation_tokens)
        if queue_seconds is not None:
            self._queue.observe(queue_seconds)
        if decode_seconds is not None and generation_tokens > 1:
            self._time_per_token.observe(decode_seconds / (generation_tokens - 1))

    def record_image_fetch(self, seconds: float) -> None:
        self._fetch_seconds.observe(seconds)

    def record_image_decode(self, seconds: float) -> None:
        """An image has been decoded and resized, which also counts it as accepted."""
        self._images.inc()
        self._decode_seconds.observe(seconds)

    def record_image_error(self, code: str) -> None:
        """`code` is the error's code as the client sees it, of which there are few."""
        self._image_errors.labels(self._model_name, code).inc()

    def record_http(self, *, handler: str, method: str, status: int, seconds: float) -> None:
        """`handler` is the route's template, never the path."""
        self._http_requests.labels(handler, method, str(status)).inc()
        self._http_seconds.labels(handler, method).observe(seconds)

    def render(self) -> tuple[bytes, str]:
        """The text that Prometheus scrapes, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def _counter(self, name: str, documentation: str) -> Counter:
        family = Counter(PREFIX + name, documentation, ("model_name",), registry=self._registry)
        return family.labels(self._model_name)

    def _gauge(self, name: str, documentation: str) -> Gauge:
        family = Gauge(PREFIX + name, documentation, ("model_name",), registry=self._registry)
        return family.labels(self._model_name)

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float]) -> Histogram:
        family = Histogram(PREFIX + name, documentation, ("model_name",), registry=self._registry, buckets=buckets)
        return family.labels(self._model_name)
