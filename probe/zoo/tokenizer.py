"""Builds the miniature's tokenizer: about 130 tokens that spell the real LLaDA-V prompt and the world's
answers.

WordPiece over pieces cut by one regular expression: the system sentence's phrases are single tokens (the
prompt is the published string, only shorter in tokens), words of the world are single tokens, and a capital
word is spelled by its letters (``B ##A ##K ##O``), so a page costs exactly one token per letter. Anything
else becomes ``<|unk|>``. The tokenizer adds no token of its own accord, as the published one must not.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from probe.zoo.world import COLOURS, COLUMNS, GRID, LETTERS, LINES, SHAPES

BOS, EOS, UNK, MASK = "<|startoftext|>", "<|endoftext|>", "<|unk|>", "<|mdm_mask|>"
START_HEADER, END_HEADER, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
SPECIAL = (BOS, EOS, UNK, MASK, START_HEADER, END_HEADER, EOT)

SYSTEM_PHRASES = (
    "You are a helpful", "language and vision assistant.", "You are able to understand",
    "the visual content that the user provides,", "and assist the user with a variety of tasks",
    "using natural language.",
)  # fmt: skip
SYSTEM_SENTENCE = " ".join(SYSTEM_PHRASES)
_QUESTION_WORDS = (
    "What",
    "is",
    "at",
    "row",
    "line",
    "column",
    "Read",
    "Describe",
    "the",
    "page",
    "scene",
    "colour",
    "shape",
    "letter",
)
_ROLES = ("system", "user", "assistant")

# Each message: header, trimmed content, end of turn; the first after the start token; an open turn last.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first %}{{ '<|startoftext|>' }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
)


def vocabulary() -> list[str]:
    """All tokens in the order of their ids."""
    digits = [str(n) for n in range(1, max(GRID, LINES, COLUMNS) + 1)]
    words = [*_ROLES, "\n", "\n\n", "/no_think", "/think", "?", ",", ".", ";", *_QUESTION_WORDS, *digits]
    letters = [*LETTERS, *(f"##{c}" for c in LETTERS)]
    return [*SPECIAL, *SYSTEM_PHRASES, *words, *COLOURS, *SHAPES, *letters]


def _piece_pattern() -> str:
    phrases = "|".join(re.escape(p).replace(r"\ ", " ") for p in SYSTEM_PHRASES)
    return rf"{phrases}|\n\n|\n|/no_think|/think|[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]"


def build(folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
    )

    tokens = vocabulary()
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token=UNK))  # type: ignore[arg-type]
    # behaviour "removed" drops what the inverted pattern does not match, which is only blanks
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_piece_pattern()), behavior="removed", invert=True)  # type: ignore[assignment]
    tidy = [decoders.Replace(f" {mark}", mark) for mark in (",", ";", "?", ".")]
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(prefix="##", cleanup=False), *tidy])  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": UNK,
        "mask_token": MASK,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 16384,
        "padding_side": "right",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
