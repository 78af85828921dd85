"""The vocabulary: every type that crosses a layer, in the order in which a request meets them.

Messages are `msgspec` structs, because those that cross to the engine process are encoded as msgpack
(never pickled). They hold plain data only: integers, strings, bytes.
"""

from __future__ import annotations

import enum
from typing import Literal

import msgspec

ImageDetail = Literal["auto", "low", "high"]


class TextPart(msgspec.Struct, frozen=True):
    """A run of user or assistant text. It is never scanned for images or special tokens."""

    text: str


class ImageInput(msgspec.Struct, frozen=True):
    """A picture as the client named it: a data URL or an http(s) URL.

    `param` is the path of the field in the request body, for error messages.
    """

    url: str
    detail: ImageDetail
    param: str


class Turn(msgspec.Struct, frozen=True):
    """One message of a conversation; `parts` is never empty."""

    role: str
    parts: tuple[TextPart | ImageInput, ...]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen and when to stop. Ranges are checked at the API's edge.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 are off. `max_tokens` None means as many as
    the context allows; the input processor fills it in.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True


class ChatInput(msgspec.Struct, frozen=True, kw_only=True):
    """A validated conversation, before templates, tokens and pixels."""

    request_id: str
    turns: tuple[Turn, ...]
    sampling: SamplingParams
    priority: int = 0
    cache_salt: str = ""


class ImageSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the checkpoint says about its pictures. Edges are pixels of a tile.

    `do_image_splitting` is what an image with detail "auto" gets when the server leaves it to the checkpoint.
    """

    shortest_edge: int = 378
    longest_edge: int = 980
    do_image_splitting: bool


class Tile(msgspec.Struct, frozen=True):
    """One resized picture or crop, ready for the vision tower.

    `pixels` are uint8 RGB, row-major [height, width, 3]. `key` is a SHA-256 digest of size and pixels: tiles with
    equal keys have equal embeddings.
    """

    key: bytes
    height: int
    width: int
    pixels: bytes


class PlaceholderRange(msgspec.Struct, frozen=True):
    """Where a tile's rows stand in the prompt: `length` image tokens from `offset` on."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, tag="add"):
    """What the engine is asked to do. Crosses the process boundary.

    `placeholders[i]` is where `tiles[i]` goes; ranges ascend and do not overlap. Lower `priority` runs first.
    `arrival_time` is `time.monotonic()` at the API, comparable between processes of one machine.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...]
    tiles: tuple[Tile, ...] = ()
    placeholders: tuple[PlaceholderRange, ...] = ()
    priority: int = 0
    cache_salt: str = ""
    arrival_time: float = 0.0

    @property
    def max_tokens(self) -> int:
        """The output cap, which the input processor has filled in."""
        if self.sampling.max_tokens is None:
            raise ValueError("max_tokens is not resolved yet")
        return self.sampling.max_tokens

    @property
    def num_image_tokens(self) -> int:
        return sum(placeholder.length for placeholder in self.placeholders)


class FinishReason(enum.StrEnum):
    """Why a request ended. Only STOP and LENGTH reach a client as `finish_reason`."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class EngineOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What one step made for one request.

    `stop_token_id` is the id that ended it (EOS or one of `stop_token_ids`), which is also the last of
    `new_token_ids`. `queue_seconds` is set on the first output only.
    """

    request_id: str
    new_token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    queue_seconds: float | None = None
    error: str | None = None


class StepStats(msgspec.Struct, frozen=True, kw_only=True):
    """Plain numbers about one engine step. Gauges are values now; the rest counts this step alone.

    `prefix_queries` and `prefix_hits` count tokens, `tile_queries` and `tile_hits` tiles; durations are seconds.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_used_blocks: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    tile_queries: int = 0
    tile_hits: int = 0
    num_encoded_tiles: int = 0
    step_seconds: float = 0.0
    encode_seconds: float = 0.0


class EngineOutputs(msgspec.Struct, frozen=True, tag="outputs"):
    """One step's results, handed over as a batch."""

    outputs: list[EngineOutput]
    stats: StepStats


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of a request so far. `image_tokens` are latents only: 64 or 320 a picture."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    image_tokens: int


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """Text since the last output. `text` may be empty only when `finish_reason` is set.

    `stop_reason` is the stop string or stop token id that ended the answer, None for EOS and length.
    """

    request_id: str
    text: str
    token_ids: list[int]
    usage: Usage
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
