"""How answers are sampled, and the detail of pictures that name none. What is not set is left to the server."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from server.chat.errors import ChatError
from server.chat.images import DETAILS


def parse_temperature(text: str) -> float:
    """Raises ValueError, as all of these parsers do, with a message that names the limit and the value."""
    value = _number(text)
    if not 0 <= value <= 2:
        raise ValueError(f"must be from 0 to 2, not {text}")
    return value


def parse_top_p(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise ValueError(f"must be above 0 and at most 1, not {text}")
    return value


def parse_max_tokens(text: str) -> int:
    value = _integer(text)
    if value < 1:
        raise ValueError(f"must be at least 1, not {text}")
    return value


def parse_seed(text: str) -> int:
    return _integer(text)


def parse_detail(text: str) -> str:
    if text not in DETAILS:
        raise ValueError(f"must be one of {', '.join(DETAILS)}, not {text!r}")
    return text


PARSERS: dict[str, Callable[[str], Any]] = {
    "temperature": parse_temperature,
    "top_p": parse_top_p,
    "max_tokens": parse_max_tokens,
    "seed": parse_seed,
    "detail": parse_detail,
}


@dataclass(slots=True)
class Settings:
    """None is the server's own default."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    detail: str = "auto"

    def set(self, name: str, text: str) -> None:
        """Set one by its name; the text `default` takes it back. Raises ChatError."""
        if name not in PARSERS:
            raise ChatError(f"there is no setting {name!r}; there are {', '.join(PARSERS)}")
        if text == "default":
            (value,) = (field.default for field in fields(self) if field.name == name)
        else:
            try:
                value = PARSERS[name](text)
            except ValueError as error:
                raise ChatError(f"{name}: {error}") from None
        setattr(self, name, value)

    def body(self) -> dict[str, Any]:
        """The fields of a request that are set."""
        sampling = {name: getattr(self, name) for name in PARSERS if name != "detail"}
        return {name: value for name, value in sampling.items() if value is not None}

    def lines(self) -> list[str]:
        values = [(name, getattr(self, name)) for name in PARSERS]
        return [f"{name} {'(the server decides)' if value is None else value}" for name, value in values]


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"must be a number, not {text!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"must be a finite number, not {text}")
    return value


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"must be a whole number, not {text!r}") from None
