"""What the scheduler counts between two looks at it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counts:
    """The counting fields of `StepStats`, by the same names."""

    num_computed_tokens: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    tile_queries: int = 0
    tile_hits: int = 0
    num_encoded_tiles: int = 0
    num_tile_shares: int = 0
