"""JSON schemas for the OpenAPI page, of what is parsed by hand, and the example that the page shows."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

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
                "detail": {"enum": ["auto", "low", "high"], "default": "auto"},
            },
        },
    },
}
MESSAGES_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "maxItems": 1024,
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
                ]
            },
        },
    },
}


def chat_example(model: str) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": EXAMPLE_IMAGE}},
                    {"type": "text", "text": "Which colour is this?"},
                ],
            }
        ],
        "max_completion_tokens": 64,
        "temperature": 0,
    }


def request_body(body: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    """What FastAPI would write for a body that it parsed itself."""
    schema = body.model_json_schema()
    definitions = schema.pop("$defs", {})
    content = {"application/json": {"schema": _inline(schema, definitions), "example": example}}
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
