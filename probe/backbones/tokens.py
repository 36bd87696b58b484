"""A checkpoint's tokenizer behind four verbs, and the special ids that the decoding rule needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from probe.backbones import llada_v_config as names
from probe.backbones.base import SpecialIds
from probe.errors import ProbeError


class Tokenizer:
    """A checkpoint's tokenizer, with its chat template if it has one."""

    def __init__(self, fast: Any) -> None:
        self._fast = fast
        self.bos: int | None = fast.bos_token_id
        self.eos: int | None = fast.eos_token_id
        self.pad: int | None = self.eos if fast.pad_token_id is None else fast.pad_token_id

    def __len__(self) -> int:
        return len(self._fast)

    def id_of(self, token: str) -> int | None:
        """The id of one token given as a string, or None."""
        return cast("int | None", self._fast.backend_tokenizer.token_to_id(token))

    def strings(self, ids: Sequence[int]) -> list[str]:
        """The tokens of ids as strings, special ones included."""
        return list(self._fast.convert_ids_to_tokens(list(ids)))

    def encode(self, text: str) -> list[int]:
        """Ids with whatever the tokenizer adds by itself."""
        return list(self._fast(text).input_ids)

    def encode_bare(self, text: str) -> list[int]:
        """Ids with nothing added."""
        return list(self._fast(text, add_special_tokens=False).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return cast(str, self._fast.decode(list(ids), skip_special_tokens=True))

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint says how a chat is written."""
        return bool(self._fast.chat_template)

    def render(self, chat: Sequence[Mapping[str, Any]]) -> str:
        """A chat as the prompt string of the checkpoint's template, with an open assistant turn at its end.

        Each message has a `role` and a `content`: a text, or a list of parts where the template knows pictures.
        """
        if not self.has_template:
            where = "tokenizer_config.json (`chat_template`) or chat_template.jinja"
            raise ProbeError(f"the tokenizer has no chat template; put one into {where}")
        try:
            prompt = self._fast.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # what jinja raises, and what a template raises by itself
            raise ProbeError(f"the tokenizer's chat template cannot render a question: {error}") from error
        return cast(str, prompt)

    def template(self, chat: Sequence[Mapping[str, Any]], **options: Any) -> str | None:
        """A chat by the checkpoint's own template, with an open assistant turn at its end; None without a template."""
        if not self._fast.chat_template:
            return None
        chosen = self._fast.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True, **options)
        return cast(str, chosen)

    def token_of(self, number: int) -> str | None:
        """The token of an id as a string, or None."""
        return cast("str | None", self._fast.backend_tokenizer.id_to_token(number))

    def converse(self, chat: Sequence[Mapping[str, Any]], template: str) -> list[int]:
        """Ids of a chat under a processor's template, with an open assistant turn at its end.

        As transformers' processors have it, the tokenizer adds its start token unless the template wrote one.
        """
        try:
            prompt = self._fast.apply_chat_template(
                list(chat), chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # what jinja raises, and what a template raises by itself
            raise ProbeError(f"the chat template cannot render a question: {error}") from error
        starts = self._fast.bos_token is not None and prompt.startswith(self._fast.bos_token)
        return list(self._fast(prompt, add_special_tokens=not starts).input_ids)


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint's folder, or None when it has none.

    Either tokenizer.json, or the vocab.json and merges.txt of a Qwen2 tokenizer (as Dream's, whose own class is
    code of the checkpoint and is not run).
    """
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    kinds = ((PreTrainedTokenizerFast, ("tokenizer.json",)), (Qwen2Tokenizer, ("vocab.json", "merges.txt")))
    for kind, files in kinds:
        if all((folder / name).is_file() for name in files):
            try:
                fast = kind.from_pretrained(folder, local_files_only=True)
                beside = folder / "chat_template.json"  # where older processors put it
                if not fast.chat_template and beside.is_file():
                    fast.chat_template = json.loads(beside.read_text(encoding="utf-8"))["chat_template"]
                return Tokenizer(fast)
            except Exception as error:  # tokenizers raises plain Exception for a malformed file
                raise ProbeError(f"{folder / files[0]} is no usable tokenizer: {error}") from error
    return None


def special_ids(tokenizer: Tokenizer | None, given: SpecialIds | None, vocabulary: int, source: str) -> SpecialIds:
    """The ids that decoding needs: those given, else found by their strings, else the published numbers."""
    tokens = (names.MASK, names.EOS, names.EOT, names.BOS, names.START_HEADER, names.END_HEADER)
    if given is None:
        found = {t.text: tokenizer.id_of(t.text) if tokenizer else t.id for t in tokens}
        if tokenizer and found[names.EOS.text] is None:
            found[names.EOS.text] = tokenizer.eos
        if tokenizer and found[names.BOS.text] is None:
            found[names.BOS.text] = tokenizer.bos
        lacking = [k for k, v in found.items() if v is None]
        if lacking:
            what = ", ".join(lacking)
            raise ProbeError(f"the tokenizer of {source} lacks {what}; give `special` ids instead")
        mask, eos, stop, *more = (cast(int, v) for v in found.values())
        given = SpecialIds(mask, eos, stop, (eos, *more))
    return within(given, vocabulary, source)


def within(given: SpecialIds, vocabulary: int, source: str) -> SpecialIds:
    """The same ids, each of which must be a row of the model."""
    beyond = [i for i in (given.mask, given.eos, given.stop, *given.suppressed) if not 0 <= i < vocabulary]
    if beyond:
        what = f"special id {beyond[0]} is outside of the {vocabulary} rows of {source}"
        raise ProbeError(f"{what}; give `special` ids instead")
    return given
