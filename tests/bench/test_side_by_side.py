from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
from starlette.responses import JSONResponse

from server.bench.side_by_side import (
    Contender,
    RowResult,
    Suite,
    failure,
    first_text,
    in_turn,
    parse_peer,
    render,
    to_json,
)
from server.bench.stream import RequestRecord
from server.bench.suite import SCALING, STANDARD, Row
from server.bench.target import Target, TargetError
from server.bench.workloads import find_vocabulary
from tests.bench.canned import DONE, Answer, CannedServer, role, text, usage, whole_answer

OURS, PEER = Contender("ours", "http://h"), Contender("peer", "http://p")


def row(**changes: Any) -> Row:
    """One request of eight words in, three out: what `whole_answer` gives."""
    fields: dict[str, Any] = {"name": "text-1", "measure": "tokens/s", "input_len": 8, "output_len": 3}
    return Row(**{**fields, **changes})


def row_of(name: str) -> Row:
    return next(row for row in STANDARD if row.name == name)


def refusing(status: int, since: int = 0) -> Callable[[int], Answer]:
    """Whole answers, and from request number `since` on this status."""
    return lambda number: (
        whole_answer(number) if number < since else JSONResponse({"detail": "too much"}, status_code=status)
    )


@contextmanager
def suite_of(*servers: CannedServer, **peer: Any) -> Iterator[Suite]:
    """The first server is ours, the second, if any, `peer`, with these fields of a contender."""
    with ExitStack() as stack:
        contenders, targets = [], {}
        for name, server in zip(("ours", "peer"), servers, strict=False):
            stack.enter_context(server.running())
            contenders.append(Contender(name, server.url, "canned"))
            targets[name] = stack.enter_context(Target(server.url))
        contenders[1:] = [replace(contender, **peer) for contender in contenders[1:]]
        yield Suite(contenders, targets=targets, vocabulary=find_vocabulary(None, source=""), timeout=5.0, seed=1)


def test_a_peer_is_a_name_a_url_and_options() -> None:
    assert parse_peer("vllm=http://h:1/v1") == Contender("vllm", "http://h:1/v1")
    assert parse_peer("t=https://h,model=a/b=c,text,without=ignore_eos,without=seed") == Contender(
        "t", "https://h", model="a/b=c", is_text_only=True, without=("ignore_eos", "seed")
    )


@pytest.mark.parametrize("text", ["vllm", "=http://h", "vllm=", "vllm=h:1", "v=http://h,txt", "v=http://h,model="])
def test_anything_else_is_no_peer(text: str) -> None:
    with pytest.raises(ValueError, match="a peer"):
        parse_peer(text)


def test_a_text_model_is_not_asked_for_pictures() -> None:
    peer = Contender("v", "http://h", is_text_only=True)
    assert [row.name for row in STANDARD if peer.can(row)] == ["text-1", "text-8", "text-32", "prompt-1024"]
    assert [row.x for row in SCALING if row.curve == "images" and peer.can(row)] == [0]


def test_every_other_round_goes_backwards() -> None:
    assert [in_turn([OURS, PEER], number) for number in range(3)] == [[OURS, PEER], [PEER, OURS], [OURS, PEER]]


def test_a_ratio_above_one_is_in_our_favour_whatever_is_measured() -> None:
    rates = RowResult(row(measure="tokens/s"), {"ours": [30.0, 20.0], "peer": [10.0, 40.0]})
    times = RowResult(row(measure="first token"), {"ours": [10.0, 40.0], "peer": [30.0, 20.0]})
    assert rates.ratios("ours", "peer") == times.ratios("ours", "peer") == [3.0, 0.5]
    assert rates.ratios("ours", "absent") == rates.ratios("absent", "peer") == []


def test_the_table_has_medians_and_the_spread_of_ratios() -> None:
    result = RowResult(row(), {"ours": [20.0, 30.0, 90.0], "peer": [10.0, 10.0, 10.0]}, {"gap, ms": [1.0, 2.0, 3.0]})
    alone = RowResult(row(name="stall", measure="stall", images=2), {"ours": [1234.0]})
    assert render([result, alone], [OURS, PEER]).splitlines() == [
        "| row | what | ours | peer | ours to peer | besides |",
        "| --- | --- | --- | --- | --- | --- |",
        "| text-1 | output tokens/s; 8 in, 3 out, 1 at once | 30 | 10 | **3.00×** (2.00 to 9.00) | gap, ms 2 |",
        "| stall | ms, largest gap; 8 in + 2 × 640×480 split, 3 out, 1 at once | 1234 |  |  |  |",
    ]


def test_what_is_not_compared_and_what_is_doubtful_is_said_below_the_table() -> None:
    result = RowResult(row(), {"ours": [1.0]}, dropped={"peer": "HTTP 500"}, doubts={"ours": ["short", "cached"]})
    table, notes = render([result], [OURS, PEER]).split("\n\n")
    assert table.splitlines()[-1].endswith("| 1 |  |  |  |")
    assert notes.splitlines() == ["! peer, text-1: HTTP 500", "! ours, text-1: short", "! ours, text-1: cached"]


def test_what_is_saved_has_each_round_and_what_the_table_has() -> None:
    result = RowResult(row(), {"ours": [20.0, 30.0, 90.0], "peer": [10.0, 10.0, 10.0]}, {"gap, ms": [1.0, 2.0, 3.0]})
    (saved,) = json.loads(json.dumps(to_json([result], [OURS, PEER, Contender("absent", "http://a")])))
    assert saved["rounds"] == {"ours": [20.0, 30.0, 90.0], "peer": [10.0, 10.0, 10.0]}
    assert saved["medians"] == {"ours": 30.0, "peer": 10.0}
    assert saved["ratios"] == {"peer": [2.0, 3.0, 9.0]}
    assert saved["ratio_medians"] == {"peer": 3.0}
    assert saved["besides"] == {"gap, ms": [1.0, 2.0, 3.0]}
    assert (saved["row"], saved["settings"]["input_len"]) == ("text-1", 8)


def test_all_are_asked_the_same_and_nothing_twice() -> None:
    ours, peer = CannedServer(), CannedServer()
    with suite_of(ours, peer, model="other", without=("ignore_eos",)) as suite:
        for name in ("a", "b"):
            result = suite.measure(row(name=name, num_requests=2, concurrency=2), 2)
            assert [len(values) for values in result.values.values()] == [2, 2]
    assert {body["model"] for body in peer.bodies} == {"other"}
    assert all("ignore_eos" not in body for body in peer.bodies)
    assert all(body["ignore_eos"] for body in ours.bodies)
    said = [json.dumps(body["messages"]) for body in ours.bodies]
    assert len({text[:60] for text in said}) == len(said) == 8  # else one would begin as another that is in the cache
    assert sorted(said) == sorted(json.dumps(body["messages"]) for body in peer.bodies)


def test_the_first_text_counts_not_the_first_event() -> None:
    def late(_: int) -> Answer:
        return [role(), 0.2, text("one"), text(" two"), text(" three", "length"), usage(50, 3) + DONE]

    with suite_of(CannedServer(script=late)) as suite:
        (milliseconds,) = suite.measure(row(measure="first token"), 1).values["ours"]
    assert milliseconds > 190


def test_a_peer_that_fails_is_left_out_of_the_row_and_the_others_go_on() -> None:
    ours, peer = CannedServer(), CannedServer(script=refusing(500, since=1))
    with suite_of(ours, peer) as suite:
        result = suite.measure(row(), 3)
    assert len(result.values["ours"]) == 3
    assert "peer" not in result.values  # its first round is not kept either
    assert result.dropped == {"peer": "HTTP 500: too much"}
    assert len(peer.bodies) == 2


@pytest.mark.parametrize(("status", "curve"), [(500, "prompt"), (400, None)])
def test_a_failure_of_ours_ends_the_row(status: int, curve: str | None) -> None:
    with (
        suite_of(CannedServer(script=refusing(status))) as suite,
        pytest.raises(TargetError, match=f"^ours, text-1: HTTP {status}: too much$"),
    ):
        suite.measure(row(curve=curve), 1)


def test_where_a_curve_leads_beyond_what_we_can_do_it_ends() -> None:
    rounds = 0

    def on_round() -> None:
        nonlocal rounds
        rounds += 1

    ours, peer = CannedServer(script=refusing(400)), CannedServer()
    with suite_of(ours, peer) as suite:
        result = suite.measure(row(curve="prompt", x=8), 2, on_round)
    assert result.dropped == {"ours": "HTTP 400: too much"}
    assert [len(result.values[name]) for name in result.values] == [2]
    assert (len(ours.bodies), rounds) == (1, 2)


@pytest.mark.parametrize(("reason", "kind"), [("HTTP 413: a", "RefusedError"), ("HTTP 429: a", "TargetError")])
def test_a_refusal_is_what_asking_again_does_not_cure(reason: str, kind: str) -> None:
    assert type(failure(reason)).__name__ == kind


def test_an_answer_without_text_counts_to_its_end_and_is_told() -> None:
    def silent(_: int) -> Answer:
        return [role(), 0.2, text("", "length"), usage(5, 3) + DONE]

    with suite_of(CannedServer(script=silent)) as suite:
        result = suite.measure(row(measure="first token"), 1)
        assert suite.measure(row(), 1).doubts == {}
    assert result.values["ours"][0] > 190
    assert result.doubts == {"ours": ["1 answers showed no text: the time of their end was taken"]}


def test_an_answer_without_any_event_has_no_time() -> None:
    with pytest.raises(TargetError, match="no event"):
        first_text(RequestRecord(index=0, due=1.0, start=1.0))


def test_answers_shorter_than_asked_for_are_told() -> None:
    with suite_of(CannedServer()) as suite:
        assert suite.measure(row(), 1).doubts == {}
        assert suite.measure(row(output_len=4), 1).doubts == {"ours": ["output is 3 tokens where 4 were asked for"]}


def test_memory_is_noted_each_round_where_a_server_tells() -> None:
    ours = CannedServer(metrics=lambda: "# HELP\nprocess_resident_memory_bytes 3.145728e+06\n")
    with suite_of(ours, CannedServer()) as suite:
        assert suite.measure(row(), 2).memory == {"ours": [3.0, 3.0]}


def test_memory_is_that_of_the_engine_too() -> None:
    told = (
        'process_resident_memory_bytes 1.048576e+06\nidefics2:engine_resident_memory_bytes{model_name="m"} 2097152.0\n'
    )
    with suite_of(CannedServer(metrics=lambda: told)) as suite:
        assert suite.measure(row(), 1).memory == {"ours": [3.0]}


def test_a_second_turn_goes_on_from_the_first() -> None:
    ours, peer = CannedServer(), CannedServer()
    with suite_of(ours, peer) as suite:
        result = suite.measure(row_of("second-turn"), 1)
    firsts, seconds = ours.bodies[:3], ours.bodies[3:]
    for first, second in zip(firsts, seconds, strict=True):
        assert second["messages"][:1] == first["messages"]
        assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
        assert first["messages"][0]["content"][0]["type"] == "image_url"
    assert len({json.dumps(body["messages"][1:]) for body in seconds}) == 3
    assert set(result.extra) == {"first turn, ms", "second to first"}
    assert peer.bodies == []


def stalling(number: int) -> Answer:
    """Request 0 is the whole picture and 1 and 2 are streams, of which the first waits while pictures are encoded."""
    if number not in (1, 2):
        return [0.1, text("seen", "length"), usage(50, 1) + DONE]
    before = [step for _ in range(30) for step in (text("a"), 0.01)]
    after = [step for _ in range(20) for step in (0.01, text("a"))]
    # The second starts late: what the first feels meanwhile is the second's prompt being computed, no quiet gap.
    start = [text("a"), 0.4] if number == 1 else [0.45]
    return [*start, *before, 0.2 if number == 1 else 0.01, *after, text("b", "length"), usage(50, 51) + DONE]


def test_a_stall_is_compared_with_the_quiet_and_with_a_tile() -> None:
    scrapes = iter(range(99))

    def metrics() -> str:
        count = next(scrapes)
        return f"idefics2:image_encode_seconds_sum {0.05 * count}\nidefics2:tiles_encoded_total {count}\n"

    stall = replace(row_of("stall"), concurrency=2, num_requests=2)
    with suite_of(CannedServer(script=stalling, metrics=metrics)) as suite:
        result = suite.measure(stall, 1)
    (largest,) = result.values["ours"]
    found = {name: values[0] for name, values in result.extra.items()}
    assert largest > 150
    assert found["a tile, ms"] == pytest.approx(50)
    assert found["in tiles"] == pytest.approx(largest / 50)
    assert found["to largest before"] == pytest.approx(largest / found["largest before, ms"])
    assert found["usual gap, ms"] <= found["largest before, ms"] < largest


def test_a_stall_on_a_server_that_tells_nothing_of_tiles() -> None:
    stall = replace(row_of("stall"), concurrency=2, num_requests=1)
    with suite_of(CannedServer(script=stalling)) as suite:
        result = suite.measure(stall, 1)
    assert set(result.extra) == {"usual gap, ms", "largest before, ms", "to largest before"}


def test_streams_too_short_for_a_stall_are_a_failure() -> None:
    with suite_of(CannedServer()) as suite, pytest.raises(TargetError, match="raise --output-len"):
        suite.measure(row_of("stall"), 1)
