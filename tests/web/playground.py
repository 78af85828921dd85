"""The page as a person meets it: what can be done there and what is seen. Knows its labels, and none of its scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from playwright.sync_api import BrowserContext, ConsoleMessage, Locator, expect

# Computing on a busy machine takes what it takes.
PATIENCE_MS = 60_000
expect.set_options(timeout=20_000)

_WATCH_POLICY = """
globalThis.violations = [];
addEventListener("securitypolicyviolation", (event) =>
  violations.push(`${event.violatedDirective} ${event.blockedURI} ${event.sourceFile}`));
"""


class Playground:
    """One window with the page at `address`. `expected_errors` are parts of what its console may complain of."""

    def __init__(self, context: BrowserContext, address: str) -> None:
        self.context = context
        self.expected_errors: tuple[str, ...] = ()
        self._console: list[str] = []
        self.requested: list[str] = []
        context.add_init_script(_WATCH_POLICY)
        self.page = context.new_page()
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self._console.append(f"uncaught: {error}"))
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.goto(address)
        self.text = self.page.get_by_label("Question", exact=True)
        self.answers = self.page.get_by_role("article", name="Answer")
        self.questions = self.page.get_by_role("article", name="You")
        self.attachments = self.page.get_by_role("list", name="Pictures to send").get_by_role("listitem")

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self._console.append(message.text)

    def problems(self) -> list[str]:
        """Errors on the console, uncaught exceptions, and what the content security policy had to stop."""
        self._console += self.page.evaluate("globalThis.violations ?? []")
        return [text for text in self._console if not any(known in text for known in self.expected_errors)]

    # -- doing ------------------------------------------------------------------------------------------------------

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def set(self, **settings: Any) -> None:
        """Settings by their labels, with _ for a space."""
        if self.button("Settings").get_attribute("aria-expanded") == "false":
            self.button("Settings").click()
        for name, value in settings.items():
            self.page.get_by_label(name.replace("_", " "), exact=True).fill(str(value))

    def pick(self, *files: Path) -> None:
        already = self.attachments.count()
        with self.page.expect_file_chooser() as chooser:
            self.button("Picture").click()
        chooser.value.set_files(list(files))
        expect(self.attachments).to_have_count(already + len(files))

    def drop(self, *files: Path) -> None:
        """Files dragged from outside the browser, as the browser itself gets them."""
        session = self.context.new_cdp_session(self.page)
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            session.send("Input.dispatchDragEvent", {"type": kind, "x": 400, "y": 300, "data": data})

    def ask(self, question: str, *, wait: bool = True) -> Locator:
        """The answer, which is complete if it was waited for."""
        already = self.answers.count()
        self.text.fill(question)
        self.text.press("Enter")
        expect(self.answers).to_have_count(already + 1)
        if wait:
            self.wait()
        return self.answers.last

    def ask_edited(self, question: str) -> Locator:
        """The answer to an earlier question that is being changed."""
        self.text.fill(question)
        self.text.press("Enter")
        expect(self.page.get_by_text("An earlier question")).to_be_hidden()
        self.wait()
        return self.answers.last

    def wait(self) -> None:
        """Until nothing is being answered."""
        expect(self.button("Stop")).to_have_count(0, timeout=PATIENCE_MS)
        expect(self.button("Send")).to_be_visible()

    # -- seeing -----------------------------------------------------------------------------------------------------

    def said(self, answer: Locator) -> str:
        return answer.locator(".text").text_content() or ""

    def figures(self, answer: Locator) -> str:
        return answer.locator(".figures").inner_text()

    def snippet(self, language: str) -> str:
        """What the dialog shows that is open."""
        self.page.get_by_role("tab", name=language).click()
        return self.page.get_by_role("tabpanel").text_content() or ""
