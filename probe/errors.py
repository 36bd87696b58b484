"""The one kind of error that a user can act on."""

from __future__ import annotations

LONGEST = 4000
"""Characters of a message."""


class ProbeError(Exception):
    """An error a user can act on: what is wrong, where it is, and what would be right.

    The command line prints the message alone (no traceback) and exits with status 2. A message that quotes something
    endless is cut in its middle.
    """

    def __init__(self, message: str = "") -> None:
        if len(message) > LONGEST:
            message = f"{message[: LONGEST // 2]} [...] {message[-LONGEST // 4 :]}"
        super().__init__(message)
