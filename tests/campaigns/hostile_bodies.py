"""Bodies that every endpoint answers, and each place in them: what a hostile body is made from.

Knows this server's endpoints and reads the rest from its OpenAPI page.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from tests.campaigns import hostile_values as values
from tests.campaigns.hostile_values import CANARY, many, quoted

Json = dict[str, Any]
Path = tuple[str | int, ...]

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TOOL = {"name": "look_up", "description": CANARY, "parameters": SCHEMA}
CHAT_TOOL = {"type": "function", "function": TOOL}
IMAGE = {"type": "image_url", "image_url": {"url": values.GOOD_PICTURE, "detail": "low"}}
_CALL = {"id": "c", "type": "function", "function": {"name": "look_up", "arguments": '{"a":1}'}}
_MESSAGES = [
    {"role": "system", "content": CANARY},
    {"role": "user", "content": [{"type": "text", "text": CANARY}, IMAGE]},
    {"role": "assistant", "content": None, "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "c", "content": CANARY},
    {"role": "user", "content": CANARY},
]
_INPUT = [
    {"role": "user", "content": [{"type": "input_text", "text": CANARY}]},
    {"type": "function_call", "call_id": "c", "name": "look_up", "arguments": '{"a":1}'},
    {"type": "function_call_output", "call_id": "c", "output": CANARY},
    {"type": "message", "role": "user", "content": [{"type": "input_image", "image_url": values.GOOD_PICTURE}]},
]

# The least that each endpoint answers.
MINIMAL: dict[str, Json] = {
    CHAT: {"messages": [{"role": "user", "content": CANARY}], "max_tokens": 2},
    COMPLETIONS: {"prompt": CANARY, "max_tokens": 2},
    RESPONSES: {"input": CANARY, "max_output_tokens": 2},
    TOKENIZE: {"prompt": CANARY},
    DETOKENIZE: {"tokens": [1, 5, 9]},
}
# A valid value of each field that has more fields in it, so that those are reached.
RICH: Json = {
    "messages": _MESSAGES,
    "input": _INPUT,
    "tools": [CHAT_TOOL],
    "tool_choice": {"type": "function", "function": {"name": "look_up"}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
    "structured_outputs": {"regex": "[a-z]+"},
    "grammar": {"type": "regex", "value": "[a-z]+"},
    "stream_options": {"include_usage": True},
    "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}},
    "metadata": {"a": CANARY},
    "logit_bias": {"5": 1},
    "mm_processor_kwargs": {"do_image_splitting": True},
    "prompt": [CANARY, CANARY],
    "tokens": [1, 5, 9],
}
# Fields without which another one is not looked at.
COMPANIONS: dict[str, Json] = {
    "stream_options": {"stream": True},
    "top_logprobs": {"logprobs": True, "include": ["message.output_text.logprobs"]},
    "tool_choice": {"tools": [CHAT_TOOL]},
    "tools": {"tool_choice": "required"},
    "continue_final_message": {"messages": [{"role": "assistant", "content": CANARY}]},
}
# Fields that are not on the page: other servers' and attackers'.
UNLISTED = (
    *("chat_template", "chat_template_kwargs", "media_io_kwargs", "prompt_embeds", "suffix", "background", "functions"),
    *("previous_response_id", "function_call", "allowed_token_ids", "bad_words", "prompt_logprobs", "use_beam_search"),
    *("mm_hashes", "multi_modal_uuids", "kv_transfer_params", "vllm_xargs", "logits_processors", "length_penalty"),
    *("__proto__", "__class__", "model_config", "self", "", CANARY, "lora_path", "stop_regex", "ebnf", "conversation"),
)


def _body_schema(page: Json, endpoint: str) -> Json:
    content: Json = page["paths"][endpoint]["post"]["requestBody"]["content"]["application/json"]
    return content


def examples(page: Json, endpoint: str) -> list[Json]:
    return [example["value"] for example in _body_schema(page, endpoint).get("examples", {}).values()]


def fields(page: Json, endpoint: str) -> Iterator[tuple[Path, Json]]:
    """Each place in an endpoint's body, with what the page says of it; then those that it does not know."""
    seen: set[Path] = set()
    for path, schema in _walk(_body_schema(page, endpoint)["schema"], ()):
        if path and path not in seen:
            seen.add(path)
            yield path, schema
    yield from (((name,), {}) for name in UNLISTED)


def _walk(schema: Any, path: Path) -> Iterator[tuple[Path, Json]]:
    if not isinstance(schema, dict) or len(path) > 7:
        return
    yield path, schema
    for inner in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from _walk(inner, path)
    for name, inner in schema.get("properties", {}).items():
        yield from _walk(inner, (*path, name))
    if "items" in schema:
        yield from _walk(schema["items"], (*path, 0))


def beyond(schema: Json) -> Iterator[str]:
    """Just outside what the page allows."""
    for kind in (schema, *schema.get("anyOf", ())):
        for key, step in (("minimum", -1), ("maximum", 1)):
            if key in kind:
                yield json.dumps(kind[key])
                yield json.dumps(kind[key] + step)
        if "maxLength" in kind:
            yield quoted("x" * (kind["maxLength"] + 1))
        if kind.get("maxItems", 10**9) <= 70_000:
            yield many("1", kind["maxItems"] + 1)
        for option in kind.get("enum", ()):
            yield quoted(f"{option} ")
            yield quoted(str(option).upper())


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every place in a body, the inner ones too."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key), inner
        yield from leaves(inner, (*path, key))


def put(body: Any, path: Path, value: Any) -> None:
    """Put a value at a place, with whatever must be there to hold it."""
    for step, following in pairwise(path):
        held = body.get(step) if isinstance(body, dict) else body[step] if step < len(body) else None
        if not isinstance(held, list if isinstance(following, int) else dict):
            held = [] if isinstance(following, int) else {}
            if isinstance(body, dict):
                body[step] = held
            else:
                body[step:] = [held]
        body = held
    last = path[-1]
    if isinstance(body, list):
        body[last : last + 1] = [value]
    else:
        body[last] = value
