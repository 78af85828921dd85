"""The vocabulary: every type that crosses a layer, in the order in which a request meets them.

Messages are `msgspec` structs, because those that cross to the engine process are encoded as msgpack
(never pickled). They hold plain data only: integers, strings, bytes.
"""

from __future__ import annotations

import enum
import math
from typing import Literal

import msgspec

ImageDetail = Literal["auto", "low", "high"]


class RequestOrigin(msgspec.Struct, frozen=True):
    """Who asks, and until when an answer is worth having.

    `key` is the name of the API key, "" where none is asked for. `deadline` is a time of `time.monotonic()`.
    """

    key: str = ""
    deadline: float = math.inf


ANYBODY = RequestOrigin()


class KeyLimits(msgspec.Struct, frozen=True):
    """What one API key gets; None: no limit. `tokens_per_minute` counts prompts that are computed, and answers."""

    max_reqs: int | None = None
    tokens_per_minute: int | None = None


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


class GrammarSpec(msgspec.Struct, frozen=True):
    """What an answer must match, in a client's words.

    `source` is a JSON schema as JSON text, a regular expression, a JSON array of strings of which the answer is one,
    or a grammar in Lark's or GBNF's notation. `param` is the path of the field in the request body, for error messages.
    """

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    source: str
    param: str = "structured_outputs"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen and when to stop. Ranges are checked at the API's edge.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 are off. `max_tokens` None means as many as
    the context allows; the input processor fills it in. `num_logprobs` is how many alternatives to tell beside each
    token of the answer, and `num_prompt_logprobs` beside each token of the prompt; None tells nothing, 0 only the
    token itself. A `grammar` ends the answer when nothing more may follow, whatever `min_tokens` and `ignore_eos` say.
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
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    grammar: GrammarSpec | None = None


class Truncation(msgspec.Struct, frozen=True):
    """Keep at most `max_tokens` ids of a prompt; None: as many as the context holds. The `side` is what is cut off."""

    max_tokens: int | None
    side: Literal["left", "right"] = "left"


class ChatInput(msgspec.Struct, frozen=True, kw_only=True):
    """A validated conversation, before templates, tokens and pixels.

    `n` answers are wanted. With `continue_final_message` the last turn, an assistant's, is left open for the answer
    to go on; without that, `add_generation_prompt` opens a turn of its own.
    """

    request_id: str
    turns: tuple[Turn, ...]
    sampling: SamplingParams
    origin: RequestOrigin = ANYBODY
    n: int = 1
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    truncation: Truncation | None = None
    priority: int = 0
    cache_salt: str = ""


class PromptInput(msgspec.Struct, frozen=True, kw_only=True):
    """A validated prompt without roles or pictures: text, or ids that the client has made itself.

    `add_special_tokens` puts what the tokenizer puts before a text (BOS); ids are taken as they are. `param` is the
    path of the field in the request body, for error messages.
    """

    request_id: str
    prompt: str | tuple[int, ...]
    sampling: SamplingParams
    origin: RequestOrigin = ANYBODY
    n: int = 1
    add_special_tokens: bool = True
    truncation: Truncation | None = None
    priority: int = 0
    cache_salt: str = ""
    param: str = "prompt"


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
    `arrival_time` is `time.monotonic()` at the API, comparable between processes of one machine. With `n` above 1 the
    prompt is computed once and its blocks are shared; each answer has an id of its own. `continues_text` says that the
    answer goes on in the middle of a text, where a space at its start means something. Requests of different
    `origin.key`s get their turns alternately.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...]
    origin: RequestOrigin = ANYBODY
    tiles: tuple[Tile, ...] = ()
    placeholders: tuple[PlaceholderRange, ...] = ()
    priority: int = 0
    cache_salt: str = ""
    arrival_time: float = 0.0
    n: int = 1
    continues_text: bool = False

    @property
    def choice_ids(self) -> tuple[str, ...]:
        """The engine's ids of the answers that are computed: `n`, or one where all would be equal."""
        count = 1 if self.sampling.temperature == 0 else self.n
        return (self.request_id, *(f"{self.request_id}/{index}" for index in range(1, count)))

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


class TokenLogprobs(msgspec.Struct, frozen=True):
    """A token, the model's own log-probability of it (before temperature, penalties and masks), and the likeliest ones.

    `top` descends; the token itself may not be in it.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class EngineOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step made for one answer, under the answer's own id.

    `stop_token_id` is the id that ended it (EOS or one of `stop_token_ids`), which is also the last of
    `new_token_ids`. `queue_seconds` is set until the first token is out. `logprobs` has an entry for each
    new token, if asked for. `prompt_logprobs` are those of the prompt's second token and on, in order, as they are
    computed; an output may have nothing else. With an `error_code`, the `error` is none of the request's own: the same
    may succeed later.
    """

    request_id: str
    new_token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    queue_seconds: float | None = None
    num_preemptions: int = 0
    logprobs: list[TokenLogprobs] = msgspec.field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = msgspec.field(default_factory=list)
    error: str | None = None
    error_code: str | None = None


class StepStats(msgspec.Struct, frozen=True, kw_only=True):
    """Plain numbers about one engine step. Gauges are values now; the rest counts this step alone.

    `num_held` of the `num_waiting` wait for something else than room: a grammar, or a prompt that they share.
    `num_computed_tokens` are all that went through the model, also those computed before and lost. `prefix_queries`
    and `prefix_hits` count tokens, `tile_queries` and `tile_hits` tiles; a tile that took several steps is one of
    `num_encoded_tiles` in the last and of `num_tile_shares` in each; durations are seconds.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_held: int = 0
    num_blocks: int = 0
    num_used_blocks: int = 0
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
    step_seconds: float = 0.0
    encode_seconds: float = 0.0


class EngineOutputs(msgspec.Struct, frozen=True, tag="outputs"):
    """One step's results, handed over as a batch.

    `started` are answers on which work is about to begin, told before: one of them may end the engine.
    """

    outputs: list[EngineOutput]
    stats: StepStats
    started: list[str] = []


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts so far, over all answers of a response. `image_tokens` are latents only: 64 or 320 a picture."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    image_tokens: int


class Logprob(msgspec.Struct, frozen=True):
    """A token as a client sees it.

    `data` is what it adds to the answer, byte for byte: half a character, or nothing where it is a special token that
    is not shown. `token` is the same as text, with U+FFFD for broken characters, or the special token's name.
    """

    token_id: int
    token: str
    data: bytes
    logprob: float
    top: tuple[Logprob, ...] = ()


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one answer since its last output. `text` may be empty only when `finish_reason` is set.

    `index` counts the answers of a response: those of its first prompt, then those of its second. `usage` is the whole
    response's. `stop_reason` is the stop string or stop token id that ended the answer, None for EOS and length.
    `logprobs` has an entry for each of `token_ids`, if asked for. `prompt_token_ids` and `prompt_logprobs` (for the
    prompt's second token and on) come with the first output of an answer.
    """

    request_id: str
    index: int = 0
    text: str
    token_ids: list[int]
    usage: Usage
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[Logprob] = msgspec.field(default_factory=list)
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[Logprob] | None = None
