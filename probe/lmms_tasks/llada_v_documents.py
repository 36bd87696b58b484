"""DocVQA and InfographicVQA as LLaDA-V's own evaluation has them: a reason first, then the answer behind a marker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from probe.data.benchmarks import MARKER, anls_answer_marker

POST_PROMPT = (
    f"\nGive the reason for your answer first. Then end with one line of the form `{MARKER} X`, where X is a single "
    "word or phrase."
)


def doc_to_visual(doc: Mapping[str, Any]) -> list[Any]:
    """The scanned page."""
    return [doc["image"].convert("RGB")]


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str] | None = None) -> str:
    """The question with the instruction."""
    words = lmms_eval_specific_kwargs or {}
    return f"{words.get('pre_prompt', '')}{doc['question']}{words.get('post_prompt') or POST_PROMPT}"


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """ANLS of what follows the last marker; a reply without one counts as the word `None`."""
    return {"anls": anls_answer_marker(results[0], doc["answers"])}
