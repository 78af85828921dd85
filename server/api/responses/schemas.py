"""JSON schemas for the OpenAPI page, of what a responses request has that is parsed by hand, and examples of it."""

from __future__ import annotations

from typing import Any

from server.api.schemas import EXAMPLE_IMAGE

_TEXT_PART = {
    "type": "object",
    "title": "Text",
    "required": ["type", "text"],
    "properties": {"type": {"enum": ["input_text", "output_text"]}, "text": {"type": "string"}},
}
_IMAGE_PART = {
    "type": "object",
    "title": "Image",
    "description": "Only in messages of role 'user'.",
    "required": ["type", "image_url"],
    "properties": {
        "type": {"const": "input_image"},
        "image_url": {"type": "string", "description": "A data URL or an http(s) URL."},
        "detail": {"enum": ["auto", "low", "high", "original"], "default": "auto"},
    },
}
_PARTS = {"type": "array", "minItems": 1, "items": {"anyOf": [_TEXT_PART, _IMAGE_PART]}}
_MESSAGE = {
    "type": "object",
    "title": "Message",
    "required": ["role", "content"],
    "properties": {
        "type": {"const": "message"},
        "role": {"enum": ["user", "assistant", "system", "developer"]},
        "content": {"anyOf": [{"type": "string"}, _PARTS]},
    },
}
_CALL = {
    "type": "object",
    "title": "Function call",
    "required": ["type", "call_id", "name", "arguments"],
    "properties": {
        "type": {"const": "function_call"},
        "call_id": {"type": "string"},
        "name": {"type": "string"},
        "arguments": {"type": "string", "description": "JSON."},
    },
}
_CALL_OUTPUT = {
    "type": "object",
    "title": "Function call's output",
    "required": ["type", "call_id", "output"],
    "properties": {
        "type": {"const": "function_call_output"},
        "call_id": {"type": "string"},
        "output": {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _TEXT_PART}]},
    },
}
_REASONING = {
    "type": "object",
    "title": "Reasoning",
    "description": "Of another model. Dropped.",
    "required": ["type"],
    "properties": {"type": {"const": "reasoning"}},
}
INPUT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "minItems": 1,
            "maxItems": 32_768,
            "items": {"anyOf": [_MESSAGE, _CALL, _CALL_OUTPUT, _REASONING]},
        },
    ],
    "description": "A text, or the items of a conversation.",
}
METADATA_SCHEMA: dict[str, Any] = {
    "type": "object",
    "maxProperties": 16,
    "propertyNames": {"maxLength": 64},
    "additionalProperties": {"type": "string", "maxLength": 512},
    "description": "Comes back with the answer.",
}

_RECEIPT_SCHEMA = {
    "type": "object",
    "properties": {"shop": {"type": "string"}, "total": {"type": "number"}},
    "required": ["shop", "total"],
    "additionalProperties": False,
}


def responses_examples(model: str) -> dict[str, dict[str, Any]]:
    """Requests as OpenAPI shows them: a name → a summary and a body."""
    picture = {"type": "input_image", "image_url": EXAMPLE_IMAGE, "detail": "low"}
    ask = {"type": "input_text", "text": "Which colour is this?"}
    return {
        "text": {
            "summary": "A question",
            "value": {"model": model, "input": "What is a heron?", "max_output_tokens": 64},
        },
        "image": {
            "summary": "A picture and a question about it",
            "value": {
                "model": model,
                "instructions": "Answer in one word.",
                "input": [{"role": "user", "content": [picture, ask]}],
                "max_output_tokens": 16,
                "temperature": 0,
            },
        },
        "conversation": {
            "summary": "A second question, with the first answer as it came back",
            "value": {
                "model": model,
                "input": [
                    {"role": "user", "content": [picture, ask]},
                    {
                        "type": "message",
                        "id": "msg_1",
                        "status": "completed",
                        "role": "assistant",
                        "content": [{"type": "output_text", "text": "Red.", "annotations": []}],
                    },
                    {"role": "user", "content": "And its opposite?"},
                ],
                "max_output_tokens": 16,
            },
        },
        "structured": {
            "summary": "An answer that keeps to a schema",
            "value": {
                "model": model,
                "input": "Invent a receipt.",
                "text": {"format": {"type": "json_schema", "name": "receipt", "schema": _RECEIPT_SCHEMA}},
                "max_output_tokens": 64,
            },
        },
        "stream": {
            "summary": "Events while the answer is written, with log-probabilities",
            "value": {
                "model": model,
                "input": "Count to ten.",
                "stream": True,
                "include": ["message.output_text.logprobs"],
                "top_logprobs": 2,
                "max_output_tokens": 32,
            },
        },
    }
