"""Requests as the runner keeps them, and steps for it, built by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from server.engine.step import NewRequest
from server.runner.input_batch import RequestState
from server.types import PlaceholderRange, SamplingParams, Tile


def make_new(
    prompt: Sequence[int] = (5,),
    *,
    request_id: str = "r",
    masked: tuple[int, ...] = (),
    eos: tuple[int, ...] = (),
    tiles: tuple[Tile, ...] = (),
    placeholders: tuple[PlaceholderRange, ...] = (),
    **sampling: object,
) -> NewRequest:
    return NewRequest(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        sampling=SamplingParams(**sampling),  # type: ignore[arg-type]
        masked_token_ids=masked,
        eos_token_ids=eos,
        tiles=tiles,
        placeholders=placeholders,
    )


def make_state(
    prompt: Sequence[int] = (5,),
    answer: Sequence[int] = (),
    *,
    request_id: str = "r",
    masked: tuple[int, ...] = (),
    **sampling: object,
) -> RequestState:
    """A request with an answer so far; `sampling` are SamplingParams."""
    source = make_new(prompt, request_id=request_id, masked=masked, **sampling)
    return RequestState(source=source, token_ids=[*prompt, *answer])


def with_answer(state: RequestState, answer: Sequence[int]) -> RequestState:
    return dataclasses.replace(state, token_ids=[*state.source.prompt_token_ids, *answer])
