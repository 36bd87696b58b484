"""A user's own parts: every decorator, found by --plugin and by entry point, checked in YAML, used by the engine."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import probe
from probe.compile_inputs import GIVEN, check_recorded
from probe.errors import ProbeError
from probe.plugins import load_plugins
from probe.registry import Registry, operations, scores, selections, signals
from probe.trace import open_trace

PLUGIN = '''\
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import probe
from probe.calibrate import Finding
from probe.decoding.confidence import Confidence
from probe.decoding.policy import Caching
from probe.site import Plan


@probe.score
def edge(hidden: Tensor, *, p: float = 2.0) -> Tensor:
    """How much a token differs from the one before it."""
    return (hidden.float() - hidden.float().roll(1, 0)).norm(p, dim=-1)


@probe.selection
def firsts(n: int, *, number: int = 8) -> Tensor:
    """The first so many."""
    return torch.arange(min(number, n))


@probe.operation(sites=["layer.input"])
def out(
    kept: Tensor,
    *,
    positions: Literal["keep", "compact"] = "keep",
    lasts: Literal["forward", "generation"] = "forward",
) -> Plan:
    """Take the others out."""
    return Plan(kept.sort().values)


@probe.signal(site="layer.output")
def spread(hidden: Tensor) -> Tensor:
    """largest norm over median norm of all rows"""
    norms = hidden.float().norm(dim=-1)
    return norms.amax(1) / norms.median(1).values


@probe.nnsight(steps="first", dims=("layer",))
def norms(model, clock):
    """mean norm behind each layer"""
    return torch.stack([layer.output.float().norm(dim=-1).mean() for layer in model.layers]).save()


@probe.caching(name="everything")
@dataclass(frozen=True, kw_only=True)
class Everything(Caching):
    """Every row, every time."""


@probe.unmasking(name="sure_first")
@dataclass(frozen=True, kw_only=True)
class SureFirst(Confidence):
    """As published."""


@probe.length(name="as_it_is")
@dataclass(frozen=True, kw_only=True)
class AsItIs:
    """Never."""

    def fill(self, state, ask, decision):
        return {}

    def after(self, state, ask, logits, decision):
        return None


@probe.calibration
def deepest(layers: int, *, up: int = 1) -> Finding:
    """So many from the end."""
    return Finding(layers - up, (f"{layers} layers.",))
'''
RECIPE = """\
schema: 1
name: mine
dial: {layer: 2}
calibrate: {layer: {deepest: {up: 2}}}
generate: {gen_length: 4, steps: 2, cache: everything, unmask: sure_first, length: as_it_is}
probes:
  - name: a
    at: {site: layer.input, layer: $layer}
    score: {edge: {p: 1.0}}
    select: {top_k: {keep: 16}}
    do: {out: {lasts: generation}}
  - name: b
    at: {site: layer.input, layer: 5}
    select: {firsts: {number: 4}}
    do: drop
  - name: c
    at: {site: layer.output, layers: all}
    record: [spread]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return tmp_path


def test_one_file_with_every_kind_runs_from_the_command_line(folder: Path, probe_command: Callable[..., str]) -> None:
    from pages import fresh_registries

    own = ("--plugin", folder / "mine.py")
    for words, told in (
        (("check", folder / "mine.yaml"), "edge: How much a token differs"),
        (("run", folder / "mine.yaml", "--limit", "1", "-o", "out"), "mine"),
        (("calibrate", folder / "mine.yaml"), "layer: 4"),
    ):
        with fresh_registries():
            assert told in probe_command(*words, *own)
    with open_trace(Path("out/mine.trace.h5")) as trace:
        assert trace.row("visual_tokens", 0).tolist() == [[192, 192, 16, 16, 16, 4], [16] * 5 + [4]]
        assert trace.row("spread", 0).shape == (2, 6)
        assert trace.variables["spread"].long_name == "largest norm over median norm of all rows"
        assert trace.row("norms", 0).shape == (2, 6)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("p: 1.0", "p: high", "score.edge.p: should be a number, but is the text `high`"),
        ("p: 1.0", "q: 1.0", "unknown parameter `q` of the score `edge`"),
        ("{edge:", "{egde:", "there is no score `egde`; did you mean `edge`"),
        ("layer.input, layer: $layer", "layer.output, layer: $layer", "`out` acts at `layer.input`, not at"),
        ("[spread]", "[{spread: {of: 1}}]", "unknown parameter `of`"),
        ("site: layer.output, layers: all", "site: layer.attention, layers: all", "is recorded at `layer.output`"),
    ],
)
def test_a_recipe_is_checked_against_them(
    folder: Path, probe_command: Callable[..., str], old: str, new: str, words: str
) -> None:
    (folder / "mine.yaml").write_text(RECIPE.replace(old, new))
    with pytest.raises(ProbeError, match=words):
        probe_command("check", folder / "mine.yaml", "--plugin", folder / "mine.py")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "(hidden: Tensor, *, p",
            "(hiden: Tensor, *, p",
            "asks for `hiden`, which nothing gives here; did you mean `hidden`",
        ),
        ("hidden: Tensor, *, p: float", "hidden: Tensor, p: float", "unknown parameter `p`.*stands behind a `\\*`"),
        ("def spread(hidden", "def spread(logits", "asks for `logits`"),
    ],
)
def test_a_misspelled_input_is_found_before_anything_runs(
    folder: Path, probe_command: Callable[..., str], old: str, new: str, words: str
) -> None:
    (folder / "mine.py").write_text(PLUGIN.replace(old, new))
    with pytest.raises(ProbeError, match=words):
        probe_command("check", folder / "mine.yaml", "--plugin", folder / "mine.py")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("def edge", "def attention", "mine.py: score `attention` is registered twice"),
        ('site="layer.output"', 'site="layer.outputs"', "did you mean `layer.output`"),
        ('(site="layer.output")', "", "must say where it is recorded"),
        ('    lasts: Literal["forward", "generation"] = "forward",\n', "", "lacks the keyword `lasts`"),
        ("import torch\n", "import torhc\n", "No module named 'torhc'"),
    ],
)
def test_a_wrong_plugin_says_what_is_wrong(own_registries: None, folder: Path, old: str, new: str, words: str) -> None:
    (folder / "mine.py").write_text(PLUGIN.replace(old, new))
    with pytest.raises(ProbeError, match=words):
        load_plugins([folder / "mine.py"])


RESULTS = """\
import torch
import probe
from torch import Tensor


@probe.score
def flat(hidden: Tensor) -> Tensor:
    return hidden.float().norm(dim=0)[:7]


@probe.selection
def lost(score: Tensor) -> Tensor:
    return score[:3]


@probe.operation
def nothing(kept: Tensor, *, positions: str = "keep", lasts: str = "forward"):
    \'\'\'Forgets to return.\'\'\'
"""


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ("score: flat, select: {top_k: {keep: 3}}, do: drop", "score `flat`.*shape \\(7,\\).*per token, \\(192,\\)"),
        ("score: random, select: lost, do: drop", "selection `lost`.*float32; it should be the indices"),
        ("score: random, select: {top_k: {keep: 3}}, do: nothing", "operation `nothing`.*None; it should be a `Plan`"),
    ],
)
def test_a_part_that_returns_the_wrong_thing_is_named(
    probe_command: Callable[..., str], tmp_path: Path, parts: str, words: str
) -> None:
    (tmp_path / "p.py").write_text(RESULTS)
    (tmp_path / "p.yaml").write_text(f"schema: 1\nname: p\nprobes: [{{at: {{site: before_lm}}, {parts}}}]\n")
    said = probe_command("check", "p.yaml", "--plugin", "p.py", "--picture", "96x96")
    assert "cannot be foreseen" in said
    with pytest.raises(AssertionError):
        probe_command("run", "p.yaml", "--plugin", "p.py", "--limit", "1", "-o", "out", "--no-baseline")
    with open_trace(Path("out/p.trace.h5")) as trace:
        assert re.search(words, str(trace.array("failed")[0]), flags=re.DOTALL)


def test_an_installed_module_is_a_plugin_too(
    own_registries: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "installed_parts.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    found = load_plugins(["installed_parts"])
    assert [p.name for p in found] == ["norms"]
    assert "edge" in scores
    assert [p.name for p in load_plugins(["installed_parts"])] == ["norms"]
    sys.modules.pop("installed_parts")
    with pytest.raises(ProbeError, match="no installed module of this name"):
        load_plugins(["installed.parts"])


def test_an_entry_point_needs_no_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from torch import Tensor\n\ndef from_afar(hidden: Tensor, *, p: float = 2.0) -> Tensor:\n    return hidden\n"
    )
    (tmp_path / "afar.py").write_text(code)
    info = tmp_path / "afar-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: afar\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[probe.scores]\nfrom_afar = afar:from_afar\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = Registry("score")["from_afar"]
    assert found.needs == ("hidden",)
    assert list(found.params.model_fields) == ["p"]
    sys.modules.pop("afar")


def test_decorators_are_the_registries_own() -> None:
    assert probe.score == scores.register
    assert probe.selection == selections.register
    assert probe.nnsight is probe.code_probe
    assert {"score", "selection", "operation", "signal", "nnsight", "unmasking", "caching"} <= set(probe.__all__)


def test_every_input_of_the_built_in_parts_is_known() -> None:
    import probe.vocabulary  # noqa: F401

    for registry in (scores, selections, operations):
        for entry in registry:
            assert set(entry.needs) <= GIVEN["any"] | GIVEN[registry.kind], entry.name
    for entry in signals:
        sites = entry.meta["site"]
        for site in (sites,) if isinstance(sites, str) else sites:
            check_recorded(entry, site)
