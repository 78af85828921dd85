"""From a validated conversation to an engine request: template, ids, limits, then pictures.

Ids come before pixels: how many tokens a picture takes follows from its `detail` alone, so a prompt that cannot fit
is refused before anything is downloaded or decoded.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import re
import secrets
import time
from collections.abc import Callable, Sequence

import msgspec

from server.errors import ClientError
from server.grammar.checker import GrammarChecker
from server.inputs.chat_template import ChatTemplate, ImageSegment, SpecialSegment, TextSegment
from server.inputs.images import ImageLoader
from server.inputs.placeholders import PromptIds
from server.inputs.tokenizer import Tokenizer
from server.observability.metrics import ServerMetrics
from server.types import ChatInput, EngineRequest, GrammarSpec, ImageInput, PromptInput, TextPart, Truncation, Turn

# Encoding this much text takes about a millisecond; more of it goes to a thread.
INLINE_CHARACTERS = 4096
# What rendering a turn costs beside its text, in characters that take as long to encode.
TURN_CHARACTERS = 64

# The reference processor puts a space between a closing FAKE and a word (transformers 5, processing_idefics2.py).
_WORD_START = re.compile(r"[^\s<]")


def _admit_all(num_tokens: int) -> None:
    """No limit."""


class InputProcessor:
    """Everything between the API's edge and the engine. Raises ClientError; the engine never sees a bad request."""

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        images: ImageLoader,
        grammars: GrammarChecker,
        metrics: ServerMetrics,
        rows_per_tile: int,
        eos_token_ids: tuple[int, ...],
        max_images: int,
        share_caches_between_keys: bool = False,
    ) -> None:
        """`share_caches_between_keys` lets an API key's requests find what another's have left in any cache."""
        self.tokenizer = tokenizer
        self._template = template
        self._images = images
        self._grammars = grammars
        self._metrics = metrics
        self._rows_per_tile = rows_per_tile
        self._eos_token_ids = eos_token_ids
        self._max_images = max_images
        self._share_caches = share_caches_between_keys
        self._counter = itertools.count()

    async def start(self) -> None:
        """Raises UnavailableError when a helper process does not come up."""
        await asyncio.gather(self._images.start(), self._grammars.start())

    @property
    def is_healthy(self) -> bool:
        """Whether pictures can be decoded, as far as is known."""
        return self._images.is_healthy

    async def close(self) -> None:
        await self._images.close()
        await self._grammars.close()

    async def process(
        self, item: ChatInput | PromptInput, *, max_model_len: int, admit: Callable[[int], None] = _admit_all
    ) -> EngineRequest:
        """Check, encode and load one conversation or prompt for an engine whose context is `max_model_len` tokens.

        `admit` gets the number of prompt tokens before anything else is done, and may raise to refuse them.
        """
        arrival_time = time.monotonic()
        prompt = await self.encode_input(item, max_model_len=max_model_len)
        sampling = item.sampling
        num_tokens = len(prompt.token_ids)
        _check_length(num_tokens, max_model_len, param=_param(item))
        admit(num_tokens)
        room = max_model_len - num_tokens
        max_tokens = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        if sampling.min_tokens > max_tokens:
            raise ClientError(
                f"'min_tokens' is {sampling.min_tokens}: the answer may have at most {max_tokens} tokens",
                param="min_tokens",
            )
        if sampling.grammar is not None:
            await self._check_grammar(sampling.grammar, key=item.origin.key)
        salt = item.cache_salt if self._share_caches else _salt(item.origin.key, item.cache_salt)
        loaded = await self._images.load(_images(item), key=item.origin.key, salt=salt)
        return EngineRequest(
            # A client may choose its id twice; the engine's own is never the same.
            request_id=f"{item.request_id}-{next(self._counter)}",
            prompt_token_ids=prompt.token_ids,
            sampling=msgspec.structs.replace(
                sampling,
                max_tokens=max_tokens,
                seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
            ),
            eos_token_ids=self._eos_token_ids,
            origin=item.origin,
            tiles=tuple(tile for tiles in loaded for tile in tiles),
            placeholders=tuple(prompt.placeholders),
            priority=item.priority,
            cache_salt=salt,
            arrival_time=arrival_time,
            n=item.n,
            continues_text=_continues_text(item),
        )

    async def _check_grammar(self, spec: GrammarSpec, *, key: str) -> None:
        started, accepted = time.perf_counter(), False
        try:
            await self._grammars.check(spec, key=key)
            accepted = True
        finally:
            self._metrics.record_grammar(spec.kind, seconds=time.perf_counter() - started, accepted=accepted)

    async def encode_input(self, item: ChatInput | PromptInput, *, max_model_len: int) -> PromptIds:
        """Ids and placeholders of what a client sent. Raises ClientError also for a text that cannot fit, unread."""
        images = _images(item)
        if len(images) > self._max_images:
            self._metrics.record_image_error("too_many_images")
            raise ClientError(
                f"a request may hold {self._max_images} images, this one holds {len(images)}",
                param="messages",
                code="too_many_images",
            )
        num_characters = _num_characters(item)
        at_least = self.tokenizer.min_tokens(num_characters)
        num_turns = len(item.turns) if isinstance(item, ChatInput) else 0
        # Each turn ends with a token of its own.
        _check_length(at_least + num_turns, max_model_len, param=_param(item), is_lower_bound=True)
        if num_characters + TURN_CHARACTERS * num_turns <= INLINE_CHARACTERS:
            prompt = self._encode_item(item)
        else:
            prompt = await asyncio.to_thread(self._encode_item, item)
        if item.truncation is None:
            return prompt
        return _truncate(prompt, item.truncation, room=max_model_len - (item.sampling.max_tokens or 1))

    def _encode_item(self, item: ChatInput | PromptInput) -> PromptIds:
        if isinstance(item, PromptInput):
            return self._encode_prompt(item)
        return self.encode(
            item.turns,
            add_generation_prompt=item.add_generation_prompt,
            continue_final_message=item.continue_final_message,
        )

    def _encode_prompt(self, item: PromptInput) -> PromptIds:
        prompt = self._empty_prompt()
        if isinstance(item.prompt, str):
            if item.add_special_tokens:
                prompt.add_ids(list(self.tokenizer.bos_token_ids))
            prompt.add_ids(self.tokenizer.encode(item.prompt, first=True))
        else:
            prompt.add_ids(list(item.prompt))
        if not prompt.token_ids:
            raise ClientError(f"'{item.param}' must not be empty", param=item.param)
        return prompt

    def _empty_prompt(self) -> PromptIds:
        return PromptIds(
            fake_token_id=self.tokenizer.fake_token_id,
            image_token_id=self.tokenizer.image_token_id,
            rows_per_tile=self._rows_per_tile,
        )

    def encode(
        self, turns: Sequence[Turn], *, add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> PromptIds:
        """Token ids and tile placeholders of a conversation."""
        prompt = self._empty_prompt()
        images = [part for turn in turns for part in turn.parts if isinstance(part, ImageInput)]
        segments = self._template.render(
            turns, add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message
        )
        printed = segments.count(ImageSegment())
        if not segments or printed != len(images):
            raise ClientError(
                f"the model's chat template cannot take these messages: of their {len(images)} images it prints "
                f"{printed}, in {len(segments)} segments",
                param="messages",
            )
        tile_counts = iter([self._images.num_tiles(image) for image in images])
        bos = self.tokenizer.bos_token_ids
        if not (isinstance(segments[0], SpecialSegment) and [self.tokenizer.special_tokens[segments[0].token]] == bos):
            prompt.add_ids(list(bos))
        for index, segment in enumerate(segments):
            if isinstance(segment, ImageSegment):
                prompt.add_tiles(next(tile_counts))
            elif isinstance(segment, SpecialSegment):
                prompt.add_ids([self.tokenizer.special_tokens[segment.token]])
            elif isinstance(segment, TextSegment):
                text = segment.text
                if prompt.ends_with_image and _WORD_START.match(text):
                    text = f" {text}"
                prompt.add_ids(self.tokenizer.encode(text, first=index == 0))
        return prompt


def _salt(key: str, cache_salt: str) -> str:
    """What an API key's requests with that salt have in common with no others."""
    return f"{len(key)}:{key}:{cache_salt}" if key else cache_salt


def _images(item: ChatInput | PromptInput) -> list[ImageInput]:
    if isinstance(item, PromptInput):
        return []
    return [part for turn in item.turns for part in turn.parts if isinstance(part, ImageInput)]


def _num_characters(item: ChatInput | PromptInput) -> int:
    """Characters that have to be encoded."""
    if isinstance(item, PromptInput):
        return len(item.prompt) if isinstance(item.prompt, str) else 0
    return sum(len(part.text) for turn in item.turns for part in turn.parts if isinstance(part, TextPart))


def _param(item: ChatInput | PromptInput) -> str:
    return item.param if isinstance(item, PromptInput) else "messages"


def _continues_text(item: ChatInput | PromptInput) -> bool:
    """Whether the answer's first character stands right behind a text's last one."""
    if isinstance(item, PromptInput):
        return len(item.prompt) > 0
    if not item.continue_final_message:
        return False
    last = item.turns[-1].parts[-1]
    return isinstance(last, TextPart) and last.text != ""


def _truncate(prompt: PromptIds, truncation: Truncation, *, room: int) -> PromptIds:
    """A prompt's first or last ids. Raises ClientError for one with pictures, which cannot be cut through."""
    if prompt.placeholders:
        raise ClientError(
            "'truncate_prompt_tokens' is not supported for prompts with images",
            param="truncate_prompt_tokens",
            code="unsupported_parameter",
        )
    limit = max(room, 1) if truncation.max_tokens is None else truncation.max_tokens
    ids = prompt.token_ids
    kept = ids[-limit:] if truncation.side == "left" else ids[:limit]
    return dataclasses.replace(prompt, token_ids=kept)


def _check_length(num_tokens: int, max_model_len: int, *, param: str, is_lower_bound: bool = False) -> None:
    """A prompt must leave room for one token of an answer."""
    if num_tokens >= max_model_len:
        raise ClientError(
            # "maximum context length" and "prompt is too long" are what LiteLLM and LangChain know this error by.
            f"this model's maximum context length is {max_model_len} tokens, one of them for an answer, and the prompt "
            f"is too long: '{param}' takes {'at least ' if is_lower_bound else ''}{num_tokens}",
            param=param,
            code="context_length_exceeded",
        )
