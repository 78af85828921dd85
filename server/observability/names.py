"""The names of a server's own metrics, all under `idefics2:`. Where vLLM has a name for the same thing, it is that.

Labels are few and bounded: never a user, an URL or a request id.
"""

from __future__ import annotations

from server.observability.exposition import Coarser, Family, Page
from server.observability.instruments import EngineFacts, Instruments
from server.observability.logs import NUM_DROPPED

PREFIX = "idefics2:"


def own_families(numbers: Instruments, model_name: str, facts: EngineFacts | None) -> list[Family]:
    """`facts` is None while the model loads: then nothing is told of the caches' sizes."""
    page = Page(PREFIX, {"model_name": model_name})
    _add_engine(page, numbers)
    _add_requests(page, numbers)
    add_lengths(page, numbers, facts)
    _add_images(page, numbers)
    _add_grammars(page, numbers)
    _add_http(page, numbers)
    if facts is not None:
        _add_facts(page, model_name, facts)
    return page.families


def _add_engine(page: Page, numbers: Instruments) -> None:
    page.add("gauge", "num_requests_running", "Requests in the running batch.", numbers.running)
    page.add("gauge", "num_requests_waiting", "Requests queued for the batch.", numbers.waiting)
    page.add_all(
        "gauge",
        "num_requests_waiting_by_reason",
        "Those that wait for room, and those that wait for a grammar or for a prompt that they share.",
        members=numbers.waiting_by_reason,
        label_names=("reason",),
    )
    page.add("gauge", "kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", numbers.kv_usage)
    page.add("counter", "prompt_tokens", "Prompt tokens computed.", numbers.prompt_tokens)
    page.add("counter", "generation_tokens", "Tokens generated.", numbers.generation_tokens)
    page.add("counter", "prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", numbers.prefix_queries)
    page.add("counter", "prefix_cache_hits", "Prompt tokens found in the prefix cache.", numbers.prefix_hits)
    page.add("counter", "tile_cache_queries", "Tiles looked up in the encoder cache.", numbers.tile_queries)
    page.add("counter", "tile_cache_hits", "Tiles found in the encoder cache.", numbers.tile_hits)
    page.add("counter", "tiles_encoded", "Tiles run through the vision tower.", numbers.tiles_encoded)
    page.add("counter", "num_preemptions", "Requests put back for lack of blocks.", numbers.preemptions)
    page.add("gauge", "engine_up", "Engines that take requests.", numbers.engine_up)
    page.add(
        "gauge",
        "engine_resident_memory_bytes",
        "Main memory of the engine's process, 0 where it is this one.",
        numbers.engine_memory,
    )
    page.add_all(
        "counter",
        "engine_restarts",
        "Engines started because the last one died or hung.",
        members=numbers.engine_restarts,
        label_names=("reason",),
    )
    page.add("histogram", "step_seconds", "Length of an engine step.", numbers.step_seconds)
    page.add("histogram", "step_tokens", "Tokens that an engine step computed.", numbers.step_tokens)
    page.add(
        "histogram",
        "image_encode_seconds",
        "Time in the vision tower, in steps that encode tiles or a share of one.",
        numbers.encode_seconds,
    )


def _add_requests(page: Page, numbers: Instruments) -> None:
    page.add_all(
        "counter", "requests", "Answers ended, by reason.", members=numbers.finished, label_names=("finish_reason",)
    )
    page.add_all(
        "counter",
        "admission_rejections",
        "Requests refused because of the server's state, by reason.",
        members=numbers.rejections,
        label_names=("reason",),
    )
    seconds = (
        ("time_to_first_token_seconds", "From arrival to the first token.", numbers.first_token),
        ("inter_token_latency_seconds", "Between two tokens.", numbers.gap),
        ("request_time_per_output_token_seconds", "Mean of an answer, after its first token.", numbers.time_per_token),
        ("e2e_request_latency_seconds", "From arrival to the last token.", numbers.e2e),
        ("request_queue_time_seconds", "From arrival to the batch.", numbers.queue),
        ("request_prefill_time_seconds", "From the batch to the first token.", numbers.prefill),
        ("request_decode_time_seconds", "From the first token to the last.", numbers.decode),
        ("request_inference_time_seconds", "From the batch to the last token.", numbers.inference),
    )
    for name, documentation, histogram in seconds:
        page.add("histogram", name, documentation, histogram)
    page.add("histogram", "request_params_n", "Answers asked for in a request.", numbers.num_answers)
    page.add("histogram", "request_num_preemptions", "Times an answer was put back.", numbers.request_preemptions)


def add_lengths(page: Page, numbers: Instruments, facts: EngineFacts | None) -> None:
    """Histograms of tokens, up to the context's length once it is known. vLLM's are the same."""
    lengths = (
        ("request_prompt_tokens", "Prompt tokens of a request.", numbers.prompt_length),
        ("request_prefill_kv_computed_tokens", "Prompt tokens that were not cached.", numbers.computed_prompt),
        ("request_generation_tokens", "Tokens of an answer.", numbers.answer_length),
        ("request_max_num_generation_tokens", "Tokens of a request's longest answer.", numbers.longest_answer),
        ("request_params_max_tokens", "Most tokens that an answer might have.", numbers.max_tokens),
    )
    for name, documentation, histogram in lengths:
        limit = facts.max_model_len if facts is not None else histogram.bounds[-1]
        bounds = [bound for bound in histogram.bounds if bound <= limit]
        page.add("histogram", name, documentation, Coarser(histogram, bounds))


def _add_images(page: Page, numbers: Instruments) -> None:
    page.add_all(
        "counter", "images", "Images accepted, by how they were sent.", members=numbers.images, label_names=("source",)
    )
    page.add_all(
        "counter",
        "image_errors",
        "Requests refused for an image, by error code.",
        members=numbers.image_errors,
        label_names=("code",),
    )
    page.add("counter", "image_cache_queries", "Images looked up among those decoded before.", numbers.image_queries)
    page.add("counter", "image_cache_hits", "Images found among those decoded before.", numbers.image_hits)
    page.add("histogram", "images_per_request", "Images of a request that has any.", numbers.images_per_request)
    page.add("histogram", "image_fetch_seconds", "Download of one image.", numbers.fetch_seconds)
    page.add("histogram", "image_wait_seconds", "Wait of one image for a worker.", numbers.image_wait_seconds)
    page.add("histogram", "image_decode_seconds", "From the file of one image to pixels.", numbers.decode_seconds)
    page.add("histogram", "image_preprocess_seconds", "From its pixels to tiles.", numbers.preprocess_seconds)


def _add_grammars(page: Page, numbers: Instruments) -> None:
    page.add_all(
        "counter",
        "grammar_compiles",
        "Grammars that constrained requests asked for.",
        members=numbers.grammars,
        label_names=("kind", "outcome"),
    )
    page.add("histogram", "grammar_compile_seconds", "Compilation of one grammar.", numbers.compile_seconds)


def _add_http(page: Page, numbers: Instruments) -> None:
    page.add(
        "gauge", "event_loop_lag_seconds", "Longest wait for the event loop since the last scrape.", numbers.loop_lag
    )
    page.add_all(
        "counter",
        "event_loop_stalls",
        "Waits of more than 0.1 s, by what took the time: code on the loop, other threads, or the machine.",
        members=numbers.loop_stalls,
        label_names=("cause",),
    )
    page.add("gauge", "open_connections", "Connections of clients that are open.", numbers.connections)
    page.add_all(
        "counter",
        "connections_refused",
        "Connections not taken, as too many were open or the process may open no more files.",
        members=numbers.refused_connections,
        label_names=("reason",),
    )
    page.add("counter", "log_lines_dropped", "Lines that nobody read from the log in time.", NUM_DROPPED)
    page.add_all(
        "counter",
        "http_requests",
        "HTTP requests answered; 499 is a client that left.",
        members=numbers.http_requests,
        label_names=("handler", "method", "status"),
        labels={},
    )
    page.add_all(
        "counter",
        "requests_by_key",
        "HTTP requests that showed an API key, by its name: answered, refused, limited (429), failed, or left.",
        members=numbers.key_requests,
        label_names=("key", "outcome"),
        labels={},
    )
    page.add_all(
        "histogram",
        "http_request_duration_seconds",
        "From the first byte of a request to the last of its answer.",
        members=numbers.http_seconds,
        label_names=("handler", "method"),
        labels={},
    )


def _add_facts(page: Page, model_name: str, facts: EngineFacts) -> None:
    told = {
        "model_name": model_name,
        "max_model_len": str(facts.max_model_len),
        "num_blocks": str(facts.num_blocks),
        "block_size": str(facts.block_size),
        "num_tile_slots": str(facts.num_tile_slots),
    }
    page.add_info("cache_config_info", "Sizes of the caches and of the context, as labels.", told)
