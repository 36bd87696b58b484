"""The one kind of error that a user can act on."""

from __future__ import annotations


class ProbeError(Exception):
    """An error a user can act on: what is wrong, where it is, and what would be right.

    The command line prints the message alone (no traceback) and exits with status 2.
    """
