"""Clips of Qwen2.5-VL against transformers' own class: patches, time ids, every layer, logits, answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_autoregressive import native_model, write_qwen_vl

from probe.backbones import load
from probe.backbones.base import Backbone, Prompt
from probe.backbones.dimple_pixels import patches_of, patches_of_clip
from probe.backbones.splice import IMAGE
from probe.compile import compile_recipe
from probe.errors import ProbeError
from probe.generate import generate
from probe.generation import rule_for
from probe.recipe import parse_recipe
from probe.site import Role

CLIPS = [(2, (32, 24), 2.0), (5, (40, 72), 2.0), (4, (24, 24), 1.5), (1, (64, 32), 25.0), (6, (30, 50), 0.2)]
"""Frames, their size, and how many of them are a second."""


def frames_of(count: int, size: tuple[int, int], seed: int = 0) -> list[Image.Image]:
    noise = np.random.default_rng(seed).integers(0, 255, (count, size[1], size[0], 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in noise]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_vl(tmp_path_factory.mktemp("clips") / "it", seed=5)


class Seen:
    """A clip and a question here, and as transformers' class takes them."""

    def __init__(self, folder: Path, clip: tuple[int, tuple[int, int], float]) -> None:
        count, size, fps = clip
        self.frames = frames_of(count, size)
        self.model: Any = load(folder, fps=fps)
        self.native = native_model(folder)
        self.prompt = self.ask("What happens?")
        pixels, grid = patches_of_clip(self.frames, self.model.preprocessing)
        ids = torch.where(self.prompt.ids == IMAGE, self.native.config.video_token_id, self.prompt.ids)[None]
        self.inputs = {
            "input_ids": ids,
            "mm_token_type_ids": 2 * (ids == self.native.config.video_token_id).int(),
            "pixel_values_videos": pixels,
            "video_grid_thw": grid,
            "second_per_grid_ts": [self.model.preprocessing.temporal / fps],
        }

    def ask(self, question: str) -> Prompt:
        return self.model.assemble(question, self.model.encode_video(self.frames))


@pytest.fixture(scope="module", params=CLIPS, ids=str)
def seen(request: pytest.FixtureRequest, folder: Path) -> Seen:
    return Seen(folder, request.param)


def test_positions_are_the_native_ones(seen: Seen) -> None:
    types = seen.inputs["mm_token_type_ids"]
    names = ("input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")
    wanted, _ = seen.native.model.get_rope_index(**{n: seen.inputs[n] for n in names})
    assert seen.prompt.position.T.equal(wanted[:, 0])
    more = torch.cat([seen.inputs["input_ids"], torch.tensor([[9]])], 1)  # an answer token goes on behind the text
    longer = {**seen.inputs, "input_ids": more, "mm_token_type_ids": torch.nn.functional.pad(types, (0, 1))}
    behind, _ = seen.native.model.get_rope_index(**{n: longer[n] for n in names})
    assert behind[:, 0, -1].tolist() == [seen.prompt.next_position] * 3


@torch.no_grad()
def test_every_layer_and_the_logits(seen: Seen) -> None:
    native = seen.native(**seen.inputs, output_hidden_states=True)
    torch.testing.assert_close(seen.prompt.embeds, native.hidden_states[0][0], atol=1e-5, rtol=1e-5)
    states: list[torch.Tensor] = []
    handles = [x.layer.register_forward_hook(lambda m, a, out: states.append(out)) for x in seen.model.layers]
    ids = seen.model.position_ids(seen.prompt.position[None])
    last = seen.model.lm(inputs_embeds=seen.prompt.embeds[None], position_ids=ids).last_hidden_state
    for handle in handles:
        handle.remove()
    for own, wanted in zip(states[:-1], native.hidden_states[1:-1], strict=True):
        torch.testing.assert_close(own, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen.model.head(last), native.logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_answers_are_the_native_ones(seen: Seen) -> None:
    wanted = seen.native.generate(**seen.inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    recipe = parse_recipe("schema: 1\nname: it\ngenerate: {gen_length: 6, steps: 6}\nprobes: []\n")
    rule = rule_for(seen.model, recipe, {}, pictures=True)
    found = generate(seen.model, [seen.prompt], rule, compile_recipe(recipe, seen.model.facts))[0]
    own, native = found.ids, wanted[0, seen.prompt.ids.shape[0] :].tolist()
    assert own and own == native[: len(own)]


def test_tokens_say_which_frame_they_show(seen: Seen) -> None:
    prompt, depth = seen.prompt, seen.model.preprocessing.temporal
    times = -(-len(seen.frames) // depth)
    rows, columns = seen.model.preprocessing.grid(*seen.frames[0].size)
    assert prompt.n_visual == times * rows * columns == int((prompt.role == Role.VISUAL).sum())
    assert prompt.view.view(times, -1).tolist() == [[t] * (rows * columns) for t in range(times)]
    assert prompt.picture.equal(prompt.view * depth)
    assert int(prompt.picture.max()) < len(seen.frames)
    box = prompt.box.view(times, rows, columns, 4)
    assert box.equal(box[:1].expand_as(box))
    areas = (box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1])
    torch.testing.assert_close(areas.sum((1, 2)), torch.ones(times))


def test_patches_one_by_one(seen: Seen) -> None:
    rule, depth = seen.model.preprocessing, seen.model.preprocessing.temporal
    wide, high = rule.size(*seen.frames[0].size)
    exact = frames_of(len(seen.frames), (wide, high), seed=1)
    mean, std = torch.tensor(rule.mean), torch.tensor(rule.std)
    video = [(torch.from_numpy(np.asarray(f) * rule.scale).float() - mean) / std for f in exact]
    found, grid = patches_of_clip(exact, rule)
    times, rows, columns = grid[0].tolist()
    assert (times, rows, columns) == (-(-len(exact) // depth), high // rule.patch, wide // rule.patch)
    number = 0
    for time in range(times):
        for row in range(0, rows, rule.merge):
            for column in range(0, columns, rule.merge):
                for inner in range(rule.merge**2):  # what merges into one token stands together
                    y, x = row + inner // rule.merge, column + inner % rule.merge
                    square = slice(y * rule.patch, (y + 1) * rule.patch), slice(x * rule.patch, (x + 1) * rule.patch)
                    still = [video[min(time * depth + t, len(exact) - 1)][square] for t in range(depth)]
                    wanted = torch.stack(still).permute(3, 0, 1, 2).flatten()  # colour, frame, y, x
                    torch.testing.assert_close(found[number], wanted, atol=1e-5, rtol=1e-5)
                    number += 1
    assert number == found.shape[0]


def test_a_clip_that_stands_still_is_a_picture_in_time(folder: Path) -> None:
    model: Any = load(folder)
    frame = frames_of(1, (40, 32))
    one, _ = patches_of(frame, model.preprocessing)
    clip, grid = patches_of_clip(frame * 4, model.preprocessing)
    assert grid[0, 0] == 2 and clip.equal(torch.cat([one, one]))


def test_where_the_question_says_so(folder: Path) -> None:
    model: Any = load(folder)
    prompt = Seen(folder, CLIPS[0]).ask("Look: <image> What happens?")
    first = int((prompt.visual >= 0).nonzero()[0])
    assert model.tokenizer.decode(prompt.ids[:first].tolist()).endswith("Look: ")


def test_what_is_refused(folder: Path) -> None:
    with pytest.raises(ProbeError, match="fps=0; frames per second are more than 0"):
        load(folder, fps=0)
    model: Backbone = load(folder)
    with pytest.raises(ProbeError, match="a clip without frames"):
        model.encode_video([])
