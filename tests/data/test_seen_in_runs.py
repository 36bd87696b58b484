"""Several pictures and clips through a whole run: what the encoder gets, and what the trace keeps of it."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import probe
from probe.__main__ import load_cli
from probe.backbones.base import Backbone
from probe.backbones.llada_v import LladaV
from probe.data import Sample
from probe.data.pictures import sheet_places
from probe.errors import ProbeError

RECIPE = """
schema: 1
name: halve
generate: {gen_length: 2, steps: 2}
probes:
  - at: {site: layer.input, layer: 1}
    score: {attention: {layer: -1}}
    select: {top_k: {keep: 0.5}}
    do: drop
"""
SIZES = [(96, 96), (40, 80), (90, 30)]


def pictures(sizes: list[tuple[int, int]]) -> tuple[Image.Image, ...]:
    rng = np.random.default_rng(3)
    return tuple(Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes)


@pytest.mark.parametrize("seen", ["images", "frames"])
def test_a_sample_of_several(seen: str, tiny: LladaV, tmp_path: Path) -> None:
    shown = pictures(SIZES)
    sample = Sample("s", shown if seen == "images" else (), "?", frames=shown if seen == "frames" else ())
    result = probe.run(probe.parse_recipe(RECIPE), backbone=tiny, samples=[sample], out=tmp_path)
    assert not result.failed
    side = tiny.geometry.side
    pooled = math.ceil(side / 2)
    each = side**2 if seen == "images" else pooled * (pooled + 1)
    with probe.open(result.trace) as trace:
        kept, box = trace.row("visual_kept", 0), trace.row("visual_box", 0)
        assert kept.shape[-1] == len(SIZES) * each
        assert trace.row("visual_tokens", 0)[:, -1].tolist() == [len(SIZES) * each // 2] * 2
        assert np.unique(trace.row("visual_view", 0)).tolist() == [0, 1, 2]
        view = trace.row("visual_view", 0)
        sheet = Image.open(io.BytesIO(trace.picture(0) or b""))
    wide, high = sheet_places(SIZES)[0]
    assert sheet.width / sheet.height == pytest.approx(wide / high, abs=0.01)
    for i, (x0, y0, x1, y1) in enumerate(sheet_places(SIZES)[1]):
        own = box[(view == i) & ~np.isnan(box).any(1)]
        np.testing.assert_allclose([own[:, 0].min(), own[:, 1].min()], [x0, y0], atol=1e-5)
        # the pixels behind the last whole patch are seen by no token
        assert x1 - (x1 - x0) * 0.12 <= own[:, 2].max() <= x1 + 1e-5
        assert y1 - (y1 - y0) * 0.12 <= own[:, 3].max() <= y1 + 1e-5


ENCODER = """
schema: 1
name: halve
generate: {gen_length: 2, steps: 2}
probes:
  - {at: {site: encoder.output}, score: norm, select: {top_k: {keep: 0.5}}, do: drop}
"""


@pytest.mark.parametrize("seen", ["images", "frames"])
def test_patches_of_several_lie_on_the_sheet(seen: str, tiny: LladaV, tmp_path: Path) -> None:
    shown = pictures(SIZES)
    sample = Sample("s", shown if seen == "images" else (), "?", frames=shown if seen == "frames" else ())
    result = probe.run(probe.parse_recipe(ENCODER), backbone=tiny, samples=[sample], out=tmp_path)
    assert not result.failed
    with probe.open(result.trace) as trace:
        box, view = trace.row("patch_box", 0), trace.row("patch_view", 0)
    assert np.unique(view).tolist() == list(range(len(SIZES)))
    views = tiny.views(shown, clip=seen == "frames")
    for i, place in enumerate(sheet_places(SIZES)[1]):
        low, span = np.array(place[:2]), np.array(place[2:]) - np.array(place[:2])
        corners = views.box[i].numpy().reshape(-1, 2, 2)  # of each patch, as shares of its own picture
        np.testing.assert_allclose(box[view == i].reshape(-1, 2, 2), low + corners * span, atol=1e-5)


def test_the_command_line_takes_several_pictures_or_a_clip(tmp_path: Path) -> None:
    app = load_cli().app
    (tmp_path / "clip").mkdir()
    for i, image in enumerate(pictures([(96, 96)] * 5)):
        image.save(tmp_path / "clip" / f"{i}.png")
    first, second = (str(tmp_path / "clip" / f"{i}.png") for i in (0, 1))
    short = ["--set", "generate.gen_length=2", "--set", "generate.steps=2", "--ask", "Same?", "--no-baseline"]

    def tokens(name: str, *words: str) -> int:
        done = CliRunner().invoke(app, ["run", "quickstart", *words, *short, "--out", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
        with probe.open(tmp_path / name / "quickstart.trace.h5") as trace:
            return int(trace.row("visual_kept", 0).shape[-1])

    one = tokens("one", "--image", first)
    two = tokens("two", "--image", first, "--image", second)
    clip = tokens("clip2", "--video", str(tmp_path / "clip"), "--frames", "2")
    whole = tokens("clip5", "--video", str(tmp_path / "clip"), "--frames", "5")
    assert len({one, two, clip}) == 3
    assert whole * 2 == clip * 5
    with pytest.raises(ProbeError, match="cannot stand together"):
        CliRunner().invoke(
            app, ["run", "quickstart", "--image", first, "--video", first, "--ask", "?"], catch_exceptions=False
        )
    with pytest.raises(ProbeError, match="belong together"):
        CliRunner().invoke(app, ["run", "quickstart", "--video", first], catch_exceptions=False)


def test_a_clip_that_a_model_does_not_take_fails_alone(
    tiny: LladaV, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "frames").mkdir()
    for i, image in enumerate(pictures([(96, 96)] * 2)):
        image.save(tmp_path / "frames" / f"{i}.png")
    rows = [{"video": "frames", "frames": 2, "question": "?"}, {"image": "frames/0.png", "question": "?"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(LladaV, "encode_video", Backbone.encode_video)
    recipe = f"{RECIPE}data: {{file: {tmp_path / 'data.jsonl'}}}"
    result = probe.run(probe.parse_recipe(recipe), backbone=tiny, out=tmp_path / "out")
    assert (result.samples, result.failed) == (2, 1)
    assert "takes no clips" in result.notes[0]
