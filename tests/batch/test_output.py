from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from server.batch.output import BatchOutput, Claim, LineError, LineResponse, OutputLine, RunStopped
from server.errors import ConfigError
from tests.batch.files import read_output
from tests.serving import ROOT


def answered(custom_id: str, status: int = 200, body: bytes = b'{"a":1}') -> OutputLine:
    return OutputLine(f"batch_req_{custom_id}", custom_id, LineResponse(status, "req", msgspec.Raw(body)), None)


def failed(custom_id: str | None, number: int, code: str = "invalid_method") -> OutputLine:
    return OutputLine(f"batch_req_{number}", custom_id, None, LineError(code, "what", None, number))


def write(path: Path, *lines: OutputLine) -> None:
    with BatchOutput(path) as output:
        for line in lines:
            output.append(line)


def claims(path: Path, *lines: tuple[int, str | None], retry_failed: bool = False) -> list[Claim]:
    with BatchOutput(path, retry_failed=retry_failed) as output:
        return [output.ledger.claim(number, custom_id) for number, custom_id in lines]


def test_lines_are_openais(tmp_path: Path) -> None:
    path = tmp_path / "out"
    write(path, answered("é", body=b'{"text":"\\n"}'), failed(None, 3))
    assert read_output(path) == [
        {
            "id": "batch_req_é",
            "custom_id": "é",
            "response": {"status_code": 200, "request_id": "req", "body": {"text": "\n"}},
            "error": None,
        },
        {
            "id": "batch_req_3",
            "custom_id": None,
            "response": None,
            "error": {"code": "invalid_method", "message": "what", "param": None, "line": 3},
        },
    ]


def test_a_line_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    with BatchOutput(tmp_path / "out") as output:
        output.append(answered("a"))
        assert len(read_output(tmp_path / "out")) == 1


def test_the_next_run_knows_what_became_of_each_line(tmp_path: Path) -> None:
    path = tmp_path / "out"
    write(
        path,
        answered("a"),
        answered("b", 400),
        failed("c", 3),
        failed(None, 4, "invalid_json_line"),
        failed("d", 5, "duplicate_custom_id"),
    )
    lines: list[tuple[int, str | None]] = [(1, "a"), (2, "b"), (3, "c"), (4, None), (5, "d"), (6, None), (7, "a")]
    assert claims(path, *lines) == [
        Claim.ANSWERED,
        Claim.FAILED,
        Claim.FAILED,
        Claim.FAILED,
        Claim.NEW,  # only a second "d" was told off; the first has no answer
        Claim.NEW,
        Claim.DUPLICATE,
    ]


def test_a_duplicate_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "out"
    assert claims(path, (1, "a"), (2, "a"), (3, "a")) == [Claim.NEW, Claim.DUPLICATE, Claim.DUPLICATE]
    write(path, answered("a"), failed("a", 2, "duplicate_custom_id"))
    assert claims(path, (1, "a"), (2, "a"), (3, "a")) == [Claim.ANSWERED, Claim.FAILED, Claim.DUPLICATE]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_an_answer_outweighs_a_failure_of_the_same_id(tmp_path: Path, order: tuple[int, int]) -> None:
    lines = [failed("a", 1), answered("a")]
    write(tmp_path / "out", *(lines[index] for index in order))
    assert claims(tmp_path / "out", (1, "a")) == [Claim.ANSWERED]
    assert claims(tmp_path / "out", (1, "a"), retry_failed=True) == [Claim.ANSWERED]
    assert [record["error"] for record in read_output(tmp_path / "out")] == [None]


def test_failures_are_taken_out_to_be_run_again(tmp_path: Path) -> None:
    path, link = tmp_path / "out", tmp_path / "link"
    write(path, answered("a"), answered("b", 500), failed(None, 3), failed("c", 4), answered("d"))
    path.chmod(0o640)
    link.symlink_to(path)
    lines = ((1, "a"), (2, "b"), (3, None), (4, "c"), (5, "d"))
    with BatchOutput(link, retry_failed=True) as output:
        new = Claim.NEW
        assert [output.ledger.claim(*line) for line in lines] == [Claim.ANSWERED, new, new, new, Claim.ANSWERED]
        output.append(answered("b"))
        with pytest.raises(ConfigError, match="another run"):
            BatchOutput(path)
    assert [record["custom_id"] for record in read_output(path)] == ["a", "d", "b"]
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "out"]


def test_without_failures_the_file_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "out"
    write(path, answered("a"))
    before = (path.stat().st_ino, path.read_bytes())
    assert claims(path, (1, "a"), retry_failed=True) == [Claim.ANSWERED]
    assert (path.stat().st_ino, path.read_bytes()) == before


def test_a_kill_at_any_byte_costs_one_line_at_most(tmp_path: Path) -> None:
    path = tmp_path / "out"
    write(path, answered("a"), failed(None, 2), answered("ü", body=b'{"text":"\xe2\x82\xac"}'))
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == 10]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        # A line that lacks its line break only is whole.
        kept = sum(end - 1 <= size for end in ends)
        found = claims(path, (1, "a"), (2, None), (3, "ü"))
        assert [claim is not Claim.NEW for claim in found] == [kept > 0, kept > 1, kept > 2], size
        write(path, answered("next"))
        assert [record["custom_id"] for record in read_output(path)] == [*["a", None, "ü"][:kept], "next"], size


def test_blank_lines_and_other_programs_lines_are_no_hindrance(tmp_path: Path) -> None:
    path = tmp_path / "out"
    theirs = {
        "id": "vllm-1",
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "x", "body": {}},
        "error": None,
    }
    error = {"id": "x", "custom_id": "b", "response": None, "error": {"code": 500, "message": "m"}}
    path.write_text(f"{json.dumps(theirs)}\n\n{json.dumps(error)}\n", encoding="utf-8")
    assert claims(path, (1, "a"), (2, "b")) == [Claim.ANSWERED, Claim.FAILED]


@pytest.mark.parametrize(
    "content",
    [
        b"my notes",
        b"my notes\n",
        b"{}\n",
        b"[]\n",
        b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}\n',
        b'{"custom_id": "a", "response": null}\n',
        b'{"id": "something else',
        b"\x00\x00\x00",
        b"\xff\n",
        b'{"id":"batch_req_b","custom_id":"b","resp\n',
    ],
)
@pytest.mark.parametrize("behind", [False, True])
def test_somebody_elses_file_is_refused_unchanged(tmp_path: Path, content: bytes, behind: bool) -> None:
    path = tmp_path / "out"
    if behind:
        write(path, answered("a"))
    with path.open("ab") as file:
        file.write(content)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="not a batch's output"):
        BatchOutput(path, retry_failed=True)
    assert path.read_bytes() == before


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(ConfigError, match="not a regular file"):
            BatchOutput(path)
    with pytest.raises(ConfigError, match="--output: cannot write"):
        BatchOutput(tmp_path / "missing" / "out")


def test_two_runs_never_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out"
    code = "import pathlib, sys, server.batch.output as o; o.BatchOutput(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(path)]
    with BatchOutput(path):
        other = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60)
        assert b"another run is writing" in other.stderr
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == 0


def test_a_full_disk_ends_the_run_and_leaves_a_torn_line_that_heals(tmp_path: Path) -> None:
    path = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with BatchOutput(path) as output:
        output.append(answered("a"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(path) + 60, hard))
        try:
            with pytest.raises(RunStopped, match="cannot write"):
                output.append(answered("b"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        with pytest.raises(RunStopped, match="could not be written"):
            output.append(answered("c"))
    assert not path.read_bytes().endswith(b"\n")
    assert claims(path, (1, "a"), (2, "b")) == [Claim.ANSWERED, Claim.NEW]
    assert len(read_output(path)) == 1
