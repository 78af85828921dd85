"""Compiles the grammars of requests beside the engine's steps, and keeps each answer's place in its own.

Knows threads and the three verbs of `grammar/`; knows nothing of tensors.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from server.errors import ClientError
from server.runner.input_batch import RequestState
from server.types import EngineRequest

if TYPE_CHECKING:
    from server.grammar.compiler import GrammarCompiler
    from server.grammar.matcher import Matcher

logger = logging.getLogger(__name__)

LOST = "the engine lost its place in this request's grammar"


class GrammarBank:
    """Matchers by answer id, from `prepare` until `drop`."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._lock = threading.Lock()
        self._matchers: dict[str, Matcher | None] = {}  # None: wanted, and still compiling

    def prepare(self, request: EngineRequest, done: Callable[[str | None], None]) -> None:
        """Compile for all answers of a request, then call `done` with None or with a message for the client."""
        with self._lock:
            self._matchers |= dict.fromkeys(request.choice_ids)
        self._threads.submit(self._compile, request, done)

    def _compile(self, request: EngineRequest, done: Callable[[str | None], None]) -> None:
        failure = None
        try:
            self._fill(request)
        except ClientError as error:
            failure = error.message  # the API compiled it too, so this is a limit that only the clock tells
        except BaseException:  # as of a panic in the library; whoever is not told of an end waits for ever
            logger.exception("a grammar failed to compile")
            failure = "the engine failed while compiling this request's grammar"
        done(failure)

    def _fill(self, request: EngineRequest) -> None:
        spec = request.sampling.grammar
        if spec is None:
            raise ValueError(f"request {request.request_id} has no grammar")
        with self._lock:
            if not any(choice_id in self._matchers for choice_id in request.choice_ids):
                return  # its client left before its turn came
        matcher = self._compiler.compile(spec, leading_space=not request.continues_text)
        with self._lock:
            for choice_id in request.choice_ids:
                if choice_id in self._matchers:
                    self._matchers[choice_id] = matcher.fork()

    def get(self, answer_id: str) -> Matcher | None:
        """An answer's matcher, which is its own; None if it has no grammar."""
        with self._lock:
            return self._matchers.get(answer_id)

    def drop(self, answer_ids: Iterable[str]) -> None:
        """Forget answers that have ended, also those that are still being compiled."""
        with self._lock:
            for answer_id in answer_ids:
                self._matchers.pop(answer_id, None)


def compute_bitmasks(states: Iterable[RequestState]) -> dict[str, str]:
    """Ask each answer's grammar what may follow, into its `bitmask`. Returns failures by request id.

    May be asked again without an `advance` between. Raises MemoryError.
    """
    failed = {}
    for state in states:
        if state.matcher is not None:
            try:
                state.bitmask = state.matcher.bitmask()
            except (MemoryError, KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:
                state.bitmask = None
                failed[state.source.request_id] = _failure(state, error)
    return failed


def advance(states: Iterable[RequestState], sampled: dict[str, int], failed: dict[str, str]) -> frozenset[str]:
    """Take sampled tokens into the answers' grammars. Returns the answers that are complete by that.

    One whose grammar cannot go on moves from `sampled` to `failed`; none keeps the others from going on.
    """
    complete = set()
    for state in states:
        request_id = state.source.request_id
        if state.matcher is None or request_id not in sampled:
            continue
        try:
            state.matcher.advance(sampled[request_id])
            is_finished = state.matcher.is_finished
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            del sampled[request_id]
            failed[request_id] = _failure(state, error)
            continue
        if is_finished:
            complete.add(request_id)
    return frozenset(complete)


def _failure(state: RequestState, error: BaseException) -> str:
    """What is told of a grammar that cannot go on: its own limits, or nothing but that it is so.

    A panic in the library's native code comes as a BaseException of its own kind.
    """
    message = error.message if isinstance(error, ClientError) else LOST
    logger.warning("request %s: %s (%s)", state.source.request_id, message, type(error).__name__)
    return message
