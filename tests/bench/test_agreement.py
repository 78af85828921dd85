"""Where two greedy answers part, and the command that counts how often they do."""

from __future__ import annotations

import re
import sys

import pytest

from server.bench import agreement
from server.bench.agreement import Answer, compare
from server.types import TokenLogprobs


def answer(*tokens: int, shift: float = 0.0) -> Answer:
    """Token t has the log-probability -t / 10, its runner-up 0.25 less."""
    logprobs = [TokenLogprobs(t, -t / 10 + shift, ((t, -t / 10), (99, -t / 10 - 0.25))) for t in tokens]
    return Answer(list(tokens), logprobs)


def test_equal_answers_only_drift() -> None:
    found = compare(answer(1, 2, 3), answer(1, 2, 3, shift=0.5))
    assert (found.parts_at, found.lead) == (None, None)
    assert found.drift == pytest.approx([0.5] * 3)


def test_answers_part_at_the_first_other_token() -> None:
    found = compare(answer(1, 2, 3, 4), answer(1, 2, 7, 4))
    assert found.parts_at == 2
    assert found.lead == pytest.approx(0.25)
    assert len(found.drift) == 2


def test_an_answer_that_goes_on_parts_where_the_other_ends() -> None:
    shorter = compare(answer(1, 2), answer(1, 2, 3))
    assert (shorter.parts_at, shorter.lead, len(shorter.drift)) == (2, None, 2)
    longer = compare(answer(1, 2, 3), answer(1, 2))
    assert longer.parts_at == 2
    assert longer.lead == pytest.approx(0.25)


def test_each_variant_is_compared_with_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = ["plain,dtype=float32", "dtype=float32", "dtype=bfloat16,alone"]
    flags = [word for variant in variants for word in ("--variant", variant)]
    monkeypatch.setattr(agreement, "EXERCISES", agreement.EXERCISES[:2])
    monkeypatch.setattr(sys, "argv", ["agreement", *flags, "--questions", "1"])
    assert agreement.main() == 0
    first, header, _, *rows = capsys.readouterr().out.splitlines()
    assert re.search(r"2 greedy answers of \d+ tokens", first)
    assert "against plain,dtype=float32" in header
    assert [row.split(" | ")[0] for row in rows] == ["| dtype=float32", "| dtype=bfloat16,alone"]
    assert "0 of 2 (0.0%)" in rows[0]
