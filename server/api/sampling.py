"""The fields that every generating endpoint takes: how tokens are chosen, when to stop, what is told about them.

A request that parses is within every bound that can be told without the model.
"""

from __future__ import annotations

import re
import uuid
from typing import Annotated, Any, Literal

from pydantic import FailFast, Field, PlainValidator, WithJsonSchema

from server.api.errors import invalid_type, invalid_value, too_many
from server.api.schemas import LOGIT_BIAS_SCHEMA, STOP_SCHEMA
from server.api.structured import ConstrainedRequest, find_grammar
from server.api.unsupported import unsupported_value
from server.errors import ClientError
from server.types import GrammarSpec, SamplingParams, Truncation

MAX_INT32 = 2**31 - 1
MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIASES = 300
MAX_CHOICES = 16

# Below this, logits divided by the temperature overflow; what is left of chance there is nothing.
MIN_TEMPERATURE = 0.01

_TOKEN_ID = re.compile(r"[0-9]{1,10}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def parse_stop(raw: object) -> tuple[str, ...]:
    """One string or a list of at most four; none may be empty, for it would stop every answer at once."""
    if isinstance(raw, str):
        stops = [("stop", raw)]
    elif isinstance(raw, list):
        if len(raw) > MAX_STOPS:
            raise too_many("stop", len(raw), limit=MAX_STOPS)
        stops = [(f"stop[{index}]", stop) for index, stop in enumerate(raw)]
    else:
        raise invalid_type("stop", "a string or an array of strings")
    for param, stop in stops:
        if not isinstance(stop, str):
            raise invalid_type(param, "a string")
        if not stop:
            raise invalid_value(param, "must not be empty")
        if len(stop) > MAX_STOP_CHARS:
            message = f"'{param}' must have at most {MAX_STOP_CHARS} characters, but has {len(stop)}"
            raise ClientError(message, param=param, code="string_above_max_length")
    return tuple(stop for _, stop in stops)


def parse_logit_bias(raw: object) -> dict[int, float]:
    """Token ids, as strings, to what is added to their logits. The caller knows how many ids there are."""
    if not isinstance(raw, dict):
        raise invalid_type("logit_bias", "an object")
    if len(raw) > MAX_LOGIT_BIASES:
        raise too_many("logit_bias", len(raw), limit=MAX_LOGIT_BIASES, what="entries")
    biases = {}
    for token_id, bias in raw.items():
        if not isinstance(token_id, str) or not _TOKEN_ID.fullmatch(token_id):
            raise invalid_value("logit_bias", "must have token ids as its keys")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise invalid_type("logit_bias", "an object of numbers")
        if not -100 <= bias <= 100:
            raise invalid_value("logit_bias", "must have values from -100 to 100")
        biases[int(token_id)] = float(bias)
    return biases


class SamplingRequest(ConstrainedRequest):
    """Base of the bodies that ask for tokens."""

    model: str = Field("", max_length=1024, description="A served name; empty or absent means the first one.")
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="How many answers.")
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description="Only what n is.")
    min_tokens: int | None = Field(None, ge=0, le=MAX_INT32)
    min_new_tokens: int | None = Field(None, ge=0, le=MAX_INT32, description="Another name of min_tokens.")
    ignore_eos: bool = False
    stop: Annotated[tuple[str, ...], PlainValidator(parse_stop), WithJsonSchema(STOP_SCHEMA)] = ()
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, le=MAX_INT32)]], FailFast()] = Field(
        [], max_length=MAX_STOP_TOKEN_IDS
    )
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False, description="0 is greedy.")
    top_p: float = Field(1.0, ge=0, le=1, allow_inf_nan=False)
    top_k: int = Field(0, ge=-1, le=MAX_INT32, description="0 and -1: off.")
    min_p: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100, allow_inf_nan=False)
    presence_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: Annotated[dict[int, float], PlainValidator(parse_logit_bias), WithJsonSchema(LOGIT_BIAS_SCHEMA)] = (
        Field(default_factory=dict)
    )
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="-1 means none.")
    priority: int = Field(0, ge=-(2**31), le=MAX_INT32, description="Lower runs first.")
    cache_salt: str = Field(
        "",
        min_length=1,
        max_length=128,
        pattern=r"^[^@/\\\x00]+$",
        description="Requests share cached prompts only with those of the same salt.",
    )
    request_id: Any = Field(
        None, description="Part of the answer's id, if it is at most 128 letters, digits, '.', '_' and '-'."
    )
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, le=MAX_INT32, description="Keep so many tokens of a prompt of text; -1: as many as fit."
    )
    truncation_side: Literal["left", "right"] = Field("left", description="What truncation cuts off.")
    add_special_tokens: bool | None = Field(None, description="Put BOS before a prompt of text. A conversation has it.")
    return_token_ids: bool = Field(False, description="Tell the ids of prompt and answer.")

    @property
    def output_floor(self) -> int:
        given = self.min_new_tokens if self.min_tokens is None else self.min_tokens
        return given or 0

    @property
    def truncation(self) -> Truncation | None:
        """Raises ClientError for a prompt of which nothing would be left."""
        if self.truncate_prompt_tokens is None:
            return None
        if self.truncate_prompt_tokens == 0:
            raise invalid_value("truncate_prompt_tokens", "must be -1 or at least 1, not 0")
        limit = self.truncate_prompt_tokens
        return Truncation(max_tokens=None if limit == -1 else limit, side=self.truncation_side)

    def answer_id(self, prefix: str) -> str:
        """The id that the client wished for, or a new one. Two requests may wish for the same."""
        given = self.request_id
        suffix = given if isinstance(given, str) and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        return f"{prefix}-{suffix}"


def to_sampling_params(
    request: SamplingRequest,
    *,
    max_tokens: int | None,
    vocab_size: int,
    grammar: GrammarSpec | None = None,
    num_logprobs: int | None = None,
    num_prompt_logprobs: int | None = None,
) -> SamplingParams:
    """The request as the engine knows it. `grammar` is a constraint besides those of the common fields.

    Raises ClientError for unknown token ids, a floor over the cap, or constraints that contradict each other.
    """
    if request.best_of not in (None, request.n):
        raise unsupported_value("best_of", f"only the value of 'n', which is {request.n}, is")
    if max_tokens is not None and request.output_floor > max_tokens:
        raise invalid_value("min_tokens", f"must be at most the {max_tokens} tokens that the answer may have")
    if any(token_id >= vocab_size for token_id in request.logit_bias):
        raise invalid_value("logit_bias", f"must have token ids below {vocab_size}")
    for index, token_id in enumerate(request.stop_token_ids):
        if token_id >= vocab_size:
            raise invalid_value(f"stop_token_ids[{index}]", f"must be a token id below {vocab_size}, not {token_id}")
    # OpenAI allows a nucleus of nothing, which can only mean the likeliest token.
    top_1 = request.top_p == 0
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=request.output_floor,
        temperature=max(request.temperature, MIN_TEMPERATURE) if request.temperature else 0.0,
        top_p=1.0 if top_1 else request.top_p,
        top_k=1 if top_1 else max(request.top_k, 0),
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=request.logit_bias,
        seed=None if request.seed == -1 else request.seed,
        ignore_eos=request.ignore_eos,
        stop_token_ids=tuple(request.stop_token_ids),
        stop=request.stop,
        include_stop_str_in_output=request.include_stop_str_in_output,
        skip_special_tokens=request.skip_special_tokens,
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
        grammar=find_grammar(request, grammar),
    )
