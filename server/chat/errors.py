"""What goes wrong in a chat and is told to whoever types."""

from __future__ import annotations


class ChatError(Exception):
    """The message says what is wrong, and what to do where that is known. It may hold text of the server's."""
