"""What training reads is what the server makes of the same conversation."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from server.config import ServerConfig
from server.demo.canvas import Canvas, Glyph, Word
from server.demo.checkpoint import END_OF_UTTERANCE_ID
from server.demo.examples import CHARACTERS, IGNORED, NO_GLYPH, NO_WORD, ExampleMaker, _boxes
from server.demo.lexicon import WORDS
from server.demo.scenes.catalog import PAINTERS, paint
from server.demo.scenes.studio import Question, Scene, Studio
from server.demo.shapes import LOOKS, Figure, draw_figure
from server.demo.typefaces import load_font, training_typefaces
from server.inputs.image_processor import cut_and_resize
from server.inputs.processor import InputProcessor
from server.launch import build_llm
from server.types import ImageInput, ImageSettings, TextPart, Turn

IMAGES = ImageSettings(shortest_edge=84, longest_edge=224, do_image_splitting=True)
PATCH = 14
QUESTIONS = [Question("What is this?", "a picture", "talk")]


@pytest.fixture(scope="module")
def maker(tiny_checkpoint: Path) -> ExampleMaker:
    return ExampleMaker(tiny_checkpoint, images=IMAGES, rows_per_tile=64, patch_size=PATCH)


@pytest.fixture(scope="module")
def inputs(tiny_checkpoint: Path) -> InputProcessor:
    return build_llm(ServerConfig(model=str(tiny_checkpoint)))._inputs


def scenes(count: int, size: tuple[int, int] = (200, 150)) -> list[Scene]:
    chance = random.Random(5)
    kinds = list(PAINTERS)
    return [
        paint(kinds[index % len(kinds)], Studio(chance, training_typefaces(), width=size[0], height=size[1]))
        for index in range(count)
    ]


def turns_of(scene: Scene, *, detail: str, answers: int) -> list[Turn]:
    turns = []
    for index, question in enumerate(scene.questions[: answers + 1]):
        parts: list[TextPart | ImageInput] = [TextPart(question.text)]
        if index == scene.shown_at:
            pictures = [ImageInput(url="data:", detail=detail, param="") for _ in scene.canvases]
            parts = [*parts, *pictures] if scene.text_first else [*pictures, *parts]
        turns.append(Turn(role="user", parts=tuple(parts)))
        if index < answers:
            turns.append(Turn(role="assistant", parts=(TextPart(question.answer),)))
    return turns


@pytest.mark.parametrize(("split", "detail"), [(False, "low"), (True, "high")])
def test_ids_are_those_that_the_server_would_make(
    maker: ExampleMaker, inputs: InputProcessor, split: bool, detail: str
) -> None:
    for scene in scenes(40):
        if split and len(scene.canvases) > 1:
            continue
        example = maker.make(scene, split=split)
        answered = [index for index, label in enumerate(example.labels) if label != IGNORED]
        starts = [index for index in answered if index - 1 not in answered]
        for count, start in enumerate(starts):
            prompt = inputs.encode(turns_of(scene, detail=detail, answers=count))
            assert example.token_ids[:start] == prompt.token_ids
        assert scene.shown_at < len(starts) <= len(scene.questions)


def test_a_conversation_that_grows_too_long_loses_its_last_questions(maker: ExampleMaker) -> None:
    scene = scenes(1)[0]
    scene.questions = scene.questions[:1] * 12
    ends = maker.make(scene, split=False).labels.count(END_OF_UTTERANCE_ID)
    assert 2 < ends < 12
    scene.questions = [Question("What is this? " * 40, "nothing", "talk"), *scene.questions]
    assert maker.make(scene, split=False).labels.count(END_OF_UTTERANCE_ID) == 1


def test_answers_alone_are_labels(maker: ExampleMaker, inputs: InputProcessor) -> None:
    for scene in scenes(20):
        example = maker.make(scene, split=False)
        count = example.labels.count(END_OF_UTTERANCE_ID)
        said = [label for label in example.labels if label not in (IGNORED, END_OF_UTTERANCE_ID)]
        assert inputs.tokenizer.decode(said).split() == " ".join(q.answer for q in scene.questions[:count]).split()
        assert count > scene.shown_at


def test_a_letter_is_labelled_in_the_patch_that_its_middle_is_in(maker: ExampleMaker) -> None:
    canvas = Canvas(scenes(1)[0].canvases[0].image.resize((448, 448)))
    canvas.glyphs = [Glyph("7", 20.0, 100.0), Glyph("a", 27.0, 100.0), Glyph("Z", 400.0, 300.0)]
    tiles = cut_and_resize(canvas.image, split=True, settings=IMAGES)
    labels = [maker._by_patch(canvas, box, tile) for box, tile in zip(_boxes(canvas, 5), tiles, strict=True)]
    assert [tile.shape for tile in labels] == [(256, 2)] * 5
    first = labels[0].reshape(16, 16, 2)
    assert first[7, 1].tolist() == [CHARACTERS.index("7"), CHARACTERS.index("a")]
    assert (labels[1] == NO_GLYPH).all()
    assert (labels[2] == NO_GLYPH).all()
    assert labels[3].reshape(16, 16, 2)[5, 12].tolist() == [CHARACTERS.index("Z"), NO_GLYPH]
    whole = labels[4].reshape(16, 16, 2)
    assert whole[3, 0].tolist() == [CHARACTERS.index("7"), CHARACTERS.index("a")]
    assert whole[10, 14].tolist() == [CHARACTERS.index("Z"), NO_GLYPH]


def test_more_letters_than_two_in_a_patch_have_no_label(maker: ExampleMaker) -> None:
    canvas = Canvas(scenes(1)[0].canvases[0].image.resize((224, 224)))
    canvas.glyphs = [Glyph("a", x, 3.0) for x in (1.0, 5.0, 9.0)]
    labels = maker._by_patch(canvas, _boxes(canvas, 1)[0], canvas.image)
    assert labels[0].tolist() == [IGNORED, IGNORED]
    assert np.count_nonzero(labels == IGNORED) == 2


def test_what_is_written_is_told_by_cells_line_by_line(maker: ExampleMaker) -> None:
    canvas = Canvas(scenes(1)[0].canvases[0].image.resize((400, 160)))
    canvas.glyphs = [
        Glyph(letter, x, y) for letter, x, y in (("c", 60, 31), ("a", 55, 22), ("b", 90, 22), ("7", 399, 159))
    ]
    canvas.words = [Word(5, 60, 31)]
    example = maker.make(Scene([canvas], QUESTIONS), split=False)
    labels = example.cells[0].reshape(8, 8, 8)
    assert labels[1, 1].tolist() == [*(CHARACTERS.index(letter) for letter in "abc"), *[NO_GLYPH] * 5]
    assert labels[7, 7, 0] == CHARACTERS.index("7")
    assert np.count_nonzero(labels != NO_GLYPH) == 4
    assert example.words[0].reshape(8, 8, 2)[1, 1].tolist() == [5, NO_WORD]
    upper_left = maker.make(Scene([canvas], QUESTIONS), split=True).cells[0].reshape(8, 8, 8)
    assert upper_left[2, 2].tolist() == [CHARACTERS.index("a"), *[NO_GLYPH] * 7]


def test_of_more_letters_than_a_cell_tells_the_first_count(maker: ExampleMaker) -> None:
    canvas = Canvas(scenes(1)[0].canvases[0].image.resize((400, 160)))
    canvas.glyphs = [Glyph(letter, 2 + 4 * index, 5.0) for index, letter in enumerate("abcdefghij")]
    labels = maker.make(Scene([canvas], QUESTIONS), split=False).cells[0]
    assert labels[0].tolist() == [CHARACTERS.index(letter) for letter in "abcdefgh"]


def test_a_canvas_knows_its_words_and_shapes() -> None:
    canvas = Canvas(Image.new("RGB", (200, 100), "white"))
    font = load_font(training_typefaces()[0], 20)
    canvas.write(10, 30, "Apple 12 nonsense BAG", font, (0, 0, 0))
    assert [WORDS[word.place] for word in canvas.words] == ["apple", "bag"]
    assert "".join(glyph.character for glyph in canvas.glyphs) == "Apple12nonsenseBAG"
    assert 10 < canvas.words[0].x < 10 + font.getlength("Apple")
    assert canvas.smallest == -font.getbbox("H", anchor="ls")[1]
    draw_figure(canvas, Figure("star", "red", 150, 70, 20), (200, 0, 0))
    (mark,) = canvas.marks
    assert (mark.place, mark.x, mark.y) == (LOOKS["star", "red"], 150, 70)


def test_what_stands_on_a_stretched_canvas_is_stretched_with_it() -> None:
    canvas = Canvas(Image.new("RGB", (200, 100), "white"))
    canvas.glyphs, canvas.words, canvas.smallest = [Glyph("a", 50, 50)], [Word(1, 100, 20)], 10.0
    stretched = canvas.resized(300, 50)
    assert stretched.image.size == (300, 50)
    assert stretched.glyphs == [Glyph("a", 75, 25)]
    assert stretched.words == [Word(1, 150, 10)]
    assert stretched.smallest == 5.0


def test_nothing_is_to_be_learnt_from_letters_too_small_to_read(maker: ExampleMaker) -> None:
    canvas = Canvas(Image.new("RGB", (440, 440), "white"))
    canvas.write(20, 20, "apple", load_font(training_typefaces()[0], 8), (0, 0, 0))
    *quarters, whole = maker.make(Scene([canvas], QUESTIONS), split=True).cells
    assert all((labels != IGNORED).all() for labels in quarters)
    assert (whole == IGNORED).all()
