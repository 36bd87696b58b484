"""Builds the miniatures' tokenizers: about 130 tokens that spell the published prompts and the world's answers.

There are two, which differ in their special tokens and in the chat template: LLaDA-V's turns, and ChatML as Dream and
other Qwen2 models have it. The words and their ids are the same.

WordPiece over pieces cut by one regular expression: the system sentence's phrases are single tokens (the
prompt is the published string, only shorter in tokens), words of the world are single tokens, and a capital
word is spelled by its letters (``B ##A ##K ##O``), so a page costs exactly one token per letter. Anything
else becomes ``<|unk|>``. The tokenizer adds no token of its own accord, as the published one must not.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probe.zoo.world import COLOURS, COLUMNS, GRID, LETTERS, LINES, SHAPES

BOS, EOS, UNK, MASK = "<|startoftext|>", "<|endoftext|>", "<|unk|>", "<|mdm_mask|>"
START_HEADER, END_HEADER, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
SPECIAL = (BOS, EOS, UNK, MASK, START_HEADER, END_HEADER, EOT)
CHAT_BOS, CHAT_MASK, IM_START, IM_END, PICTURE = "<|beginoftext|>", "<|mask|>", "<|im_start|>", "<|im_end|>", "<image>"
CHAT_SPECIAL = (CHAT_BOS, EOS, UNK, CHAT_MASK, IM_START, IM_END, PICTURE)

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

# Dream's start token before ChatML. A content is a text (LaViDa marks the picture in it, a newline follows and is lost
# in tokenising) or a list of parts (LLaVA-NeXT): both ways give the same ids.
CHATML_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\n" + SYSTEM_SENTENCE + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Spelling:
    """Special tokens by their role. `end` closes an answer, `padding` follows it; nothing `suppressed` is predicted."""

    special: tuple[str, ...]
    bos: str
    mask: str
    end: str
    padding: str
    suppressed: tuple[str, ...]
    template: str
    suffixes: tuple[str, ...]
    """What may stand behind a question; the first is usual."""


LLADA = Spelling(
    SPECIAL, BOS, MASK, EOT, EOT, suppressed=(EOS, BOS, START_HEADER, END_HEADER), template=CHAT_TEMPLATE,
    suffixes=("/no_think", "/think"),
)  # fmt: skip
CHATML = Spelling(
    CHAT_SPECIAL, CHAT_BOS, CHAT_MASK, IM_END, EOS, suppressed=(), template=CHATML_TEMPLATE, suffixes=("",)
)


def vocabulary(spelling: Spelling = LLADA) -> list[str]:
    """All tokens in the order of their ids."""
    digits = [str(n) for n in range(1, max(GRID, LINES, COLUMNS) + 1)]
    words = [*_ROLES, "\n", "\n\n", "/no_think", "/think", "?", ",", ".", ";", *_QUESTION_WORDS, *digits]
    letters = [*LETTERS, *(f"##{c}" for c in LETTERS)]
    return [*spelling.special, *SYSTEM_PHRASES, *words, *COLOURS, *SHAPES, *letters]


def _piece_pattern() -> str:
    phrases = "|".join(re.escape(p).replace(r"\ ", " ") for p in SYSTEM_PHRASES)
    return rf"{phrases}|\n\n|\n|/no_think|/think|[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]"


def build(folder: Path, spelling: Spelling = LLADA) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
    )

    tokens = vocabulary(spelling)
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token=UNK))  # type: ignore[arg-type]
    # behaviour "removed" drops what the inverted pattern does not match, which is only blanks
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_piece_pattern()), behavior="removed", invert=True)  # type: ignore[assignment]
    tidy = [decoders.Replace(f" {mark}", mark) for mark in (",", ";", "?", ".")]
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(prefix="##", cleanup=False), *tidy])  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in spelling.special])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": spelling.bos,
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": UNK,
        "mask_token": spelling.mask,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 16384,
        "padding_side": "right",
        "chat_template": spelling.template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
