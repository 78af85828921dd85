"""A process that tries grammars: `python -m server.grammar.check_worker`.

Reads a vocabulary and then grammars from stdin, and writes for each whether it may be compiled elsewhere, until stdin
closes. A grammar that takes too long or crashes the library ends this process, and no other.

A frame is four bytes of length (big-endian) and a msgpack message.
    in:  frame(VocabularySpec), then a frame(GrammarSpec) each time
    out: frame(Reply) after each; the first says "ready"
"""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import threading
import time
from typing import BinaryIO

import msgspec
import numpy as np

from server import sandbox
from server.errors import ClientError
from server.grammar.compiler import GrammarCompiler
from server.grammar.sources import KINDS
from server.grammar.vocabulary import VocabularySpec, expand_bitmask
from server.types import GrammarSpec

# Less than a thread elsewhere has, so that what does not overflow it here does not overflow it there.
_STACK_BYTES = 4 << 20
_MEMORY_BYTES = 1 << 30
# Of CPU, so that it does not matter how busy the machine is. The first ends the process.
CHECK_SECONDS = 1.0
_STEP_SECONDS = 0.02  # real schemas: 0.003 at most
_TRIALS = 2
_TRIAL_TOKENS = 64


class Reply(msgspec.Struct, frozen=True):
    """Why a grammar is refused, in words for the client; None if it is not."""

    refusal: str | None = None


def frame(message: msgspec.Struct) -> bytes:
    data = msgspec.msgpack.encode(message)
    return len(data).to_bytes(4, "big") + data


def main() -> None:
    """Serve until stdin closes."""
    replies = sandbox.enter()
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=_serve, args=(sys.stdin.buffer, replies))
    thread.start()
    thread.join()


def _serve(requests: BinaryIO, replies: BinaryIO) -> None:
    with contextlib.suppress(BrokenPipeError, EOFError):  # the parent is gone
        vocabulary = msgspec.msgpack.decode(_read(requests), type=VocabularySpec)
        compiler = GrammarCompiler(vocabulary)
        sandbox.limit_memory(_MEMORY_BYTES)
        _send(replies, Reply())
        while True:
            spec = msgspec.msgpack.decode(_read(requests), type=GrammarSpec)
            signal.setitimer(signal.ITIMER_PROF, CHECK_SECONDS)  # nothing handles its signal, which ends the process
            _send(replies, Reply(_try(compiler, spec, vocabulary)))


def _try(compiler: GrammarCompiler, spec: GrammarSpec, vocabulary: VocabularySpec) -> str | None:
    try:
        if _is_slow(compiler, spec, vocabulary):
            return f"{KINDS[spec.kind]} is not supported: it is too large or too complex"
    except ClientError as error:
        return error.message
    return None


def _is_slow(compiler: GrammarCompiler, spec: GrammarSpec, vocabulary: VocabularySpec) -> bool:
    """Whether one of some first tokens, drawn at random, takes too long. Raises ClientError as a matcher does."""
    chance = random.Random(0)
    for _ in range(_TRIALS):
        matcher = compiler.compile(spec, leading_space=False)
        for _ in range(_TRIAL_TOKENS):
            started = time.thread_time()
            mask = matcher.bitmask()
            seconds = time.thread_time() - started
            allowed = expand_bitmask(mask, vocabulary.vocab_size)
            allowed[list(vocabulary.eos_token_ids)] = False
            if not allowed.any():
                break
            token_id = int(chance.choice(np.flatnonzero(allowed)))
            started = time.thread_time()
            matcher.advance(token_id)
            if max(seconds, time.thread_time() - started) > _STEP_SECONDS:
                return True
    return False


def _read(stream: BinaryIO) -> bytes:
    """The next message. Raises EOFError at the end of the stream, which may come in mid-sentence."""
    header = stream.read(4)
    length = int.from_bytes(header, "big")
    data = stream.read(length)
    if len(header) < 4 or len(data) < length:
        raise EOFError
    return data


def _send(stream: BinaryIO, reply: Reply) -> None:
    stream.write(frame(reply))
    stream.flush()


if __name__ == "__main__":
    main()
