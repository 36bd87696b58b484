"""The tokenizer spells the published prompt and the world's answers, and survives anything else."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from probe.zoo.batches import Prompts
from probe.zoo.tokenizer import SPECIAL, build, vocabulary
from probe.zoo.world import KINDS, ask, draw

# The prompt string that the published code renders for one picture and one question.
PUBLISHED = (
    "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision "
    "assistant. You are able to understand the visual content that the user provides, and assist the user with "
    "a variety of tasks using natural language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\n"
    "What is shown? /no_think<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    build(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


def test_ids_follow_the_vocabulary_without_gaps_or_twins(tokenizer) -> None:
    tokens = vocabulary()
    assert len(set(tokens)) == len(tokens) == len(tokenizer) < 140
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokens)))) == tokens


def test_nothing_is_added_of_its_own_accord(tokenizer) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer("red circle").input_ids) == ["red", "circle"]


def test_special_tokens_have_their_roles(tokenizer) -> None:
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|startoftext|>", "<|endoftext|>")
    assert (tokenizer.mask_token, tokenizer.unk_token) == ("<|mdm_mask|>", "<|unk|>")
    for token in SPECIAL:
        assert len(tokenizer(token).input_ids) == 1


def test_the_chat_template_renders_the_published_prompt(folder: Path, tokenizer) -> None:
    system = PUBLISHED.split("\n\n")[1].split("<|eot_id|>")[0]
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": "  <image>\nWhat is shown? /no_think "},  # contents are trimmed
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == PUBLISHED


def test_the_prompt_is_short_in_tokens_and_has_no_unknown_one(folder: Path) -> None:
    prompts = Prompts(str(folder))
    before, after = prompts.pieces("Read the page.", "/no_think")
    tokens = prompts.tokenizer.convert_ids_to_tokens(before + after)
    assert "<|unk|>" not in tokens
    assert len(before) == 16
    assert prompts.tokenizer.convert_ids_to_tokens(after) == [
        "Read", "the", "page", ".", "/no_think", "<|eot_id|>",
        "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n",
    ]  # fmt: skip  # the newline after the picture is gone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(25))
def test_answers_and_questions_survive_the_round_trip(tokenizer, kind: str, seed: int) -> None:
    picture = draw(kind, seed)
    texts = [picture.transcript]
    for task in ("colour", "shape") if kind == "scene" else ("letter",):
        question = ask(picture, task, picture.items[seed % len(picture.items)])
        texts += [question.text, question.answer]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    if kind != "scene":  # one token per letter
        assert len(tokenizer(picture.transcript).input_ids) == len(picture.items)


def test_unknown_words_become_the_unknown_token(tokenizer) -> None:
    ids = tokenizer("What naïve elephant 🐘 is at row 2?").input_ids
    assert tokenizer.unk_token_id in ids
    assert tokenizer.convert_ids_to_tokens(ids)[-2:] == ["2", "?"]


def test_short_questions_all_cost_the_same(folder: Path) -> None:
    prompts = Prompts(str(folder))
    lengths = set()
    for kind in KINDS:
        picture = draw(kind, 1)
        for task in ("colour", "shape") if kind == "scene" else ("letter",):
            lengths |= {len(prompts.question(ask(picture, task, item).text)) for item in picture.items}
    assert len(lengths) == 1
