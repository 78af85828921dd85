"""Every kind of scene by its name."""

from __future__ import annotations

from collections.abc import Mapping

from server.demo.scenes.figures import figures
from server.demo.scenes.ledgers import page, receipt, table
from server.demo.scenes.pairs import compare
from server.demo.scenes.studio import Painter, Scene, Studio
from server.demo.scenes.talk import nothing, without_picture
from server.demo.scenes.texts import lines, one_number, one_word

PAINTERS: Mapping[str, Painter] = {
    "number": one_number,
    "word": one_word,
    "lines": lines,
    "figures": figures,
    "table": table,
    "receipt": receipt,
    "page": page,
    "compare": compare,
    "nothing": nothing,
}


def paint(kind: str, studio: Studio) -> Scene:
    """A scene of this kind; where things do not fit they are drawn again, and a number alone always fits at last.

    Now and then the picture comes behind the words of its question, or only after something was said without it.
    """
    scene = _paint(kind, studio)
    chance = studio.chance
    scene.text_first = chance.random() < 0.2
    if scene.canvases and chance.random() < 0.08:
        scene.questions[:0] = without_picture(chance, 1)
        scene.shown_at = 1
    return scene


def _paint(kind: str, studio: Studio) -> Scene:
    for _ in range(8):
        scene = PAINTERS[kind](studio)
        if scene is not None:
            return scene
    while (scene := one_number(studio)) is None:
        continue
    return scene
