"""The chat itself, without a terminal: what is attached, what is asked, what of it is kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing

from server.chat.conversation import Content, Conversation, Turn, question_of
from server.chat.endpoint import Endpoint
from server.chat.errors import ChatError
from server.chat.events import Answer, without_surrogates
from server.chat.images import Picture
from server.chat.settings import Settings

OnText = Callable[[str], None]


class Session:
    """One conversation with one server. `pictures` go with the next question."""

    def __init__(self, endpoint: Endpoint, *, model: str, settings: Settings, system: str = "") -> None:
        self.endpoint = endpoint
        self.model = model
        self.settings = settings
        self.conversation = Conversation(without_surrogates(system))
        self.pictures: list[Picture] = []
        self._failed: str | None = None  # the last question, when it has no answer

    def ask(self, text: str, on_text: OnText) -> Answer:
        """Ask with what is attached; the text of the answer goes to `on_text` as it arrives.

        KeyboardInterrupt stops the answer, of which is kept what was said. A question without an answer is not kept,
        and its pictures stay attached. Raises ChatError.
        """
        self._failed = text
        question = question_of(text, self.pictures)
        answer = self._answer(self.conversation.turns, question, on_text)
        if _is_kept(answer):
            self.conversation.turns.append(Turn(question, answer.text))
            self.pictures = []
            self._failed = None
        return answer

    def retry(self, on_text: OnText) -> Answer:
        """Ask the last question again. The answer that it has is given up when there is another. Raises ChatError."""
        if self._failed is not None:
            return self.ask(self._failed, on_text)
        if not self.conversation.turns:
            raise ChatError("there is no question to ask again")
        *before, last = self.conversation.turns
        answer = self._answer(before, last.question, on_text)
        if _is_kept(answer):
            self.conversation.turns[-1] = Turn(last.question, answer.text)
        return answer

    def undo(self) -> Turn:
        """Take back the last question and its answer. Raises ChatError where there is none."""
        if not self.conversation.turns:
            raise ChatError("there is nothing to take back")
        self._failed = None
        return self.conversation.turns.pop()

    def clear(self) -> None:
        """Forget all but the system message."""
        self.replace(Conversation(self.conversation.system))

    def replace(self, conversation: Conversation) -> None:
        """Go on in another conversation, with nothing attached."""
        self.conversation = conversation
        self.pictures = []
        self._failed = None

    def _answer(self, turns: list[Turn], question: Content, on_text: OnText) -> Answer:
        before = Conversation(self.conversation.system, turns).messages()
        messages = [*before, {"role": "user", "content": question}]
        body = {"model": self.model, "messages": messages, **self.settings.body()}
        answer = Answer(started=time.perf_counter())
        try:
            with closing(self.endpoint.ask(body, answer)) as pieces:
                for piece in pieces:
                    on_text(piece)
        except KeyboardInterrupt:
            answer.is_stopped = True
        return answer


def _is_kept(answer: Answer) -> bool:
    return bool(answer.text) or not answer.is_stopped
