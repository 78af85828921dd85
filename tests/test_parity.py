"""Exactness against transformers, over random conversations with pictures, at two model sizes, in float32.

The reference is Idefics2Processor and Idefics2ForConditionalGeneration. Greedy decoding is compared without running
it twice: one reference forward over prompt and answer must prefer, at every position, the token that we chose. By
induction that is the sequence it would have generated.
"""

from __future__ import annotations

import asyncio
import base64
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Idefics2ForConditionalGeneration, Idefics2ImageProcessorPil, Idefics2Processor

from server.config import ServerConfig
from server.engine.core import EngineCore
from server.inputs.image_processor import resized_size
from server.inputs.processor import InputProcessor
from server.launch import build_inputs
from server.observability.metrics import ServerMetrics
from server.types import ChatInput, EngineRequest, ImageInput, ImageSettings, SamplingParams, TextPart, Turn
from tests.engines import Answers, drive, noise_image, png, real_core, record_first_logits

CONVERSATIONS = 110  # a size; both together make more than 200
NEW_TOKENS = 32
SETTINGS = ImageSettings(shortest_edge=378, longest_edge=980, do_image_splitting=True)

WORDS = [
    *("What is the total on this receipt?", "Describe", "  two  spaces", "naïve café", "数字は三です", "…", "مرحبا"),
    *(
        "🦊 emoji 👩‍👩‍👧",
        "line\nbreak",
        "tab\there",
        "12,345.67 €",
        "<b>html</b>",
        "User: fake",
        "Assistant:",
        "x",
        "\n",
    ),
    *(
        "ﬁ ligature",
        "a b c d e",
        "(parenthesis)",
        "<",
        "image >",
        "'quoted'",
        "https://example.org/a.png",
        "   ",
        "end. ",
    ),
]


@dataclass
class Conversation:
    turns: tuple[Turn, ...]
    images: list[Image.Image]
    split: bool

    def reference_messages(self) -> list[dict[str, Any]]:
        def part(item: TextPart | ImageInput) -> dict[str, str]:
            return {"type": "image"} if isinstance(item, ImageInput) else {"type": "text", "text": item.text}

        return [{"role": turn.role, "content": [part(item) for item in turn.parts]} for turn in self.turns]


def comparable(width: int, height: int, *, split: bool) -> bool:
    """Whether the reference can be asked: it divides by zero for 1-pixel crops, and at grids of 49 and 58 patches its
    position table is not the one that the weights were trained with (tests/model/test_vision.py has the formula)."""
    sizes = [(width, height)]
    if split:
        half_w, half_h = width // 2, height // 2
        sizes += [(w, h) for w in (half_w, width - half_w) for h in (half_h, height - half_h)]
    if any(0 in size for size in sizes):
        return False
    return all(side // 14 not in (49, 58) for size in sizes for side in resized_size(*size, SETTINGS))


def random_image(rng: random.Random, *, split: bool) -> Image.Image:
    while True:
        longest = rng.choice([40, 300, 500, 700, 700, 1100])
        width, height = rng.randint(2, longest), rng.randint(2, longest)
        if comparable(width, height, split=split):
            return noise_image(width, height, rng.randrange(1 << 30))


def random_conversation(rng: random.Random) -> Conversation:
    split = rng.random() < 0.4
    images = [random_image(rng, split=split) for _ in range(rng.choice([0, 0, 1, 1, 1, 2, 2, 3, 4]))]
    num_turns = rng.randint(1, 3)
    where = sorted(rng.randrange(num_turns) for _ in images)
    turns: list[Turn] = []
    for index in range(num_turns):
        texts = [TextPart("".join(rng.choices(WORDS, k=rng.randint(1, 6)))) for _ in range(rng.randint(1, 2))]
        parts: list[TextPart | ImageInput] = list(texts)
        for number, turn in enumerate(where):
            if turn == index:
                url = f"data:image/png;base64,{base64.b64encode(png(images[number])).decode()}"
                parts.append(ImageInput(url=url, detail="high" if split else "low", param=f"image {number}"))
        # Shuffle texts and pictures, but keep the pictures in order: the reference is given them as a list.
        pictures = iter([part for part in parts if isinstance(part, ImageInput)])
        rng.shuffle(parts)
        parts = [next(pictures) if isinstance(part, ImageInput) else part for part in parts]
        turns.append(Turn(role="user", parts=tuple(parts)))
        if index < num_turns - 1:
            turns.append(Turn(role="assistant", parts=(TextPart("".join(rng.choices(WORDS, k=3))),)))
    return Conversation(tuple(turns), images, split)


class Reference:
    """transformers' own processor and model."""

    def __init__(self, folder: Path) -> None:
        self.model = Idefics2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        template = (folder / "chat_template.jinja").read_text()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processors = {}
        for split in (False, True):
            image_processor = Idefics2ImageProcessorPil.from_pretrained(folder, do_image_splitting=split)
            self.processors[split] = Idefics2Processor(
                image_processor, tokenizer, image_seq_len=64, chat_template=template
            )

    def inputs(self, conversation: Conversation) -> Any:
        processor = self.processors[conversation.split]
        text = processor.apply_chat_template(conversation.reference_messages(), add_generation_prompt=True)
        return processor(text=text, images=conversation.images or None, return_tensors="pt")

    @torch.no_grad()
    def logits(self, inputs: Any, answer: list[int]) -> torch.Tensor:
        """Logits [1 + len(answer), vocab] at the prompt's last token and at each token of the answer."""
        ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
        extra = {key: inputs[key] for key in ("pixel_values", "pixel_attention_mask") if key in inputs}
        output = self.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=len(answer) + 1, use_cache=False, **extra
        )
        return output.logits[0]


async def prepare(
    processor: InputProcessor, conversations: list[Conversation], max_model_len: int, *, max_tokens: int = NEW_TOKENS
) -> list[EngineRequest]:
    await processor.start()
    try:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        return [
            await processor.process(
                ChatInput(request_id=f"c{i}", turns=conversation.turns, sampling=sampling), max_model_len=max_model_len
            )
            for i, conversation in enumerate(conversations)
        ]
    finally:
        await processor.close()


@dataclass
class Case:
    reference: Reference
    conversations: list[Conversation]
    requests: list[EngineRequest]
    answers: Answers
    first_logits: dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=["tiny_checkpoint", "tied_checkpoint"])
def case(request: pytest.FixtureRequest) -> Case:
    """All conversations of one model size, answered by our engine in one busy batch."""
    folder: Path = request.getfixturevalue(request.param)
    rng = random.Random(request.param)
    conversations = [random_conversation(rng) for _ in range(CONVERSATIONS)]
    core: EngineCore = real_core(folder, max_num_seqs=16, kv_cache_memory_gb=0.05)
    first_logits = record_first_logits(core)
    inputs = build_inputs(ServerConfig(max_images=4), folder, ServerMetrics("test"))
    requests = asyncio.run(prepare(inputs, conversations, core.info.max_model_len))
    return Case(Reference(folder), conversations, requests, drive(core, requests), first_logits)


@pytest.mark.slow
def test_prompts_logits_and_greedy_tokens_equal_the_reference(case: Case) -> None:
    worst, compared = 0.0, 0
    for conversation, request in zip(case.conversations, case.requests, strict=True):
        inputs = case.reference.inputs(conversation)
        assert request.prompt_token_ids == inputs["input_ids"][0].tolist()
        answer = case.answers.tokens[request.request_id]
        logits = case.reference.logits(inputs, answer)
        worst = max(worst, float((logits[0] - case.first_logits[request.request_id]).abs().max()))
        logits[:, [32000, 32001]] = float("-inf")  # generation_config's bad_words_ids
        assert answer == logits[:-1].argmax(-1).tolist(), f"{request.request_id}: {len(conversation.images)} images"
        compared += len(answer)
    print(f"\n{len(case.conversations)} conversations, {compared} tokens equal; first logits differ by {worst:.2e}")
    assert worst < 1e-3
    assert sum(len(c.images) > 0 for c in case.conversations) > CONVERSATIONS // 2
    assert sum(c.split and len(c.images) > 0 for c in case.conversations) > CONVERSATIONS // 8
