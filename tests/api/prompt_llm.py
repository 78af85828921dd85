"""A scripted facade with a vocabulary, a tokenizer and probabilities, small enough to be worked out by hand.

What it answers goes through the server's own output pipeline; only the tokens are made up here.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import msgspec

from server.errors import ClientError
from server.outputs.detokenizer import TokenTable
from server.outputs.response import ResponseStream
from server.types import (
    ChatInput,
    EngineOutput,
    EngineRequest,
    FinishReason,
    PromptInput,
    RequestOutput,
    TextPart,
    TokenLogprobs,
)
from tests.api.scripted_llm import Hang, ScriptedLLM

WORDS = ["▁", "▁Two", "▁cats", "▁and", "▁a", "▁dog", "▁purr", "Two", "cats", ".", "s", "a", "▁The", "\n"]
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS, "<fake>", "<image>"]
IDS = {piece: index for index, piece in enumerate(PIECES)}
BOS, EOS, FAKE, IMAGE = IDS["<s>"], IDS["</s>"], IDS["<fake>"], IDS["<image>"]
SPECIAL = frozenset({0, BOS, EOS, FAKE, IMAGE})
TABLE = TokenTable.from_pieces(PIECES, SPECIAL)
MAX_MODEL_LEN = 64


def ids(*pieces: str) -> list[int]:
    return [IDS[piece] for piece in pieces]


def byte_ids(text: str) -> list[int]:
    return [IDS[f"<0x{byte:02X}>"] for byte in text.encode()]


def encode(text: str) -> list[int]:
    """The longest piece first, bytes where there is none."""
    rest, found = f"▁{text}".replace(" ", "▁"), []
    while rest:
        piece = max((word for word in WORDS if rest.startswith(word)), key=len, default="")
        found += [IDS[piece]] if piece else byte_ids(rest[0])
        rest = rest[len(piece) or 1 :]
    return found


def decode(token_ids: Sequence[int]) -> str:
    """Special tokens by their names; the first space is the first word's own."""
    return b"".join(TABLE.get(token_id) for token_id in token_ids).decode(errors="replace").removeprefix(" ")


@functools.cache
def logprobs_after(token_id: int) -> tuple[float, ...]:
    """The model: what comes next depends on the last token alone."""
    scores = [((token_id + 3) * (other + 7) * 7919) % 1009 / 100 for other in range(len(PIECES))]
    total = math.log(sum(math.exp(score) for score in scores))
    return tuple(score - total for score in scores)


def likeliest_after(token_id: int) -> int:
    logprobs = logprobs_after(token_id)
    return max(range(len(PIECES)), key=logprobs.__getitem__)


def entries(token_ids: Sequence[int], num: int | None) -> list[TokenLogprobs]:
    """For the second of these ids and on."""
    found: list[TokenLogprobs] = []
    for last, token_id in zip(token_ids if num is not None else (), token_ids[1:], strict=False):
        logprobs = logprobs_after(last)
        order = sorted(range(len(PIECES)), key=lambda other: -logprobs[other])[:num]
        top = tuple((other, logprobs[other]) for other in order)
        found.append(TokenLogprobs(token_id, logprobs[token_id], top))
    return found


@dataclass
class PromptLLM(ScriptedLLM):
    """Answers choice `i` with `answers[i % len(answers)]`: token ids, of which EOS ends it.

    `disturbance` happens once so many tokens are out over all answers.
    """

    answers: Sequence[Sequence[int]] = (ids("▁and", "▁a", "▁dog", "."),)
    disturbance: tuple[int, float | Exception | Hang] | None = None
    max_model_len: int = MAX_MODEL_LEN
    vocab_size: int = len(PIECES)
    special_token_ids: frozenset[int] = SPECIAL
    image_token_ids: tuple[int, ...] = (FAKE, IMAGE)

    items: list[ChatInput | PromptInput] = field(default_factory=list)
    requests: list[EngineRequest] = field(default_factory=list)

    async def tokenize(self, item: ChatInput | PromptInput) -> list[int]:
        self.items.append(item)
        return self._encode(item)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        return decode(token_ids)

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        return [PIECES[token_id] for token_id in token_ids]

    def _encode(self, item: ChatInput | PromptInput) -> list[int]:
        if isinstance(item, PromptInput):
            bos = [BOS] if item.add_special_tokens else []
            return [*bos, *encode(item.prompt)] if isinstance(item.prompt, str) else list(item.prompt)
        found = [BOS]
        for part in (part for turn in item.turns for part in turn.parts):
            found += encode(part.text) if isinstance(part, TextPart) else [FAKE, IMAGE, IMAGE, FAKE]
        return found

    async def prepare(self, item: ChatInput | PromptInput) -> EngineRequest:  # type: ignore[override]
        self.items.append(item)
        await self._play_preparation()
        prompt = self._encode(item)
        cut = item.truncation
        if cut is not None and cut.max_tokens is not None:
            prompt = prompt[-cut.max_tokens :] if cut.side == "left" else prompt[: cut.max_tokens]
        if len(prompt) >= self.max_model_len:
            param = item.param if isinstance(item, PromptInput) else "messages"
            raise ClientError("too long", param=param, code="context_length_exceeded")
        room = self.max_model_len - len(prompt)
        self.requests.append(
            EngineRequest(
                request_id=f"{item.request_id}-{len(self.requests)}",
                prompt_token_ids=prompt,
                sampling=msgspec.structs.replace(item.sampling, max_tokens=min(item.sampling.max_tokens or room, room)),
                eos_token_ids=(EOS,),
                n=item.n,
                continues_text=True,
            )
        )
        return self.requests[-1]

    def generate(self, *requests: EngineRequest) -> AsyncIterator[RequestOutput]:
        self.generators.append(self._play(requests))
        return self.generators[-1]

    async def _play(self, requests: tuple[EngineRequest, ...]) -> AsyncIterator[RequestOutput]:
        response = ResponseStream(requests, TABLE, self.metrics, lambda: None)
        num_tokens = 0
        try:
            plans = {}
            for index, request in enumerate(requests):
                for number, answer_id in enumerate(request.choice_ids, start=index * request.n):
                    plans[answer_id] = self._plan(request, answer_id, self.answers[number % len(self.answers)])
            for step in range(max(map(len, plans.values()))):
                for key, stream in response.streams.items():
                    if stream.finish_reason is not None:
                        continue
                    if self.disturbance is not None and self.disturbance[0] == num_tokens:
                        await self._wait(self.disturbance[1])
                    num_tokens += 1
                    stream.push(plans[key][step], time.monotonic())
                while (output := response.take()) is not None:
                    yield output
        finally:
            self.closed.set()

    def _plan(self, request: EngineRequest, answer_id: str, answer: Sequence[int]) -> list[EngineOutput]:
        """What the engine says, one token a step."""
        tokens = list(answer)[: request.max_tokens]
        prompt, sampling = request.prompt_token_ids, request.sampling
        told = entries([prompt[-1], *tokens], sampling.num_logprobs)
        outputs = []
        for index, token_id in enumerate(tokens):
            stops = token_id in request.eos_token_ids or token_id in sampling.stop_token_ids
            reason = FinishReason.LENGTH if index + 1 == len(tokens) else None
            outputs.append(
                EngineOutput(
                    request_id=answer_id,
                    new_token_ids=[token_id],
                    finish_reason=FinishReason.STOP if stops else reason,
                    stop_token_id=token_id if stops else None,
                    logprobs=told[index : index + 1],
                    # The first answer tells what there is to tell of the prompt, for all of them.
                    prompt_logprobs=(
                        entries(prompt, sampling.num_prompt_logprobs)
                        if index == 0 and answer_id == request.request_id
                        else []
                    ),
                )
            )
        return outputs
