"""Dimple's tokenizer (Qwen2's, with a chat template that takes pictures) and the special ids that decoding needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from probe.backbones.base import SpecialIds
from probe.backbones.tokens import Tokenizer
from probe.errors import ProbeError

IMAGE_PAD = "<|image_pad|>"
"""Stands in a rendered prompt where a picture goes."""


class ChatTokenizer(Tokenizer):
    """A tokenizer whose own chat template writes every prompt."""

    def render(self, chat: Sequence[Mapping[str, Any]]) -> str:
        """A chat, whose contents may be lists of parts, as the prompt string with an open assistant turn."""
        if not self._fast.chat_template:
            files = "tokenizer_config.json, chat_template.jinja or chat_template.json"
            raise ProbeError(f"the tokenizer has no chat template; put Dimple's into {files} beside the weights")
        prompt = self._fast.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True)
        return cast(str, prompt)


def load_chat_tokenizer(folder: Path) -> ChatTokenizer | None:
    """The tokenizer of a checkpoint's folder, or None when it has none.

    Published as the two files of a tokenizer without `tokenizer.json` (vocab.json and merges.txt), which is read as
    Qwen2's own; the class that its settings name is code of the checkpoint, and not looked at.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

    kind: Any = PreTrainedTokenizerFast
    if not (folder / "tokenizer.json").is_file():
        if not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
            return None
        kind = Qwen2Tokenizer
    try:
        fast = kind.from_pretrained(folder, local_files_only=True)
        beside = folder / "chat_template.json"
        if not fast.chat_template and beside.is_file():
            fast.chat_template = json.loads(beside.read_text(encoding="utf-8"))["chat_template"]
        return ChatTokenizer(fast)
    except Exception as error:  # tokenizers raises plain Exception for a malformed file
        raise ProbeError(f"{folder} holds no usable tokenizer: {error}") from error


def dimple_ids(
    tokenizer: Tokenizer | None, given: SpecialIds | None, settings: Mapping[str, Any], source: str
) -> SpecialIds:
    """The mask of the config and the tokenizer's end of a turn, else the config's; nothing is suppressed."""
    rows, image = settings["vocab_size"], settings["image_token_id"]
    if tokenizer is not None:
        if len(tokenizer) > rows:
            raise ProbeError(f"{source}: the tokenizer has {len(tokenizer)} tokens, the model only {rows} rows")
        if tokenizer.id_of(IMAGE_PAD) != image:
            there = f"{IMAGE_PAD} is {tokenizer.id_of(IMAGE_PAD)} in the tokenizer"
            raise ProbeError(f"{source}: {there}, `image_token_id` of config.json is {image}")
    if given is None:
        end = tokenizer.eos if tokenizer is not None else settings.get("eos_token_id")
        end = settings["pad_token_id"] if end is None else end
        given = SpecialIds(mask=settings["mask_token_id"], eos=end, stop=end, suppressed=())
    beyond = [i for i in (given.mask, given.eos, given.stop, *given.suppressed) if not 0 <= i < rows]
    if beyond:
        what = f"special id {beyond[0]} is outside of the {rows} rows of {source}"
        raise ProbeError(f"{what}; give `special` ids instead")
    return given
