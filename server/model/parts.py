"""Computations that pause between layers, so that their caller may do something else before it goes on with them."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeAlias

from torch import Tensor

# Pauses after each part, and returns what the whole is to compute.
Parts: TypeAlias = Generator[None, None, Tensor]


def run_to_end(parts: Parts) -> Tensor:
    """What the parts compute, without a pause."""
    while True:
        try:
            next(parts)
        except StopIteration as end:
            result: Tensor = end.value
            return result
