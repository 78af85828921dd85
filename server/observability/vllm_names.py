"""The same numbers under vLLM's names, for dashboards, autoscalers and endpoint pickers that were made for it.

Names, labels, types, units and buckets are those of vLLM 0.32, `_created` lines included. What this server does not
have is told as vLLM tells it when it is idle: no external cache, no adapters, never asleep. Families that vLLM itself
leaves out unless they are switched on (speculative decoding, block residency, corrupted requests) are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from server.observability.exposition import Coarser, Family, Histogram, Number, Page, Total
from server.observability.instruments import EngineFacts, Instruments
from server.observability.names import add_lengths

PREFIX = "vllm:"
ENGINE = "0"

_FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_STEP_TOKENS = (1.0, *(float(2**power) for power in range(3, 15)))
_ANSWERS = (1.0, 2.0, 5.0, 10.0, 20.0)
_PREEMPTIONS = (1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0)


def vllm_families(numbers: Instruments, model_name: str, facts: EngineFacts | None, *, created: float) -> list[Family]:
    """`created` is when counting began, in Unix seconds."""
    page = Page(PREFIX, {"model_name": model_name, "engine": ENGINE}, created=created)
    _add_state(page, numbers)
    _add_token_counters(page, numbers)
    _add_request_counters(page, numbers, model_name)
    _add_seconds(page, numbers)
    _add_counts(page, numbers, facts)
    # The value is a time: readers take the newest of the adapters' sets, and ours never changes.
    page.add_info(
        "lora_requests_info",
        "Adapters in use: none, and there is no room for any.",
        {"max_lora": "0", "running_lora_adapters": "", "waiting_lora_adapters": ""},
        value=created,
    )
    if facts is not None:
        told = {"block_size": str(facts.block_size), "num_gpu_blocks": str(facts.num_blocks), "engine": ENGINE}
        page.add_info("cache_config_info", "Settings of the KV cache, as labels.", told)
    return page.families


def _add_state(page: Page, numbers: Instruments) -> None:
    page.add("gauge", "num_requests_running", "Requests in the running batch.", numbers.running)
    page.add("gauge", "num_requests_waiting", "Requests queued for the batch.", numbers.waiting)
    page.add_all(
        "gauge",
        "num_requests_waiting_by_reason",
        "Those that wait for room, and those that wait for a grammar or for a prompt that they share.",
        members=numbers.waiting_by_reason,
        label_names=("reason",),
    )
    page.add_all(
        "gauge",
        "engine_sleep_state",
        "The engine is always awake.",
        members={("awake",): Number(1), ("weights_offloaded",): Number(), ("discard_all",): Number()},
        label_names=("sleep_state",),
    )
    page.add("gauge", "kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", numbers.kv_usage)


def _add_token_counters(page: Page, numbers: Instruments) -> None:
    computed, cached, none = numbers.prompt_tokens, numbers.prefix_hits, Number()
    page.add("counter", "prompt_tokens", "Prompt tokens, computed or cached.", Total(computed, cached))
    page.add_all(
        "counter",
        "prompt_tokens_by_source",
        "Prompt tokens by where they came from.",
        members={("local_compute",): computed, ("local_cache_hit",): cached, ("external_kv_transfer",): none},
        label_names=("source",),
    )
    page.add("counter", "prompt_tokens_cached", "Prompt tokens that were cached.", cached)
    tiers = ("host", "p2p", "disk", "external_unspecified")
    page.add_all(
        "counter",
        "prompt_tokens_cached_by_source",
        "Prompt tokens that were cached, by where.",
        members={("device",): cached, **{(tier,): none for tier in tiers}},
        label_names=("source",),
    )
    page.add("counter", "generation_tokens", "Tokens generated.", numbers.generation_tokens)
    page.add("counter", "prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", numbers.prefix_queries)
    page.add("counter", "prefix_cache_hits", "Prompt tokens found in the prefix cache.", cached)
    page.add("counter", "external_prefix_cache_queries", "There is no external cache.", none)
    page.add("counter", "external_prefix_cache_hits", "There is no external cache.", none)
    page.add("counter", "mm_cache_queries", "Images looked up among those decoded before.", numbers.image_queries)
    page.add("counter", "mm_cache_hits", "Images found among those decoded before.", numbers.image_hits)
    page.add("counter", "num_preemptions", "Requests put back for lack of blocks.", numbers.preemptions)


def _add_request_counters(page: Page, numbers: Instruments, model_name: str) -> None:
    page.add_all(
        "counter",
        "request_success",
        "Answers ended, by reason.",
        members={**numbers.finished, ("repetition",): Number()},
        label_names=("finished_reason",),
    )
    page.add_all(
        "counter",
        "admission_rejections",
        "Requests refused by a limit of the queue, by limit.",
        members={("max_num_queued_reqs",): numbers.rejections["queue_full",], ("max_num_queued_tokens",): Number()},
        label_names=("reason",),
        labels={"model_name": model_name},
    )


def _add_seconds(page: Page, numbers: Instruments) -> None:
    def add(name: str, documentation: str, histogram: Histogram, bounds: Sequence[float]) -> None:
        page.add("histogram", name, documentation, Coarser(histogram, bounds))

    add("time_to_first_token_seconds", "From arrival to the first token.", numbers.first_token, _FIRST_TOKEN_SECONDS)
    add("inter_token_latency_seconds", "Between two tokens.", numbers.gap, _TOKEN_SECONDS)
    name = "request_time_per_output_token_seconds"
    add(name, "Mean of an answer, after its first token.", numbers.time_per_token, _TOKEN_SECONDS)
    add("e2e_request_latency_seconds", "From arrival to the last token.", numbers.e2e, _REQUEST_SECONDS)
    add("request_queue_time_seconds", "From arrival to the batch.", numbers.queue, _REQUEST_SECONDS)
    add("request_inference_time_seconds", "From the batch to the last token.", numbers.inference, _REQUEST_SECONDS)
    add("request_prefill_time_seconds", "From the batch to the first token.", numbers.prefill, _REQUEST_SECONDS)
    add("request_decode_time_seconds", "From the first token to the last.", numbers.decode, _REQUEST_SECONDS)


def _add_counts(page: Page, numbers: Instruments, facts: EngineFacts | None) -> None:
    add_lengths(page, numbers, facts)
    steps = Coarser(numbers.step_tokens, _STEP_TOKENS)
    page.add("histogram", "iteration_tokens_total", "Tokens that an engine step computed.", steps)
    page.add("histogram", "request_params_n", "Answers asked for.", Coarser(numbers.num_answers, _ANSWERS))
    preemptions = Coarser(numbers.request_preemptions, _PREEMPTIONS)
    page.add("histogram", "request_num_preemptions", "Times an answer was put back.", preemptions)
