"""From a validated conversation to an engine request: template, ids, limits, then pictures.

Ids come before pixels: how many tokens a picture takes follows from its `detail` alone, so a prompt that cannot fit
is refused before anything is downloaded or decoded.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
import time
from collections.abc import Sequence

import msgspec

from server.errors import ClientError
from server.inputs.chat_template import ChatTemplate, ImageSegment, SpecialSegment, TextSegment
from server.inputs.images import ImageLoader
from server.inputs.placeholders import PromptIds
from server.inputs.tokenizer import Tokenizer
from server.types import ChatInput, EngineRequest, ImageInput, TextPart, Turn

# Encoding this much text takes about a millisecond; more of it goes to a thread.
INLINE_CHARACTERS = 4096

# The reference processor puts a space between a closing FAKE and a word (transformers 5, processing_idefics2.py).
_WORD_START = re.compile(r"[^\s<]")


class InputProcessor:
    """Everything between the API's edge and the engine. Raises ClientError; the engine never sees a bad request."""

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        images: ImageLoader,
        rows_per_tile: int,
        eos_token_ids: tuple[int, ...],
        max_images: int,
    ) -> None:
        self.tokenizer = tokenizer
        self._template = template
        self._images = images
        self._rows_per_tile = rows_per_tile
        self._eos_token_ids = eos_token_ids
        self._max_images = max_images
        self._counter = itertools.count()

    async def start(self) -> None:
        await self._images.start()

    async def close(self) -> None:
        await self._images.close()

    async def process(self, chat: ChatInput, *, max_model_len: int) -> EngineRequest:
        """Check, encode and load one conversation for an engine whose context is `max_model_len` tokens."""
        images = [part for turn in chat.turns for part in turn.parts if isinstance(part, ImageInput)]
        if len(images) > self._max_images:
            raise ClientError(
                f"a request may hold {self._max_images} images, this one holds {len(images)}",
                param="messages",
                code="too_many_images",
            )
        arrival_time = time.monotonic()
        num_characters = sum(len(part.text) for turn in chat.turns for part in turn.parts if isinstance(part, TextPart))
        _check_length(self.tokenizer.min_tokens(num_characters), max_model_len, at_least=True)
        if num_characters <= INLINE_CHARACTERS:
            prompt = self.encode(chat.turns)
        else:
            prompt = await asyncio.to_thread(self.encode, chat.turns)
        num_tokens = len(prompt.token_ids)
        _check_length(num_tokens, max_model_len)
        tiles = [tile for loaded in await self._images.load(images) for tile in loaded]
        room = max_model_len - num_tokens
        wanted = chat.sampling.max_tokens
        seed = chat.sampling.seed
        return EngineRequest(
            # A client may choose its id twice; the engine's own is never the same.
            request_id=f"{chat.request_id}-{next(self._counter)}",
            prompt_token_ids=prompt.token_ids,
            sampling=msgspec.structs.replace(
                chat.sampling,
                max_tokens=room if wanted is None else min(wanted, room),
                seed=secrets.randbits(63) if seed is None else seed,
            ),
            eos_token_ids=self._eos_token_ids,
            tiles=tuple(tiles),
            placeholders=tuple(prompt.placeholders),
            priority=chat.priority,
            cache_salt=chat.cache_salt,
            arrival_time=arrival_time,
        )

    def encode(self, turns: Sequence[Turn]) -> PromptIds:
        """Token ids and tile placeholders of a conversation."""
        prompt = PromptIds(
            fake_token_id=self.tokenizer.fake_token_id,
            image_token_id=self.tokenizer.image_token_id,
            rows_per_tile=self._rows_per_tile,
        )
        images = [part for turn in turns for part in turn.parts if isinstance(part, ImageInput)]
        segments = self._template.render(turns)
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


def _check_length(num_tokens: int, max_model_len: int, *, at_least: bool = False) -> None:
    """A prompt must leave room for one token of an answer."""
    if num_tokens >= max_model_len:
        raise ClientError(
            f"this model's context is {max_model_len} tokens and an answer needs one of them; the messages take "
            f"{'at least ' if at_least else ''}{num_tokens}",
            param="messages",
            code="context_length_exceeded",
        )
