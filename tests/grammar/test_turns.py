"""Who is served next, and that nothing which is lent out is ever lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import pytest

from server.grammar.turns import Turns


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def served(turns: Turns[int], order: list[str], *keys: str) -> list[asyncio.Task[int]]:
    """A task for each key, which notes its key once it has got an item."""

    async def take(key: str) -> int:
        item = await turns.take(key)
        order.append(key)
        return item

    return [asyncio.create_task(take(key)) for key in keys]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 10))


def test_a_key_holds_one_item_and_the_nameless_all() -> None:
    async def work() -> None:
        turns, order = Turns([1, 2, 3]), []
        first, second = served(turns, order, "a", "a")
        await settle()
        assert first.done()
        assert not second.done()
        nameless = served(turns, order, "", "", "")
        await settle()
        assert [task.done() for task in nameless] == [True, True, False]
        turns.give_back(first.result(), "a")
        await settle()
        assert second.done()
        assert order == ["a", "", "", "a"]  # the second "a" has waited longer than the third ""
        turns.give_back(nameless[0].result(), "")
        await settle()
        assert nameless[2].done()

    run(work())


def test_keys_take_turns_however_many_wait_under_one() -> None:
    async def work() -> None:
        turns, order = Turns([1]), []
        held = await turns.take("x")
        served(turns, order, "a", "a", "a", "b", "c", "b")
        await settle()
        turns.give_back(held, "x")
        for _ in range(5):
            await settle()
            turns.give_back(held, order[-1])
        await settle()
        assert order == ["a", "b", "c", "a", "b", "a"]

    run(work())


def test_who_leaves_the_line_holds_nobody_up() -> None:
    async def work() -> None:
        turns, order = Turns([1]), []
        held = await turns.take("x")
        first, second, third = served(turns, order, "a", "a", "b")
        await settle()
        first.cancel()
        turns.give_back(held, "x")  # before the one that left has run again
        await settle()
        assert order == ["b"]
        turns.give_back(held, "b")
        await settle()
        assert order == ["b", "a"]
        assert second.done()
        assert third.done()

    run(work())


def test_an_item_that_comes_too_late_goes_to_the_next() -> None:
    async def work() -> None:
        turns, order = Turns([1]), []
        held = await turns.take("x")
        first, second = served(turns, order, "a", "b")
        await settle()
        turns.give_back(held, "x")  # the first has it now, but has not run yet
        first.cancel()
        await settle()
        assert first.cancelled()
        assert order == ["b"]
        assert second.result() == held

    run(work())


def test_all_who_wait_are_refused() -> None:
    async def work() -> None:
        turns, order = Turns([1]), []
        await turns.take("x")
        waiting = served(turns, order, "a", "a", "b")
        await settle()
        waiting[0].cancel()
        turns.refuse_all(ValueError("over"))
        await settle()
        assert waiting[0].cancelled()
        for task in waiting[1:]:
            with pytest.raises(ValueError, match="over"):
                task.result()

    run(work())


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_or_lent_twice(seed: int) -> None:
    async def work() -> None:
        chance = random.Random(seed)
        turns = Turns([1, 2, 3])
        lent: list[tuple[int, str]] = []

        async def use(key: str) -> None:
            item = await turns.take(key)
            assert item not in [other for other, _ in lent]
            assert not key or key not in [holder for _, holder in lent]
            lent.append((item, key))
            try:
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
            finally:
                lent.remove((item, key))
                turns.give_back(item, key)

        tasks: list[asyncio.Task[None]] = []
        for _ in range(400):
            tasks.append(asyncio.create_task(use(chance.choice(["", "a", "b", "c"]))))
            if chance.random() < 0.3:
                chance.choice(tasks).cancel()
            if chance.random() < 0.5:
                await asyncio.sleep(0)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(outcome is None or isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
        assert not lent
        assert {await turns.take(key) for key in ("a", "b", "c")} == {1, 2, 3}

    run(work())
