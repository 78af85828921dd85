"""The API keys of a server: whose they are, and what each may have. The keys themselves are forgotten once read."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path

import msgspec

from server.config import ServerConfig
from server.errors import ConfigError
from server.types import KeyLimits

logger = logging.getLogger(__name__)

NO_LIMITS = KeyLimits()

# Keys shorter than this can be found by trying.
SAFE_KEY_CHARACTERS = 16

_KEY = re.compile(r"[!-~]{1,512}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
# What a line of the file may say behind its key → (the field of KeyLimits, its largest value).
_OPTIONS = {"max_reqs": 1 << 20, "tokens_per_minute": 1 << 40}


class _Entry(msgspec.Struct, frozen=True):
    """A key as it was given. `where` is for messages, which never repeat the key."""

    name: str
    key: str
    limits: KeyLimits
    where: str


class KeyRing:
    """Finds the name of a key. Holds digests only, made with a secret of this process.

    A key is looked up by its digest, of which nobody outside can choose a single bit, so that the time this takes says
    nothing about any key. Several keys may have one name, so that a new key can be used before the old one is gone;
    they share what the name may have.
    """

    def __init__(self, entries: Iterable[_Entry] = (), *, defaults: KeyLimits = NO_LIMITS) -> None:
        """`defaults` are for names without limits of their own. Raises ConfigError for entries that contradict."""
        self._secret = secrets.token_bytes(32)
        self._names: dict[bytes, str] = {}
        own: dict[str, KeyLimits] = {}
        for entry in entries:
            digest = self._digest(entry.key.encode())
            if digest in self._names:
                raise ConfigError(f"{entry.where}: this key has been given before")
            self._names[digest] = entry.name
            own[entry.name] = _joined(own.get(entry.name), entry)
        self._limits = {name: _or_defaults(limits, defaults) for name, limits in own.items()}

    def __len__(self) -> int:
        """How many keys there are. With none, none is asked for."""
        return len(self._names)

    def find(self, key: bytes) -> str | None:
        """The name of whoever has this key; None for a key that is not known."""
        return self._names.get(self._digest(key))

    def limits(self, name: str) -> KeyLimits:
        """What all keys of that name together may have; no limits for a name without a key."""
        return self._limits.get(name, NO_LIMITS)

    def _digest(self, key: bytes) -> bytes:
        return hmac.digest(self._secret, key, "sha256")


NO_KEYS = KeyRing()


def load_keys(config: ServerConfig) -> KeyRing:
    """The keys that a configuration names, in itself and in its file.

    Logs a warning for keys that others could find out. Raises ConfigError, in one line without any key, for whatever is
    not a key, a key that is given twice, and a file without one.
    """
    entries = [_read_key(text, f"api_key: item {number}") for number, text in enumerate(config.api_key, start=1)]
    if config.api_key_file is not None:
        entries += _read_file(config.api_key_file)
    for entry in entries:
        if len(entry.key) < SAFE_KEY_CHARACTERS:
            logger.warning("%s: a key of fewer than %d characters can be guessed", entry.where, SAFE_KEY_CHARACTERS)
    defaults = KeyLimits(max_reqs=config.max_reqs_per_key, tokens_per_minute=config.max_tokens_per_minute_per_key)
    if not entries:
        if config.host not in _LOOPBACK:
            logger.warning("no API key is set: whoever reaches %s may ask", config.host)
        if defaults != NO_LIMITS:
            logger.warning("max_reqs_per_key and max_tokens_per_minute_per_key hold for nobody: no API key is set")
    return KeyRing(entries, defaults=defaults)


def _read_key(text: str, where: str, limits: KeyLimits = NO_LIMITS) -> _Entry:
    name, equals, key = text.partition("=")
    if not equals:
        name, key = f"key-{hashlib.sha256(text.encode()).hexdigest()[:8]}", text
    # What looks like padding may be what is left of a key whose variable was empty.
    if not _KEY.fullmatch(key) or not key.strip("="):
        raise ConfigError(
            f"{where}: a key must be 1 to 512 printable ASCII characters without spaces; one that ends in '=' needs a "
            "name before it, as 'name=key'"
        )
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: what stands before the first '=' names the key: at most 64 letters, digits, '.', '_' and '-'"
        )
    return _Entry(name, key, limits, where)


def _read_file(file: Path) -> list[_Entry]:
    try:
        data = file.read_bytes()
        mode = file.stat().st_mode
    except OSError as error:
        raise ConfigError(f"api_key_file: cannot read {file}: {error.strerror}") from None
    if mode & stat.S_IROTH:
        logger.warning("api_key_file: everybody on this machine may read %s", file)
    entries = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        words = _words(line, f"{file}:{number}")
        if words:
            entries.append(_read_key(words[0], f"{file}:{number}", _read_limits(words[1:], f"{file}:{number}")))
    if not entries:
        # Without a key the server would be open to all.
        raise ConfigError(f"api_key_file: {file} holds no key")
    return entries


def _words(line: bytes, where: str) -> list[str]:
    """The words of a line up to its comment."""
    try:
        words = line.decode().split()
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: not UTF-8") from None
    comments = [index for index, word in enumerate(words) if word.startswith("#")]
    return words[: comments[0]] if comments else words


def _read_limits(words: list[str], where: str) -> KeyLimits:
    found: dict[str, int] = {}
    for word in words:
        name, _, text = word.partition("=")
        largest = _OPTIONS.get(name, 0)
        # Bounded before it is read: numbers of many digits take long.
        value = int(text) if text.isascii() and text.isdecimal() and len(text) <= 15 else 0
        if name in found or not 1 <= value <= largest:
            options = ", ".join(f"{option}=1 to {most}" for option, most in _OPTIONS.items())
            raise ConfigError(f"{where}: behind the key there may be, once each, {options}")
        found[name] = value
    return KeyLimits(**found)


def _joined(limits: KeyLimits | None, entry: _Entry) -> KeyLimits:
    """What all entries of one name say of it together."""
    if limits is None:
        return entry.limits
    for option in _OPTIONS:
        before, now = getattr(limits, option), getattr(entry.limits, option)
        if before is not None and now is not None and before != now:
            raise ConfigError(f"{entry.where}: {option} is {now}, and {before} for another key of the same name")
    return _or_defaults(limits, entry.limits)


def _or_defaults(limits: KeyLimits, defaults: KeyLimits) -> KeyLimits:
    return KeyLimits(
        max_reqs=defaults.max_reqs if limits.max_reqs is None else limits.max_reqs,
        tokens_per_minute=(
            defaults.tokens_per_minute if limits.tokens_per_minute is None else limits.tokens_per_minute
        ),
    )
