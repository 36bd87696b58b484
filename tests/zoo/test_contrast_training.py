"""The contrast kinds in training: what an adapter computes is what was trained, and the command makes both.

Random weights, exported and loaded again: the class's adapter must see the sequence, and predict the tokens, that the
training module does, in each of the attention patterns that training uses.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from probe.backbones import load
from probe.backbones.base import Backbone
from probe.data import load as samples_of
from probe.zoo import distil
from probe.zoo import tower as towers
from probe.zoo.batches import LONG_ANSWER, Maker, Prompts, Shelf
from probe.zoo.export import GENERATION
from probe.zoo.export_contrast import llava_weights
from probe.zoo.kinds import KINDS, Plan, Size
from probe.zoo.model import Miniature, Packing, packed_attention
from probe.zoo.tokenizer import PICTURE, build
from probe.zoo.train import main, shipped_tower

CONTRAST = ("autoregressive", "adapted")


class Made:
    """A random miniature of a kind, in training and behind its adapter."""

    def __init__(self, name: str, folder: Path) -> None:
        kind = KINDS[name]
        assert kind.tower is not None
        build(folder, kind.spelling)
        self.prompts = Prompts(str(folder), kind.spelling)
        torch.manual_seed(1)
        self.config = kind.config(len(self.prompts.tokenizer), hidden=32, layers=2, heads=2, mlp=48)
        self.tower = kind.tower(shipped_tower(), 0)
        self.model = Miniature(self.config, self.tower.config.hidden_size)
        for parameter in self.model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
            elif parameter.dim() == 1 and parameter.mean() == 0:
                torch.nn.init.normal_(parameter, std=0.1)  # biases, which begin as nothing
        half = {k: v.half().float() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(half)  # what storing them keeps
        self.tower.load_state_dict({k: v.half().float() for k, v in self.tower.state_dict().items()})
        ids = {"bos": self.prompts.bos, "eos": self.prompts.eos, "mask": self.prompts.mask, "end": self.prompts.end}
        ids["picture"] = self.prompts.id(PICTURE)
        parts = self.model.state_dict(), self.tower.state_dict()
        kind.export(folder, *parts, self.config, self.tower.config, ids, folder)
        self.folder, self.backbone = folder, load(folder)

    def prefix(self, image: object) -> Tensor:
        """The sequence up to the picture's end, as in training, float32."""
        pixels = torch.from_numpy(towers.views(np.asarray(image))).movedim(-1, -3).float() / 127.5 - 1
        return self.model.prefix(towers.features(self.tower, pixels)[None], self.prompts.opening)


@pytest.fixture(scope="module", params=CONTRAST)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(request.param, tmp_path_factory.mktemp(request.param))


@torch.no_grad()
def test_the_prompt_is_the_sequence_of_the_training(made: Made) -> None:
    sample = next(samples_of("world/short", 1))
    question = torch.tensor(made.prompts.question(sample.question))
    expected = torch.cat([made.prefix(sample.images[0])[0], made.model.lm.embed_tokens(question)])
    got = made.backbone.encode(sample.images, sample.question).embeds
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def _rows(backbone: Backbone, embeds: Tensor, allowed: Tensor | None) -> Tensor:
    """Logits of a sequence by the adapter's own decoder, under a mask `(query, key)`."""
    mask = None if allowed is None else allowed[None, None]
    hidden = backbone.lm(inputs_embeds=embeds[None], attention_mask=mask).last_hidden_state
    return backbone.head(hidden)[0]


@torch.no_grad()
def test_training_predicts_what_the_adapter_does(made: Made) -> None:
    """One group: the causal pattern on the causal class; the full one and that of the prompt's cache on the other."""
    sample, answer = next(samples_of("world/short", 1)), torch.tensor([[5, 9, 3]])
    prompt = made.backbone.encode(sample.images, sample.question).embeds
    question = torch.tensor([made.prompts.question(sample.question)])
    embeds = torch.cat([prompt, made.backbone.embed(answer[0])])
    start, length = len(prompt), len(embeds)
    prefix, group = made.prefix(sample.images[0]), torch.cat([question, answer], 1)[:, None]
    if made.backbone.causal:
        got = [made.model.logits(prefix, group, 3, packed=True, causal=True)]
        masks: list[Tensor | None] = [None]
    else:
        whole = torch.cat([prefix, made.model.lm.embed_tokens(question)], 1)
        got = [made.model.logits(prefix, group, 3, packed=False), made.model.logits(whole, answer[:, None], 3, True)]
        apart = torch.ones(length, length, dtype=torch.bool)
        apart[:start, start:] = False
        masks = [None, apart]
    for mask, logits in zip(masks, got, strict=True):
        rows = _rows(made.backbone, embeds, mask)[start - 1 : length - 1]
        torch.testing.assert_close(logits[0, 0], rows, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_an_exported_model_comes_back_the_same(made: Made) -> None:
    if not made.backbone.causal:
        pytest.skip("nothing starts from an adapted model")
    again = llava_weights(made.folder, list(made.model.state_dict()))
    for name, value in made.model.state_dict().items():
        assert torch.equal(again[name], value), name


def test_the_adapters_say_what_the_folder_does(made: Made) -> None:
    special, prompts = made.backbone.special, made.prompts
    assert special.stop == prompts.end
    if made.backbone.causal:
        assert (made.backbone.defaults.gen_length, special.mask) == (GENERATION["gen_length"], prompts.id(PICTURE))
        assert made.backbone.defaults.stop == (prompts.spelling.end,)
    else:
        assert (special.mask, special.eos) == (prompts.mask, prompts.eos)
        assert list(made.backbone.defaults.cache) == ["prefix"]


def test_causal_packing_is_attention_under_a_mask() -> None:
    torch.manual_seed(0)
    prefix, groups, length = 5, 3, 4
    total = prefix + groups * length
    q, k, v = (torch.randn(2, 2, total, 8) for _ in range(3))
    group = torch.tensor([0] * prefix + [1 + i // length for i in range(groups * length)])
    allowed = ((group[None] == 0) | (group[None] == group[:, None])) & torch.ones(total, total, dtype=torch.bool).tril()
    scores = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~allowed, -torch.inf)
    got, _ = packed_attention(nn.Module(), q, k, v, None, 8**-0.5, packing=Packing(prefix, groups, causal=True))
    torch.testing.assert_close(got, (scores.softmax(-1) @ v).transpose(1, 2))


def test_finer_patches_are_pooled_to_the_same_span() -> None:
    """Four fine patches that agree give what one coarse patch gives; four that differ their mean."""
    torch.manual_seed(0)
    model = Miniature(KINDS["adapted"].config(20, hidden=8, layers=1, heads=2, mlp=16), 8)
    coarse = torch.randn(1, 5, 36, 8)
    fine = distil.spread(coarse.flatten(0, 1), 144)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.visual(fine), model.visual(coarse))
        model.projector = nn.Identity()
        row = torch.zeros(1, 5, 12, 12, 8)
        row[0, 0, 0, :2] = torch.tensor([2.0, 4.0])[:, None]  # the first two of the base view's first row
        assert model.visual(row.flatten(2, 3))[0, 0].tolist() == [1.5] * 8


def test_a_clip_begins_as_the_tower_that_it_is_made_of() -> None:
    """Class token and first norm aside: with the norm undone, embeddings are the teacher's, layers its own."""
    teacher = shipped_tower()
    clip = distil.clip_from(teacher, 0)
    pixels = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(clip.embeddings(pixels)[:, 1:], teacher.embeddings(pixels), atol=1e-5, rtol=1e-5)
        hidden = torch.randn(2, 36, 128)
        given = (t.encoder(inputs_embeds=hidden).last_hidden_state for t in (clip, teacher))
        torch.testing.assert_close(*given, atol=1e-4, rtol=1e-4)


def test_answers_end_once_and_are_padded(tmp_path: Path) -> None:
    spelling = KINDS["adapted"].spelling
    build(tmp_path, spelling)
    prompts = Prompts(str(tmp_path), spelling)
    assert prompts.tokenizer.convert_ids_to_tokens(prompts.answer("red", 4)) == [
        "red", "<|im_end|>", "<|endoftext|>", "<|endoftext|>",
    ]  # fmt: skip
    pool = towers.render("scene", range(2))
    maker = Maker(prompts, {"scene": Shelf(pool.pictures, torch.zeros(2, 5, 36, 4))}, torch.Generator())
    batch = maker.draw(2, 1, True, 1.0, 0.0)
    ended = batch.wanted == prompts.end
    assert (ended.sum(-1) == 1).all()
    assert torch.equal(batch.weight == 1.0, batch.wanted != prompts.eos)
    assert batch.wanted.shape[-1] == LONG_ANSWER


def test_one_question_about_a_picture_may_be_any(tmp_path: Path) -> None:
    build(tmp_path)
    prompts = Prompts(str(tmp_path))
    pool = towers.render("scene", range(2))
    shelf = Shelf(pool.pictures, torch.zeros(2, 5, 36, 4))
    maker = Maker(prompts, {"scene": shelf}, torch.Generator().manual_seed(0))
    asked = {prompts.text(row[0].tolist()).split()[1] for row in maker.draw(32, 1, False, 1.0, 0.0).questions}
    assert asked == {"colour", "shape"}


def test_plans_say_who_sees_what() -> None:
    size = Size()
    assert all(p.causal and p.packed for p in (Plan.autoregressive(k, k / 9, size) for k in range(9)))
    assert Plan.adapted(3, 0.1, size).groups == size.long_groups
    late = [Plan.adapted(k, 0.9, size) for k in range(8)]
    assert {(p.packed, p.apart) for p in late} == {(False, False), (True, True)}
    assert {p.long for p in late if p.apart} == {p.long for p in late if not p.apart} == {True, False}


def test_the_command_trains_one_and_adapts_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "ar", tmp_path / "adapted"
    few = ["--smoke", "--evaluate", "1"]
    main(["--out", str(source), "--kind", "autoregressive", "--steps", "20", *few])
    main(["--out", str(out), "--kind", "adapted", "--from", str(source), "--steps", "8", *few])
    assert capsys.readouterr().out.count("world/describe") == 2
    assert load(source).causal and not load(out).causal
    more = ["--steps", "12", "--occluded", "0.7", "--eager"]
    main(["--out", str(out), "--kind", "adapted", "--from", str(source), *more, *few])
    assert "taken up at step 8" in capsys.readouterr().out


def test_an_adapted_model_needs_one_to_start_from(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "x"), "--kind", "adapted", "--smoke"])
    for wrong in (["--occluded", "1.5"], ["--occluded", "0.5", "--kind", "autoregressive"]):
        with pytest.raises(SystemExit):
            main(["--out", str(tmp_path / "x"), "--smoke", *wrong])
    assert not (tmp_path / "x").exists()
