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
from server.types import EngineRequest

if TYPE_CHECKING:
    from server.grammar.compiler import GrammarCompiler
    from server.grammar.matcher import Matcher

logger = logging.getLogger(__name__)


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
        except Exception:
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
