from __future__ import annotations

import pytest

from server.bench.suite import CURVES, SCALING, STANDARD, SUITES, UnknownRowError, choose_rows


def names(suite: str, chosen: str) -> list[str]:
    return [row.name for row in choose_rows(suite, chosen)]


def test_rows_are_chosen_by_name_in_the_order_asked_for() -> None:
    assert choose_rows("standard", None) == STANDARD
    assert names("standard", "picture,text-1") == ["picture", "text-1"]
    with pytest.raises(UnknownRowError, match=r"no row 'txt': it has text-1, text-8, .*stall"):
        choose_rows("standard", "text-1,txt")


def test_a_curve_is_chosen_with_all_its_points_and_none_twice() -> None:
    assert names("scaling", "images-2,images") == [f"images-{count}" for count in (2, 0, 1, 4, 8, 16)]
    with pytest.raises(UnknownRowError, match="no row ''"):
        choose_rows("scaling", "")


@pytest.mark.parametrize("suite", SUITES)
def test_names_are_distinct(suite: str) -> None:
    assert len({row.name for row in SUITES[suite]}) == len(SUITES[suite])


def test_each_point_of_a_curve_differs_from_the_others_in_what_its_axis_says() -> None:
    along = {"concurrency": "concurrency", "prompt": "input_len", "images": "images"}
    assert {row.curve for row in SCALING} == set(CURVES) == set(along)
    for curve, attribute in along.items():
        points = [row for row in SCALING if row.curve == curve]
        assert all(getattr(row, attribute) == row.x for row in points)
        assert len({row.measure for row in points}) == 1
        assert [row.x for row in points] == sorted({row.x for row in points})


def test_as_many_requests_are_sent_as_are_to_be_in_flight() -> None:
    assert all(row.num_requests >= row.concurrency for row in SCALING)
