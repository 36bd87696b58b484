"""Questions to prompt strings, prompt strings to ids, and generated text to an answer. No tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from probe.backbones.splice import IMAGE
from probe.errors import ProbeError

PLACE = "<image>"
"""Marks in a question where a picture goes."""
START, HEADER, END_HEADER, END = "<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
USER, ASSISTANT = "user", "assistant"

Message = dict[str, str]


def messages(turns: Sequence[tuple[str, str]]) -> list[Message]:
    """The system sentence and the turns so far, each `(role, text)`, as chat messages."""
    return [{"role": r, "content": t} for r, t in [("system", SYSTEM), *turns]]


def render(chat: Sequence[Message]) -> str:
    """The chat as the published template writes it, closed by an open assistant turn."""
    said = "".join(f"{HEADER}{m['role']}{END_HEADER}\n\n{m['content'].strip()}{END}" for m in chat)
    return f"{START}{said}{HEADER}{ASSISTANT}{END_HEADER}\n\n"


def ask(question: str, pictures: int, *, think: bool | None = None) -> str:
    """The user's text: a place per picture before the question, and the thinking switch after it if there is one.

    A question that says itself where pictures go is taken as it is, as is one without pictures.
    """
    if places := question.count(PLACE):
        if not pictures:
            raise ProbeError(f"the question names a place for a picture ({PLACE}), but no picture is given")
        if pictures > places:
            named = f"{places} place" + "s" * (places > 1)
            raise ProbeError(f"{pictures} pictures are given, but the question names {named} ({PLACE}) for them")
        return question
    if not pictures:
        return question
    switch = "" if think is None else " /think" if think else " /no_think"
    return f"{' '.join([PLACE] * pictures)}\n{question}{switch}"


def to_ids(prompt: str, encode: Callable[[str], Sequence[int]], bos: int | None) -> list[int]:
    """Ids of the prompt with `IMAGE` in the places of pictures.

    The text between places is encoded piece by piece. When the first piece begins with the start token,
    every piece is taken to do so and the first id of each later piece is dropped. A tokenizer that adds no
    start token thereby loses the newline after a picture: that is how the published model is evaluated.
    """
    pieces = [list(encode(piece)) for piece in prompt.split(PLACE)]
    skip = 1 if pieces[0] and bos is not None and pieces[0][0] == bos else 0
    ids = pieces[0]
    for piece in pieces[1:]:
        ids = [*ids, IMAGE, *piece[skip:]]
    return ids


def clean(text: str) -> str:
    """An answer as the published evaluation reads it: without one trailing full stop and outer blanks."""
    return text.removesuffix(".").strip()


def shared_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two sequences begin with in common."""
    for n, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return n
    return min(len(first), len(second))
