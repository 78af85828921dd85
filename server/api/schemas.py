"""What the OpenAPI page shows of requests and errors: JSON schemas of what is parsed by hand, and examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from server.api.errors import ErrorAnswer

# A red square of 32 × 32 pixels.
EXAMPLE_IMAGE = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2jAAAAKklEQVR42u3NMQEAAAQAMATRP5QwSvBtBZbTHZ8qngkEAoFA"
    "IBAIBIIrC9KAAVhVsgYjAAAAAElFTkSuQmCC"
)

STOP_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "string"}, "maxItems": 4}],
    "description": "Text that ends the answer and is not part of it.",
}
LOGIT_BIAS_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    "description": "Token ids, as strings, to what is added to their logits.",
}
_TEXT_PART = {
    "type": "object",
    "title": "Text",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
_IMAGE_PART = {
    "type": "object",
    "title": "Image",
    "description": "Only in messages of role 'user'.",
    "required": ["type", "image_url"],
    "properties": {
        "type": {"const": "image_url"},
        "image_url": {
            "type": "object",
            "required": ["url"],
            "properties": {
                "url": {"type": "string", "description": "A data URL or an http(s) URL."},
                "detail": {"enum": ["auto", "low", "high", "original"], "default": "auto"},
            },
        },
    },
}
MESSAGES_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "maxItems": 32_768,
    "items": {
        "type": "object",
        "title": "Message",
        "required": ["role"],
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "minItems": 1, "items": {"anyOf": [_TEXT_PART, _IMAGE_PART]}},
                    {"type": "null"},
                ],
                "description": "Null only in messages of role 'assistant'.",
            },
            "tool_calls": {
                "type": "array",
                "description": "Of an assistant. The model reads them as text.",
                "items": {
                    "type": "object",
                    "required": ["function"],
                    "properties": {
                        "id": {"type": "string"},
                        "type": {"const": "function"},
                        "function": {
                            "type": "object",
                            "required": ["name", "arguments"],
                            "properties": {"name": {"type": "string"}, "arguments": {"type": "string"}},
                        },
                    },
                },
            },
            "tool_call_id": {"type": "string", "description": "Of a message of role 'tool'."},
        },
    },
}


# What a streamed answer's body is, beside the schema of one that is not.
STREAM_CONTENT: dict[str, Any] = {
    # No schema: readers of this page apply it to the whole body, or to each event, as they like.
    "text/event-stream": {"example": 'data: {"object":"chat.completion.chunk","choices":[…]}\n\ndata: [DONE]\n\n'}
}
_ERRORS = {
    400: "The request is at fault; `param` and `code` say where and how.",
    404: "The model is not served here.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "The queue is full; try again after Retry-After seconds.",
    500: "The server failed this request.",
    503: "The server is loading, shutting down or broken; try again after Retry-After seconds.",
}
_BLUE_IMAGE = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAGklEQVR42mOUs7nDQApgYiARjGoY1TB0NAAA5nMBViLjv7IAAAAASUVORK5CYII="
)


def error_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: those statuses, or all that an endpoint with a body can answer besides 200."""
    return {status: {"model": ErrorAnswer, "description": _ERRORS[status]} for status in statuses or _ERRORS}


def chat_examples(model: str) -> dict[str, dict[str, Any]]:
    """Requests as OpenAPI shows them: a name → a summary and a body."""
    weather = {
        "name": "get_weather",
        "description": "The weather of a place, now.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["place", "unit"],
            "additionalProperties": False,
        },
    }
    receipt = {
        "type": "object",
        "properties": {"shop": {"type": "string"}, "total": {"type": "number"}},
        "required": ["shop", "total"],
        "additionalProperties": False,
    }
    return {
        "image": _example(
            "A picture and a question",
            model,
            [_picture(EXAMPLE_IMAGE), {"type": "text", "text": "Which colour is this?"}],
            max_completion_tokens=64,
            temperature=0,
        ),
        "text": _example("Text alone", model, "Name three primary colours.", max_completion_tokens=64),
        "two_images": _example(
            "Two pictures, the second in more detail",
            model,
            [
                _picture(EXAMPLE_IMAGE, detail="low"),
                _picture(_BLUE_IMAGE, detail="high"),
                {"type": "text", "text": "What is the difference?"},
            ],
            max_completion_tokens=64,
        ),
        "structured": _example(
            "An answer that keeps to a JSON schema",
            model,
            [_picture(EXAMPLE_IMAGE), {"type": "text", "text": "Read this receipt."}],
            response_format={"type": "json_schema", "json_schema": {"name": "receipt", "schema": receipt}},
            max_completion_tokens=128,
        ),
        "tools": _example(
            "A call that must be made",
            model,
            "Is it warm in Oslo?",
            tools=[{"type": "function", "function": weather}],
            tool_choice={"type": "function", "function": {"name": "get_weather"}},
            max_completion_tokens=128,
        ),
        "streaming": _example(
            "Two answers at once, as events, with log-probabilities and token counts",
            model,
            "Count to ten.",
            n=2,
            logprobs=True,
            top_logprobs=2,
            max_completion_tokens=32,
            stream=True,
            stream_options={"include_usage": True},
        ),
    }


def _example(summary: str, model: str, content: str | list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    return {
        "summary": summary,
        "value": {"model": model, "messages": [{"role": "user", "content": content}], **fields},
    }


def _picture(url: str, **detail: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **detail}}


def request_body(body: type[BaseModel], examples: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What FastAPI would write for a body that it parsed itself. `examples`: a name → a summary and a value."""
    schema = body.model_json_schema()
    definitions = schema.pop("$defs", {})
    content = {"application/json": {"schema": _inline(schema, definitions), "examples": dict(examples)}}
    return {"requestBody": {"required": True, "content": content}}


def _inline(node: Any, definitions: dict[str, Any]) -> Any:
    """Pydantic's references point into the schema, where OpenAPI does not look; our types do not recur."""
    if isinstance(node, dict):
        if "$ref" in node:
            name = node["$ref"].removeprefix("#/$defs/")
            return _inline({**definitions[name], **{k: v for k, v in node.items() if k != "$ref"}}, definitions)
        return {key: _inline(value, definitions) for key, value in node.items()}
    if isinstance(node, list):
        return [_inline(value, definitions) for value in node]
    return node
