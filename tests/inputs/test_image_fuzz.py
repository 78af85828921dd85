"""A slice of the campaign `tests.campaigns.fuzz_images`, and proof that it would notice."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import uvloop

from server.errors import ClientError
from server.inputs.image_pool import ImagePool
from server.types import Tile
from tests.campaigns import fuzz_images
from tests.campaigns.fuzz_images import CODES, Report, run_campaign
from tests.campaigns.hostile_images import MUTATIONS, bombs, hostile_file, whole_files


def test_mutated_files_give_tiles_or_a_refusal() -> None:
    report = uvloop.run(run_campaign(500, seed=1))
    assert report.misses == []
    assert sum(report.outcomes.values()) == 500
    assert report.outcomes["200"] > 50
    assert {outcome.removeprefix("400 ").partition(",")[0] for outcome in report.outcomes} <= CODES | {"200"}
    assert report.outcomes["400 image_parse_error"] > 50
    assert report.outcomes["400 image_too_large"] > 5
    assert "misses                                                0" in report.table()


def test_files_are_made_again_by_their_numbers() -> None:
    assert [hostile_file(3, number) for number in range(50)] == [hostile_file(3, number) for number in range(50)]
    assert hostile_file(3, 0) != hostile_file(4, 0)
    made = {hostile_file(0, number) for number in range(1000)}
    assert len(made) > 800
    assert len(whole_files()) > 25
    assert len(bombs()) > 25
    assert len(MUTATIONS) > 10


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        (KeyError("x"), "KeyError"),
        (ClientError("no", code="image_parse_error", param="elsewhere"), "for elsewhere"),
        (ClientError("no", code="invented", param="messages[0].content[0].image_url.url"), "invented"),
        (ClientError("bad block at 0x7f00", code="image_parse_error", param="p"), "tells too much"),
        ((Tile(b"k" * 32, 378, 378, b"short"),), "other numbers or sizes"),
        ((), "other numbers or sizes"),
    ],
)
def test_a_miss_is_noticed(outcome: object, told: str) -> None:
    async def tiles(pool: ImagePool, data: bytes, *, split: bool, param: str) -> object:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def run() -> Report:
        report = Report()
        with patch.object(ImagePool, "tiles", tiles):
            await fuzz_images._send_all(ImagePool.__new__(ImagePool), report, 0, iter(range(3)))
        return report

    report = uvloop.run(run())
    assert len([miss for miss in report.misses if told in miss]) >= 3


def test_what_is_left_behind_is_noticed() -> None:
    report = Report(memory={"parent": (100, 105), "worker 0": (100, 106)}, num_files=(9, 10), num_processes=(2, 3))
    fuzz_images._judge(report)
    assert [miss.split(" ", 1)[1] for miss in report.misses] == [
        "0 holds 6 bytes more than before",
        "open files are left",
        "processes are left",
    ]
