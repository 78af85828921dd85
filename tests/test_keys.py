"""Keys from settings and files: whose they are, what each may have, and mistakes that name their line, never a key."""

from __future__ import annotations

import hashlib
import logging
import pickle
from pathlib import Path

import pytest

from server.config import ServerConfig, load_config
from server.errors import ConfigError
from server.keys import NO_KEYS, KeyRing, load_keys
from server.types import KeyLimits

ALICE, BOB, CAROL = "sk-alice-0123456789", "sk-bob-0123456789ab", "sk-carol-0123456789"


def ring(*keys: str, **settings: object) -> KeyRing:
    return load_keys(ServerConfig(api_key=list(keys), **settings))  # type: ignore[arg-type]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.txt"


def from_file(file: Path, text: str | bytes, **settings: object) -> KeyRing:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    file.chmod(0o600)
    return ring(api_key_file=file, **settings)


# -- whose a key is ---------------------------------------------------------------------------------------------------


def test_names_are_given_or_made_of_the_digest() -> None:
    keys = ring(f"alice={ALICE}", BOB)
    assert len(keys) == 2
    assert keys.find(ALICE.encode()) == "alice"
    assert keys.find(BOB.encode()) == f"key-{hashlib.sha256(BOB.encode()).hexdigest()[:8]}"


@pytest.mark.parametrize(
    "wrong",
    [b"", b"x", b"alice", ALICE[:-1].encode(), ALICE.encode() + b"x", b" " + ALICE.encode(), ALICE.upper().encode(),
     f"alice={ALICE}".encode(), b"\xff\x00", b"x" * 100_000],
)  # fmt: skip
def test_any_other_bytes_are_nobody(wrong: bytes) -> None:
    assert ring(f"alice={ALICE}").find(wrong) is None


def test_what_stands_behind_the_first_equals_sign_is_the_key() -> None:
    keys = ring("alice=QUJDREVGR0hJSktM==", "bob=a=b=c")
    assert keys.find(b"QUJDREVGR0hJSktM==") == "alice"
    assert keys.find(b"a=b=c") == "bob"


@pytest.mark.parametrize(
    "text", ["", "alice=", "=", "==", "QUJDREVGR0hJSktM==", "two words", "tab\tbed", "ключ", "a\nb"]
)
def test_what_is_not_a_key_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^api_key: item 2: a key must be") as caught:
        ring(f"alice={ALICE}", text)
    assert not text.strip(" =\n") or text not in str(caught.value)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "-a", "ä", "a" * 65, 'a"b'])
def test_a_name_that_is_none_is_refused_without_repeating_it(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^api_key: item 1: what stands before the first '='") as caught:
        ring(f"{name}={ALICE}")
    assert ALICE not in str(caught.value)


def test_one_name_may_have_several_keys_so_that_they_can_be_exchanged() -> None:
    keys = ring(f"alice={ALICE}", f"alice={BOB}", max_reqs_per_key=3)
    assert keys.find(ALICE.encode()) == keys.find(BOB.encode()) == "alice"
    assert keys.limits("alice") == KeyLimits(max_reqs=3)


@pytest.mark.parametrize("again", [f"alice={ALICE}", f"bob={ALICE}", ALICE])
def test_one_key_may_not_be_given_twice(again: str) -> None:
    with pytest.raises(ConfigError, match=r"^api_key: item 2: this key has been given before$"):
        ring(f"alice={ALICE}", again)


def test_only_digests_with_a_secret_are_kept() -> None:
    everything = pickle.dumps(ring(f"alice={ALICE}"))
    assert b"alice" in everything
    assert ALICE.encode() not in everything
    # Without the secret, a dump of memory would be enough to try keys against.
    assert hashlib.sha256(ALICE.encode()).digest() not in everything


def test_without_keys_nobody_has_limits(caplog: pytest.LogCaptureFixture) -> None:
    assert not NO_KEYS
    assert not ring()
    assert not caplog.records
    assert ring(max_reqs_per_key=1).limits("") == KeyLimits()
    assert "hold for nobody" in caplog.text


# -- the file ---------------------------------------------------------------------------------------------------------


def test_a_file_has_names_limits_and_comments(file: Path) -> None:
    text = f"""
# who asks
{ALICE}
bob={BOB} max_reqs=8 tokens_per_minute=10000   # ours

\tcarol={CAROL}\ttokens_per_minute=5\r
"""
    keys = from_file(file, text, max_reqs_per_key=2, max_tokens_per_minute_per_key=700)
    alice = keys.find(ALICE.encode())
    assert alice is not None
    assert alice.startswith("key-")
    assert keys.limits(alice) == KeyLimits(max_reqs=2, tokens_per_minute=700)
    assert keys.limits("bob") == KeyLimits(max_reqs=8, tokens_per_minute=10_000)
    assert keys.limits("carol") == KeyLimits(max_reqs=2, tokens_per_minute=5)
    assert keys.limits("nobody") == KeyLimits()


def test_a_file_and_settings_are_one_ring(file: Path) -> None:
    file.write_text(f"bob={BOB}")
    assert len(ring(f"alice={ALICE}", api_key_file=file)) == 2
    with pytest.raises(ConfigError, match=rf"^{file}:1: this key has been given before$"):
        ring(f"alice={BOB}", api_key_file=file)


def test_a_byte_order_mark_is_no_part_of_a_key(file: Path) -> None:
    assert from_file(file, b"\xef\xbb\xbf" + ALICE.encode()).find(ALICE.encode()) is not None


def test_limits_of_one_name_must_not_contradict(file: Path) -> None:
    lines = f"alice={ALICE} max_reqs=2\nalice={BOB} tokens_per_minute=9\nalice={CAROL} max_reqs="
    assert from_file(file, f"{lines}2").limits("alice") == KeyLimits(max_reqs=2, tokens_per_minute=9)
    with pytest.raises(ConfigError, match=rf"^{file}:3: max_reqs is 3, and 2 for another key of the same name$"):
        from_file(file, f"{lines}3")


@pytest.mark.parametrize(
    "line",
    [
        *(f"{ALICE} {CAROL}", f"{ALICE} max_reqs", f"{ALICE} max_reqs=", f"{ALICE} max_reqs=0", f"{ALICE} max_reqs=-1"),
        *(
            f"{ALICE} max_reqs=1.5",
            f"{ALICE} max_reqs=٣",
            f"{ALICE} max_reqs={10**6 * 2}",
            f"{ALICE} max_reqs={'9' * 9999}",
        ),
        *(f"{ALICE} max_reqs=1 max_reqs=1", f"{ALICE} requests=1", f"{ALICE} tokens_per_minute={1 << 41}"),
        *("alice=", "a/b=" + ALICE, "ключ", "= max_reqs=1"),
    ],
)
def test_whatever_else_a_line_says_is_refused_with_its_number_alone(file: Path, line: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{file}:2: ") as caught:
        from_file(file, f"bob={BOB}\n{line}\n")
    message = str(caught.value)
    assert "\n" not in message
    assert not any(key in message for key in (ALICE, BOB, CAROL))


@pytest.mark.parametrize("text", ["", "\n\n", f"# {ALICE}\n"])
def test_a_file_without_a_key_does_not_leave_the_server_open(file: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="holds no key"):
        from_file(file, text)


def test_files_that_cannot_be_read(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"^api_key_file: cannot read .*: No such file or directory$"):
        ring(api_key_file=file)
    with pytest.raises(ConfigError, match=r"Is a directory$"):
        ring(api_key_file=file.parent)
    with pytest.raises(ConfigError, match=rf"^{file}:2: not UTF-8$"):
        from_file(file, ALICE.encode() + b"\n\xff\xfe\n")


# -- what is warned of ------------------------------------------------------------------------------------------------


def test_keys_that_others_could_find_out(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    from_file(file, f"alice={ALICE}", host="0.0.0.0")
    assert not caplog.records
    file.write_text("alice=sk-test")
    file.chmod(0o644)
    ring(api_key_file=file)
    assert [record.getMessage() for record in caplog.records] == [
        f"api_key_file: everybody on this machine may read {file}",
        f"{file}:1: a key of fewer than 16 characters can be guessed",
    ]


def test_a_server_that_is_open_to_others(caplog: pytest.LogCaptureFixture) -> None:
    ring(host="0.0.0.0")
    assert caplog.messages == ["no API key is set: whoever reaches 0.0.0.0 may ask"]


# -- the settings that hold them --------------------------------------------------------------------------------------


def test_a_configuration_is_shown_without_its_keys() -> None:
    config = load_config(environ={"IDEFICS2_API_KEY": f"alice={ALICE},{BOB}"}, flags={"api_key_file": "keys.txt"})
    assert config.api_key == [f"alice={ALICE}", BOB]
    assert config.shown()["api_key"] == "***"
    assert config.shown()["api_key_file"] == "keys.txt"
    assert set(config.shown()) == set(ServerConfig.model_fields)
    for text in (repr(config), str(config), str(config.shown())):
        assert ALICE not in text
        assert BOB not in text
    assert ServerConfig().shown()["api_key"] == []


@pytest.mark.parametrize(
    "text",
    [
        *(f"api_key: {ALICE}", f"api_key: {{a: {ALICE}}}", f"api_key: [{ALICE}, {{}}]"),
        *(f"api_key: ['{ALICE}", f"api_key:\n- '{ALICE}\n- [", f"api_key: *{ALICE}"),
    ],
)
def test_a_file_of_settings_that_is_wrong_is_not_repeated(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file=file)
    assert ALICE not in str(caught.value)
    assert "\n" not in str(caught.value)
