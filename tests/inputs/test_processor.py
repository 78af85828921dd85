"""Conversations to engine requests: ids as transformers' processor gives them, and limits before any work."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import CheckpointError, ClientError, ServerError
from server.inputs.chat_template import FAMILY_TEMPLATE, ChatTemplate
from server.inputs.images import Tiles
from server.inputs.processor import INLINE_CHARACTERS, TURN_CHARACTERS, InputProcessor
from server.inputs.tokenizer import Tokenizer
from server.observability.metrics import ServerMetrics
from server.types import (
    ChatInput,
    EngineRequest,
    ImageDetail,
    ImageInput,
    PromptInput,
    RequestOrigin,
    SamplingParams,
    TextPart,
    Truncation,
    Turn,
)
from tests.factories import make_tile
from tests.inputs.conftest import Variant

SPECIAL = ("<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>")
ROLES = ("user", "assistant", "system")


class NoGrammars:
    """Stands where nothing in these tests has a grammar."""

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass


class FakeImages:
    """Gives every image its number of tiles, named after its URL, and notes what was asked of it."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.loaded: list[list[str]] = []
        self.asked_by: list[tuple[str, str]] = []
        self.failure = failure
        self.log: list[str] = []

    async def start(self) -> None:
        self.log.append("start")

    async def close(self) -> None:
        self.log.append("close")

    def num_tiles(self, image: ImageInput) -> int:
        return 5 if image.detail == "high" else 1

    async def load(self, images: Sequence[ImageInput], *, key: str, salt: str) -> list[Tiles]:
        self.loaded.append([image.url for image in images])
        self.asked_by.append((key, salt))
        if self.failure is not None:
            raise self.failure
        return [tuple(make_tile(f"{image.url}-{i}") for i in range(self.num_tiles(image))) for image in images]


def make_processor(
    tokenizer: Tokenizer,
    images: FakeImages | None = None,
    *,
    template: str = FAMILY_TEMPLATE,
    max_images: int = 4,
    share_caches_between_keys: bool = False,
) -> InputProcessor:
    return InputProcessor(
        tokenizer=tokenizer,
        template=ChatTemplate(template, special_tokens=tokenizer.special_tokens),
        images=images or FakeImages(),  # type: ignore[arg-type]
        grammars=NoGrammars(),  # type: ignore[arg-type]
        metrics=ServerMetrics("test"),
        rows_per_tile=64,
        eos_token_ids=(2, 32002),
        max_images=max_images,
        share_caches_between_keys=share_caches_between_keys,
    )


def image(url: str = "a", detail: ImageDetail = "low") -> ImageInput:
    return ImageInput(url, detail, "messages[0].content[0].image_url")


def turn(*parts: str | ImageInput, role: str = "user") -> Turn:
    return Turn(role, tuple(TextPart(part) if isinstance(part, str) else part for part in parts))


def make_chat(*turns: Turn, request_id: str = "r", **sampling: object) -> ChatInput:
    return ChatInput(request_id=request_id, turns=turns, sampling=SamplingParams(**sampling))  # type: ignore[arg-type]


def process(processor: InputProcessor, chat: ChatInput, *, max_model_len: int = 4096) -> EngineRequest:
    return asyncio.run(processor.process(chat, max_model_len=max_model_len))


# -- ids ------------------------------------------------------------------------------------------------------------

CONVERSATIONS: list[list[Turn]] = [
    [turn("Hello")],
    [turn("  two  spaces ")],
    [turn("Hi"), turn("Hello there.", role="assistant"), turn("And\nnow?")],
    [turn("Be brief.", role="system"), turn("数字は三です 🦊")],
    [turn(image(), "What is this?")],
    [turn(image(), " What is this?")],
    [turn(image(), "<b>bold?</b>")],
    [turn(image(), "\nnew line")],
    [turn(image(), "123")],
    [turn(image(), "…")],
    [turn("Before", image(), "after")],
    [turn("Before ", image("a"), image("b"), "after", image("c"))],
    [turn(image())],
    [turn(image("a"), image("b"))],
    [turn(image("a"), "One.", image("b")), turn("Yes.", role="assistant"), turn(image("c"), "And this?")],
    [turn(image("a"), "", "joined", " texts")],
    [turn("")],
]


def reference_ids(variant: Variant, turns: Sequence[Turn], *, split: bool) -> list[int]:
    from transformers import Idefics2ImageProcessorPil, Idefics2Processor

    image_processor = Idefics2ImageProcessorPil(do_image_splitting=split)
    processor: Any = Idefics2Processor(
        image_processor, variant.reference, image_seq_len=64, chat_template=FAMILY_TEMPLATE
    )
    messages = [
        {
            "role": item.role,
            "content": [
                {"type": "image"} if isinstance(part, ImageInput) else {"type": "text", "text": part.text}
                for part in item.parts
            ],
        }
        for item in turns
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    ids: list[int] = processor(text=text)["input_ids"][0]
    return ids


@pytest.mark.parametrize("split", [False, True])
def test_ids_equal_the_reference_processors(variant: Variant, split: bool) -> None:
    processor = make_processor(variant.ours)
    for turns in CONVERSATIONS:
        detail: ImageDetail = "high" if split else "low"
        asked = [
            turn(*(image(p.url, detail) if isinstance(p, ImageInput) else p.text for p in t.parts), role=t.role)
            for t in turns
        ]
        prompt = processor.encode(asked)
        assert prompt.token_ids == reference_ids(variant, turns, split=split), turns
        assert sum(place.length for place in prompt.placeholders) == prompt.token_ids.count(32001)


def test_published_examples(variant: Variant) -> None:
    """`What` after a picture, and the line break after an utterance, by the tokenizer's legacy flag."""
    ids = make_processor(variant.ours).encode([turn(image(), "What")]).token_ids
    assert ids[ids.index(32000, ids.index(32001)) + 1] == 1824
    after = ids[ids.index(32002) + 1 :]
    assert after[:2] == ([13, 7226] if variant.name == "not legacy" else [28705, 13])


def test_pictures_in_a_row_share_a_boundary_and_mixed_details_count(tokenizer: Tokenizer) -> None:
    prompt = make_processor(tokenizer).encode([turn(image("a", "high"), image("b"), "x", image("c"))])
    assert prompt.token_ids.count(32000) == 6 + 1 + 2
    assert prompt.token_ids.count(32001) == 64 * 7
    assert len(prompt.placeholders) == 7


TEXT = st.one_of(
    st.sampled_from([*SPECIAL, "".join(SPECIAL), "{{ bos_token }}", "\x02" + "0\x03"]), st.text(max_size=6)
)


@given(
    st.lists(
        st.tuples(st.sampled_from(ROLES), st.lists(TEXT, min_size=1, max_size=4), st.booleans()), min_size=1, max_size=3
    )
)
@settings(max_examples=200, deadline=None)
def test_words_give_no_special_ids_in_any_role(
    variant: Variant, conversation: list[tuple[str, list[str], bool]]
) -> None:
    turns = [turn(*parts, *([image()] if pictured else []), role=role) for role, parts, pictured in conversation]
    ids = make_processor(variant.ours).encode(turns).token_ids
    pictures = sum(pictured for _, _, pictured in conversation)
    assert ids[0] == 1
    assert not {0, 1, 2} & set(ids[1:])
    counts = [ids.count(token) for token in (32000, 32001, 32002)]
    assert counts == [2 * pictures, 64 * pictures, len(turns)]
    assert max(ids) <= 32002


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", SPECIAL)
def test_names_of_special_tokens_are_words(variant: Variant, name: str, role: str) -> None:
    encode = make_processor(variant.ours).encode
    ids = encode([turn(f"a{name}b", role=role), turn(name, role=role)]).token_ids
    plain = encode([turn("a", role=role), turn("b", role=role)]).token_ids
    for token in (0, 1, 2, 32000, 32001, 32002):
        assert ids.count(token) == plain.count(token)
    assert len(ids) > len(plain) + 2


def test_a_template_with_its_own_bos_gets_no_second(tokenizer: Tokenizer) -> None:
    plain = make_processor(tokenizer).encode([turn("Hi")]).token_ids
    for source in ("{{ bos_token }}" + FAMILY_TEMPLATE, "<s>" + FAMILY_TEMPLATE):
        assert make_processor(tokenizer, template=source).encode([turn("Hi")]).token_ids == plain


# -- templates and pictures that do not match -----------------------------------------------------------------------

LAST_ONLY = (
    "{% for part in messages[-1].content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
    "<end_of_utterance>"
)


def test_a_template_that_leaves_a_picture_out_is_noticed(tokenizer: Tokenizer) -> None:
    processor = make_processor(tokenizer, template=LAST_ONLY)
    with pytest.raises((ServerError, CheckpointError)):
        process(processor, make_chat(turn(image(), "What?"), turn("And now?")))


def test_a_template_that_repeats_a_picture_is_noticed(tokenizer: Tokenizer) -> None:
    source = FAMILY_TEMPLATE + "{% if messages[1] is defined %}<image>{% endif %}"
    with pytest.raises((ServerError, CheckpointError)):
        process(make_processor(tokenizer, template=source), make_chat(turn("a"), turn(image(), "b")))


def test_a_conversation_of_which_a_template_prints_nothing_is_noticed(tokenizer: Tokenizer) -> None:
    source = "{% for m in messages %}{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}"
    processor = make_processor(tokenizer, template=source + "{% endfor %}{% endfor %}")
    with pytest.raises((ServerError, CheckpointError)):
        process(processor, make_chat(turn("")))


# -- limits ---------------------------------------------------------------------------------------------------------


def test_too_many_images_are_refused_before_any_is_loaded(tokenizer: Tokenizer) -> None:
    images = FakeImages()
    processor = make_processor(tokenizer, images, max_images=3)
    turns = (turn(image("a"), image("b")), turn("ok", role="assistant"), turn(image("c"), image("d")))
    with pytest.raises(ClientError, match="may hold 3 images, this one holds 4") as caught:
        process(processor, make_chat(*turns))
    assert (caught.value.code, caught.value.param, caught.value.status) == ("too_many_images", "messages", 400)
    assert images.loaded == []
    assert len(process(processor, make_chat(*turns[:2], turn(image("c")))).tiles) == 3


def test_no_image_is_allowed_where_none_is(tokenizer: Tokenizer) -> None:
    processor = make_processor(tokenizer, max_images=0)
    assert process(processor, make_chat(turn("Hi"))).tiles == ()
    with pytest.raises(ClientError, match="may hold 0 images"):
        process(processor, make_chat(turn(image())))


def refuse_to_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(self: Tokenizer, text: str, *, first: bool) -> list[int]:
        raise AssertionError("encoded a text that cannot fit")

    monkeypatch.setattr(Tokenizer, "encode", encode)


def test_a_text_that_cannot_fit_is_refused_without_encoding_it(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = make_processor(tokenizer)
    refuse_to_encode(monkeypatch)
    chats = [make_chat(turn("a " * 2_500_000)), make_chat(*[turn("word " * 500) for _ in range(2000)])]
    for chat in chats:
        started = time.monotonic()
        with pytest.raises(ClientError, match=r"context length is 4096 tokens.* takes at least") as caught:
            process(processor, chat)
        assert caught.value.code == "context_length_exceeded"
        assert time.monotonic() - started < 1
    with pytest.raises(AssertionError):
        process(processor, make_chat(turn("short")))


def test_a_prompt_must_leave_room_for_one_token(tokenizer: Tokenizer) -> None:
    images = FakeImages()
    processor = make_processor(tokenizer, images)
    chat = make_chat(turn(image(), "What is this?"))
    length = len(processor.encode(chat.turns).token_ids)
    assert process(processor, chat, max_model_len=length + 1).max_tokens == 1
    images.loaded.clear()
    with pytest.raises(ClientError, match=f"'messages' takes {length}$") as caught:
        process(processor, chat, max_model_len=length)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    assert images.loaded == []


def test_pictures_count_before_they_are_loaded(tokenizer: Tokenizer) -> None:
    images = FakeImages()
    with pytest.raises(ClientError, match=r"'messages' takes 3\d\d$"):
        process(make_processor(tokenizer, images), make_chat(turn(image("a", "high"))), max_model_len=326)
    assert images.loaded == []


@pytest.mark.parametrize(("asked", "given"), [(None, 50), (1, 1), (49, 49), (50, 50), (51, 50), (10**9, 50)])
def test_max_tokens_is_at_most_what_the_context_leaves(tokenizer: Tokenizer, asked: int | None, given: int) -> None:
    processor = make_processor(tokenizer)
    turns = [turn("Hello")]
    length = len(processor.encode(turns).token_ids)
    request = process(processor, make_chat(*turns, max_tokens=asked), max_model_len=length + 50)
    assert request.max_tokens == given


# -- the rest of a request ------------------------------------------------------------------------------------------


def test_a_request_carries_what_the_engine_needs(tokenizer: Tokenizer) -> None:
    images = FakeImages()
    processor = make_processor(tokenizer, images)
    chat = ChatInput(
        request_id="mine",
        turns=(turn(image("a", "high"), "x"), turn(image("b"), "y")),
        sampling=SamplingParams(max_tokens=9, temperature=0.3, stop=("x",), seed=5, logit_bias={3: 1.0}),
        priority=7,
        cache_salt="salt",
    )
    before = time.monotonic()
    request = process(processor, chat)
    assert before <= request.arrival_time <= time.monotonic()
    assert images.loaded == [["a", "b"]]
    assert request.tiles == (*(make_tile(f"a-{i}") for i in range(5)), make_tile("b-0"))
    assert len(request.placeholders) == 6
    assert all(request.prompt_token_ids[p.offset : p.end] == [32001] * 64 for p in request.placeholders)
    assert (request.priority, request.cache_salt, request.eos_token_ids) == (7, "salt", (2, 32002))
    assert request.sampling == chat.sampling
    assert request.request_id.startswith("mine")


def salts(processor: InputProcessor, images: FakeImages, askers: Sequence[tuple[str, str]]) -> list[str]:
    """What keeps the caches of these (key, cache_salt) apart; pictures and blocks are salted alike."""
    images.asked_by.clear()
    found = []
    for key, cache_salt in askers:
        chat = msgspec.structs.replace(make_chat(turn("x")), origin=RequestOrigin(key=key), cache_salt=cache_salt)
        found.append(process(processor, chat).cache_salt)
    assert images.asked_by == [(key, salt) for (key, _), salt in zip(askers, found, strict=True)]
    return found


def test_no_two_keys_share_a_salt_whatever_their_clients_choose(tokenizer: Tokenizer) -> None:
    images = FakeImages()
    askers = [(key, salt) for key in ("a", "a:b", "ab", "1:a") for salt in ("", "a", "b", ":b", "b:", "1:a:", "a:b")]
    found = salts(make_processor(tokenizer, images), images, askers)
    assert len(set(found)) == len(askers)
    assert "" not in found


def test_without_keys_or_where_keys_share_the_clients_salt_alone_counts(tokenizer: Tokenizer) -> None:
    images = FakeImages()
    assert salts(make_processor(tokenizer, images), images, [("", ""), ("", "x")]) == ["", "x"]
    sharing = make_processor(tokenizer, images, share_caches_between_keys=True)
    assert salts(sharing, images, [("a", ""), ("b", ""), ("a", "x"), ("b", "x")]) == ["", "", "x", "x"]


def test_ids_are_never_the_same_even_where_clients_choose_them_so(tokenizer: Tokenizer) -> None:
    processor = make_processor(tokenizer)
    names = [process(processor, make_chat(turn("a"), request_id=name)).request_id for name in ("r", "r", "r-1", "", "")]
    assert len(set(names)) == 5


def test_a_seed_is_kept_and_a_missing_one_is_chosen_anew(tokenizer: Tokenizer) -> None:
    processor = make_processor(tokenizer)
    assert [process(processor, make_chat(turn("a"), seed=seed)).sampling.seed for seed in (0, -5, 2**63 - 1)] == [
        0,
        -5,
        2**63 - 1,
    ]
    chosen = {process(processor, make_chat(turn("a"))).sampling.seed for _ in range(5)}
    assert len(chosen) == 5
    assert all(seed is not None and 0 <= seed < 2**63 for seed in chosen)


def test_an_image_that_cannot_be_loaded_fails_the_request(tokenizer: Tokenizer) -> None:
    failure = ClientError("no such picture", param="messages[0].content[0].image_url", code="image_parse_error")
    processor = make_processor(tokenizer, FakeImages(failure))
    with pytest.raises(ClientError) as caught:
        process(processor, make_chat(turn(image())))
    assert caught.value is failure


def test_long_texts_are_encoded_beside_the_event_loop(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = make_processor(tokenizer)
    threads: list[threading.Thread] = []
    original = Tokenizer.encode

    def encode(self: Tokenizer, text: str, *, first: bool) -> list[int]:
        threads.append(threading.current_thread())
        return original(self, text, first=first)

    monkeypatch.setattr(Tokenizer, "encode", encode)
    longest = INLINE_CHARACTERS - TURN_CHARACTERS
    for size, inline in ((longest, True), (longest + 1, False)):
        threads.clear()
        request = process(processor, make_chat(turn("a" * size)), max_model_len=10**6)
        assert {thread is threading.main_thread() for thread in threads} == {inline}
        assert request.prompt_token_ids == processor.encode([turn("a" * size)]).token_ids


def test_starting_and_closing_reach_the_image_pipeline(tokenizer: Tokenizer) -> None:
    images = FakeImages()
    processor = make_processor(tokenizer, images)

    async def live() -> None:
        await processor.start()
        await processor.close()

    asyncio.run(live())
    assert images.log == ["start", "close"]


# -- prompts, open turns, truncation --------------------------------------------------------------------------------


def make_prompt(prompt: str | tuple[int, ...], **changes: Any) -> PromptInput:
    return PromptInput(request_id="r", prompt=prompt, sampling=SamplingParams(), **changes)


def process_prompt(processor: InputProcessor, prompt: PromptInput, *, max_model_len: int = 4096) -> EngineRequest:
    return asyncio.run(processor.process(prompt, max_model_len=max_model_len))


@pytest.mark.parametrize("text", ["Hello", " Hello  world", "日本 🦊\n", "<image></s> plain", "x" * 9000])
def test_a_prompts_ids_are_the_tokenizers_own(variant: Variant, text: str) -> None:
    plain = None if "<" in text else variant.reference(text).input_ids
    processor = make_processor(variant.ours)
    request = process_prompt(processor, make_prompt(text), max_model_len=20000)
    if plain is not None:
        assert request.prompt_token_ids == plain
    else:
        assert not {32000, 32001, 2} & set(request.prompt_token_ids)
    assert request.prompt_token_ids[:1] == variant.ours.bos_token_ids
    bare = process_prompt(processor, make_prompt(text, add_special_tokens=False), max_model_len=20000)
    assert variant.ours.bos_token_ids + bare.prompt_token_ids == request.prompt_token_ids
    assert request.continues_text


def test_ids_are_taken_as_they_are(tokenizer: Tokenizer) -> None:
    request = process_prompt(make_processor(tokenizer), make_prompt((5, 1, 2, 900), n=3, cache_salt="s", priority=4))
    assert request.prompt_token_ids == [5, 1, 2, 900]
    assert (request.n, request.cache_salt, request.priority) == (3, "s", 4)


def test_a_prompt_of_nothing_at_all_is_refused_and_one_of_bos_alone_is_not(tokenizer: Tokenizer) -> None:
    processor = make_processor(tokenizer)
    request = process_prompt(processor, make_prompt(""))
    assert request.prompt_token_ids == [1]
    assert not request.continues_text
    for empty in (make_prompt("", add_special_tokens=False, param="prompt[2]"), make_prompt((), param="prompt[2]")):
        with pytest.raises(ClientError) as caught:
            process_prompt(processor, empty)
        assert caught.value.param == "prompt[2]"


def test_a_prompt_that_is_too_long_names_its_field(tokenizer: Tokenizer) -> None:
    processor = make_processor(tokenizer)
    for prompt in (make_prompt((5,) * 64, param="prompt[1]"), make_prompt("word " * 4000, param="prompt[1]")):
        with pytest.raises(ClientError) as caught:
            process_prompt(processor, prompt, max_model_len=64)
        assert (caught.value.param, caught.value.code) == ("prompt[1]", "context_length_exceeded")


def test_an_open_turn_ends_with_its_last_word(tokenizer: Tokenizer) -> None:
    processor = make_processor(tokenizer)
    turns = [turn("Say it."), turn("The answer is", role="assistant")]
    ids = processor.encode(turns, continue_final_message=True).token_ids
    closed = processor.encode(turns, add_generation_prompt=False).token_ids
    assert closed[: len(ids)] == ids
    assert tokenizer.decode(ids).endswith("Assistant: The answer is")
    assert tokenizer.decode(closed).endswith("The answer is<end_of_utterance> \n")
    chat = ChatInput(request_id="r", turns=tuple(turns), sampling=SamplingParams(), continue_final_message=True)
    request = process(processor, chat)
    assert request.prompt_token_ids == ids
    assert request.continues_text


def test_an_open_turn_without_words_is_a_generation_prompt(tokenizer: Tokenizer) -> None:
    processor = make_processor(tokenizer)
    turns = (turn("Say it."), turn("", role="assistant"))
    chat = ChatInput(request_id="r", turns=turns, sampling=SamplingParams(), continue_final_message=True)
    request = process(processor, chat)
    assert request.prompt_token_ids == processor.encode(turns[:1]).token_ids
    assert not request.continues_text
    assert not process(processor, make_chat(turn("Hi"))).continues_text


@pytest.mark.parametrize(("side", "kept"), [("left", [6, 7, 8]), ("right", [1, 2, 3])])
def test_truncation_keeps_one_end(tokenizer: Tokenizer, side: Literal["left", "right"], kept: list[int]) -> None:
    processor = make_processor(tokenizer)
    prompt = make_prompt((1, 2, 3, 4, 5, 6, 7, 8), truncation=Truncation(3, side))
    assert process_prompt(processor, prompt).prompt_token_ids == kept
    assert process_prompt(processor, make_prompt((1, 2), truncation=Truncation(3, side))).prompt_token_ids == [1, 2]


def test_truncation_without_a_number_leaves_room_for_the_answer(tokenizer: Tokenizer) -> None:
    processor = make_processor(tokenizer)
    prompt = PromptInput(
        request_id="r", prompt=(5,) * 100, sampling=SamplingParams(max_tokens=24), truncation=Truncation(None)
    )
    request = process_prompt(processor, prompt, max_model_len=64)
    assert (len(request.prompt_token_ids), request.max_tokens) == (40, 24)


def test_a_prompt_with_pictures_is_not_cut_through(tokenizer: Tokenizer) -> None:
    chat = ChatInput(request_id="r", turns=(turn(image(), "Hi"),), sampling=SamplingParams(), truncation=Truncation(10))
    images = FakeImages()
    with pytest.raises(ClientError) as caught:
        process(make_processor(tokenizer, images), chat)
    assert (caught.value.param, caught.value.code) == ("truncate_prompt_tokens", "unsupported_parameter")
    assert not images.loaded
