"""NaN and infinity are counted, said once, and never become a token; ties fall the same way; budgets at their edges."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hardship import recording_recipe, samples_of
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import probe
from probe.__main__ import load_cli
from probe.compile import compile_recipe
from probe.decoding import unmask
from probe.finite import NotFinite, nonfinite
from probe.generate import generate
from probe.loop import Rule
from probe.recipe import parse_recipe
from probe.registry import scores
from probe.selections import greedy_diverse, ranked, top_k
from probe.site import SEGMENTS, Fate
from probe.trace import open_trace, verify

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def poisoned(tiny: Any) -> Iterator[Any]:
    """The backbone with one weight of layer 2 that is NaN: everything from there on is."""
    weight = tiny.layers[2].mlp.down_proj.weight
    before = weight.clone()
    weight[0, 0] = NAN
    yield tiny
    weight.copy_(before)


def test_a_poisoned_model_is_said_once_and_commits_nothing(poisoned: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        result = probe.run(recording_recipe(), backbone=poisoned, samples=samples_of(3), out=tmp_path, timed=False)
    said = [str(w.message) for w in heard if issubclass(w.category, NotFinite)]
    assert len(said) == 2, "once per side, not per sample or step"
    assert "sample 0, step 0" in said[1] and "`attention_mass` at layer.attention, layer 3" in said[1]
    assert result.failed == 0
    for path in (result.trace, result.baseline):
        assert path is not None and verify(path) == []
        with open_trace(path) as trace:
            assert (trace.array("nonfinite") > 0).all()
            assert (trace.array("commit_step") == -1).all(), "no token was chosen from NaN"
            assert trace.array("prediction").tolist() == [""] * 3
            assert np.isnan(trace.array("entropy")).all()


def test_some_slots_are_poisoned_and_the_others_are_decoded(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = type(tiny).head

    def head(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        logits = honest(self, hidden).clone()
        logits[:, 0, 60] = NAN if logits.shape[1] % 2 else INF
        return logits

    monkeypatch.setattr(type(tiny), "head", head)
    with pytest.warns(NotFinite, match="first at logits"):
        result = probe.run(recording_recipe(), backbone=tiny, samples=samples_of(1), out=tmp_path, timed=False)
    with open_trace(result.trace) as trace:
        assert set(trace.row("nonfinite", 0).tolist()) == {1}
        committed, token = trace.row("commit_step", 0), trace.row("token", 0)[-1]
        assert committed[0] == -1 and token[0] == tiny.special.mask and (committed[1:] >= 0).all()


SCORED = """
schema: 1
name: doubtful
data: {task: world/short, limit: 1}
probes:
  - {name: prune, at: AT, score: half_nan, select: {top_k: {keep: 0.25}}, do: drop}
"""


@pytest.mark.parametrize(
    ("at", "step", "place"),
    [
        ("{site: layer.input, layer: 1, steps: {from: 1}}", 1, "layer.input"),
        ("{site: encoder.output}", 0, "encoder.output"),
    ],
)
def test_scores_of_visual_tokens_that_are_nan_are_counted_said_and_rank_last(
    at: str, step: int, place: str, tiny: Any, tmp_path: Path
) -> None:
    @scores.register
    def half_nan(n: int) -> torch.Tensor:
        """Worth nothing, in the first half not even a number."""
        out = torch.zeros(n)
        out[: n // 2] = NAN
        return out

    try:
        recipe = parse_recipe(SCORED.replace("AT", at))
        with pytest.warns(NotFinite, match=rf"step {step}: .*score of probe `prune` .*{place}") as heard:
            result = probe.run(recipe, backbone=tiny, samples=samples_of(1), out=tmp_path, timed=False)
    finally:
        del scores._entries["half_nan"]
    assert len([w for w in heard if issubclass(w.category, NotFinite)]) == 1
    with open_trace(result.trace) as trace:
        counts = trace.row("nonfinite", 0)
        assert (counts[:step] == 0).all() and counts[step] > 0
        if place == "layer.input":
            n = int(trace.row("visual_original", 0))
            assert (counts[step:] == n // 2).all()
            fates = trace.row("visual_kept", 0)[step, 1]
            assert (fates[: n // 2] != int(Fate.KEPT)).all() and (fates == int(Fate.KEPT)).sum() == n // 4


def test_a_whole_model_has_no_such_values(tiny: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotFinite)
        result = probe.run(recording_recipe(), backbone=tiny, samples=samples_of(2), out=tmp_path, timed=False)
    with open_trace(result.trace) as trace:
        assert (trace.array("nonfinite") == 0).all()


def test_the_command_line_says_it(poisoned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probe.runner.load", lambda *_, **__: poisoned)
    words = ["run", "prune/random", "--limit", "2", "--no-time", "--data", "world/short", "--out", str(tmp_path)]
    said = CliRunner().invoke(load_cli().app, words, env={"COLUMNS": "300"})
    assert said.exit_code == 0 and said.output.count("warning:") == 2
    assert "step 0:" in said.output and "Traceback" not in said.output


def test_what_counts_as_a_number_that_was_due() -> None:
    answer = SEGMENTS.index("answer")
    mass = np.zeros((4, len(SEGMENTS)))
    mass[0, 0] = NAN  # a segment without rows has no mean
    mass[1, answer] = NAN
    mass[2, 0] = INF
    assert nonfinite(mass, ("step", "layer", "segment_key")).tolist() == [0, 1, 1, 0]
    gone = np.array([[1.0, NAN], [NAN, NAN], [INF, 0.0]])
    assert nonfinite(gone, ("step", "layer", "visual")).tolist() == [0, 0, 1]
    assert nonfinite(np.array([[NAN, 1.0], [1.0, 1.0]]), ("step",)).tolist() == [1, 0]


numbers = st.floats(width=32) | st.sampled_from([0.0, 1.0, NAN, INF, -INF])


@settings(max_examples=300, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=12), st.data())
def test_a_slot_without_a_score_is_never_committed(scores: list[float], data: st.DataObject) -> None:
    score = torch.tensor([scores], dtype=torch.float64)
    eligible = torch.tensor([data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))])
    count = data.draw(st.integers(0, 15))
    commit = unmask.select(score, eligible, [count])
    assert not (commit & score.isnan()).any() and not (commit & ~eligible).any() and int(commit.sum()) <= count
    # brute force: the best eligible numbers, the lowest slot where two are equal
    order = sorted(
        (i for i in range(len(scores)) if eligible[0, i] and scores[i] == scores[i]), key=lambda i: (-scores[i], i)
    )
    assert set(order[:count]) == set(commit[0].nonzero()[:, 0].tolist()) or -INF in scores


@settings(max_examples=300, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=12), st.integers(0, 15))
def test_tokens_without_a_score_come_last_and_ties_in_raster_order(scores: list[float], count: int) -> None:
    kept = top_k(torch.tensor(scores), count, keep=count).tolist()
    value = [float(np.float32(s)) for s in scores]
    known = [-INF if v != v else v for v in value]
    assert kept == sorted(range(len(scores)), key=lambda i: (-known[i], i))[:count]
    if sum(v == v and v > -INF for v in value) >= count:
        assert not any(value[i] != value[i] for i in kept)


def test_ties_fall_the_same_way_every_time() -> None:
    flat = torch.zeros(500)
    assert all(ranked(flat).equal(torch.arange(500)) for _ in range(20))
    same = torch.ones(60, 60)
    first = greedy_diverse(same, 30, torch.Generator().manual_seed(0), keep=30)
    assert all(greedy_diverse(same, 30, torch.Generator(), keep=30).equal(first) for _ in range(20))
    logits = torch.zeros(1, 7, 50)
    assert unmask.propose(logits, 0.0, None).eq(0).all()
    commit = unmask.select(torch.ones(1, 7), torch.ones(1, 7, dtype=torch.bool), [3])
    assert commit[0].tolist() == [True] * 3 + [False] * 4


def test_similarities_that_are_nan_are_never_preferred() -> None:
    similarity = torch.eye(6)
    similarity[2, :] = similarity[:, 2] = NAN
    kept = greedy_diverse(similarity, 5, torch.Generator().manual_seed(0), keep=5)
    assert 2 not in kept.tolist() and len(set(kept.tolist())) == 5


EDGE = """
schema: 1
name: edge
probes:
  - at: {{site: {site}}}
    score: norm
    select: {{top_k: {{keep: {keep}}}}}
    do: {{{do}}}
  - at: {{site: layer.attention, layers: all}}
    record: [attention_mass, visual_importance]
"""
DOES = ("drop: {lasts: forward}", "drop: {positions: compact, lasts: generation}", "mask: {lasts: forward}")


@pytest.mark.parametrize("do", DOES)
@pytest.mark.parametrize("site", ["layer.input, layer: 1", "before_lm", "layer.after_attention, layer: 0"])
def test_keep_nothing_one_all_and_more_than_there_are(tiny: Any, site: str, do: str) -> None:
    """0 and 0.0 leave none, 1 leaves one, 1.0 and more than there are leave all, bit for bit as without the probe."""
    sample = samples_of(1)[0]
    prompt = tiny.encode(sample.images, sample.question)
    rule = Rule(4, 4, 2, tiny.special.mask, tiny.special.suppressed)

    def run(keep: Any, *, edits: bool = True) -> dict[str, np.ndarray]:
        recipe = probe.parse_recipe(EDGE.format(site=site, do=do, keep=keep))
        recipe = recipe if edits else recipe.without_interventions()
        return generate(tiny, [prompt], rule, compile_recipe(recipe, tiny.facts))[0].arrays

    whole = run(0, edits=False)
    exact = ("token", "confidence", "attention_mass", "visual_importance", "visual_kept")
    for keep, left in ((0, 0), (0.0, 0), (1, 1), (1.0, prompt.n_visual), (10**9, prompt.n_visual)):
        found = run(keep)
        assert int(found["visual_tokens"][:, -1].max()) == left, keep
        assert np.isfinite(found["attention_mass"]).all() and not found["nonfinite"].any()
        same = all(np.array_equal(found[n], whole[n], equal_nan=found[n].dtype.kind == "f") for n in exact)
        assert same == (left == prompt.n_visual), keep
