"""Figures: what is drawn is in the trace, texts do not overlap, and odd traces are drawn or refused in words."""

from __future__ import annotations

import io
import itertools
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from probe.errors import ProbeError
from probe.site import SEGMENTS, Fate, Role
from probe.timing import PHASES
from probe.trace import SampleRecord, TraceHeader, TraceWriter, Variable, open_trace
from probe.views import figures
from probe.views.figure_style import STYLE
from probe.views.figures import FIGURES, draw, list_figures, plot

pytest.importorskip("matplotlib")

REPO = Path(__file__).resolve().parents[2]
PAGE = REPO / "docs" / "figures.md"
LAYERS, HEADS = 3, 2
SAID = "attention mass (queries=answer, form=softmax, heads=mean)"
COORDS = {
    "segment": ["question", "answer"], "segment_key": list(SEGMENTS), "phase": list(PHASES),
    "corner": ["x0", "y0", "x1", "y1"],
}  # fmt: skip
VARIABLES = {
    v.name: v
    for v in (
        Variable("attention_mass", ("step", "layer", "segment", "segment_key"), "1", SAID),
        Variable("visual_importance", ("step", "layer", "visual"), "1", "attention received"),
        Variable("confidence", ("step", "position"), "1", "confidence"),
        Variable("entropy", ("step", "position"), "nat", "entropy"),
        Variable("commit_step", ("position",), "1", "step of the commit", dtype="int32"),
        Variable("visual_tokens", ("step", "layer"), "1", "visual tokens", dtype="int32"),
        Variable(
            "visual_kept", ("step", "layer", "visual"), "1", "fate", dtype="uint8",
            flags={f.name.lower(): int(f) for f in Fate},
        ),
        Variable("visual_box", ("visual", "corner"), "1", "box"),
        Variable("visual_role", ("visual",), "1", "role", dtype="int8"),
        Variable("visual_view", ("visual",), "1", "view", dtype="int16"),
        Variable("seconds", ("step", "phase"), "s", "time", dtype="float64"),
        Variable("flops", ("step", "phase"), "1", "FLOPs", dtype="float64"),
        Variable("seconds_unrecorded", (), "s", "time", dtype="float64"),
        Variable("flops_unrecorded", (), "1", "FLOPs", dtype="float64"),
    )
}  # fmt: skip
BY_HEAD = Variable("attention_mass_heads", ("step", "layer", "head", "segment", "segment_key"), "1", SAID)


def boxes(visual: int) -> np.ndarray:
    """Four boxes of the whole picture, then a grid of 4 x 4 with a separator, which sees nothing, after each row."""
    whole = [(x / 2, y / 2, x / 2 + 0.5, y / 2 + 0.5) for y in range(2) for x in range(2)]
    rows = [[(x / 4, y / 4, x / 4 + 0.25, y / 4 + 0.25) for x in range(4)] + [(np.nan,) * 4] for y in range(4)]
    return np.array([*whole, *itertools.chain(*rows)][:visual]).reshape(visual, 4)


def png() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.linspace(0, 255, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def arrays(rng: np.random.Generator, steps: int, positions: int, visual: int) -> dict[str, np.ndarray]:
    commit = rng.permutation(np.arange(positions) % steps)
    confidence = rng.uniform(0.05, 1, (steps, positions))
    confidence[np.arange(steps)[:, None] > commit] = np.nan  # written slots are no longer open
    fates = np.full((steps, LAYERS, visual), Fate.KEPT)
    fates[1:, 1:, visual // 2 :] = Fate.DROPPED
    fates[1:, 2:, : visual // 4] = Fate.MERGED
    importance = rng.uniform(1e-5, 0.2, fates.shape)
    importance[fates != Fate.KEPT] = np.nan
    role = np.where(np.isnan(boxes(visual)).any(1), Role.NEWLINE, Role.VISUAL)
    mass = np.full((steps, LAYERS, 2, len(SEGMENTS)), np.nan)
    mass[:, :, 1] = rng.dirichlet(np.ones(len(SEGMENTS)), (steps, LAYERS))
    return {
        "attention_mass": mass, "visual_importance": importance, "confidence": confidence,
        "entropy": np.where(np.isnan(confidence), np.nan, rng.uniform(0, 3, confidence.shape)),
        "commit_step": commit, "visual_tokens": (fates == Fate.KEPT).sum(-1), "visual_kept": fates,
        "visual_box": boxes(visual), "visual_role": role, "visual_view": (np.arange(visual) >= 4).astype(int),
        "seconds": rng.uniform(0, 0.2, (steps, len(PHASES))), "flops": rng.uniform(0, 2e9, (steps, len(PHASES))),
        "seconds_unrecorded": rng.uniform(0.5, 1), "flops_unrecorded": rng.uniform(1e9, 1e10),
    }  # fmt: skip


def write(
    path: Path, lengths: list[tuple[int, int]], *, visual: int = 24, failed: int = 0, without: tuple[str, ...] = (),
    recipe: str = "demo", dial: str = "{keep: 0.5}", heads: bool = False, default: str = "confidence", seed: int = 0,
    score: float | None = None, partial: bool = False, flops: float | None = None,
) -> Path:  # fmt: skip
    """A trace of samples with these (steps, positions), numbered 1, 3, 5, ... in the run, then `failed` failed ones."""
    rng = np.random.default_rng(seed)
    declared = [v for n, v in VARIABLES.items() if n not in without] + [BY_HEAD] * heads
    header = TraceHeader(
        recipe, f"schema: 1\nname: {recipe}\ndial: {dial}\n", f"hash{seed}", "org/Some-Model-8B", device="cpu",
        coords=COORDS, extra={"default_plot": default},
    )  # fmt: skip
    writer = TraceWriter(path, header, declared)
    for i, (steps, positions) in enumerate(lengths):
        values = {k: v for k, v in arrays(rng, steps, positions, visual).items() if k not in without}
        if flops is not None:
            values["flops_unrecorded"] = np.float64(flops)
        if heads:
            values[BY_HEAD.name] = np.repeat(values["attention_mass"][:, :, None], HEADS, 2) * [[[1.0]], [[0.5]]]
        writer.write(
            SampleRecord(
                2 * i + 1, f"s{i}", "world/colour", "Which colour has the left square?", ("red",), "red", "exact",
                float(rng.random()) if score is None else score, arrays=values, picture=png() if visual else None,
            )
        )  # fmt: skip
    for k in range(failed):
        writer.write(SampleRecord(2 * (len(lengths) + k) + 1, task="world/colour", failed="no such picture"))
    if partial:
        with pytest.raises(KeyboardInterrupt), writer:
            raise KeyboardInterrupt
        return path.with_name(path.name + ".partial")
    writer.close()
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of 2, 5 and 4 steps, and one that failed."""
    folder = tmp_path_factory.mktemp("mixed")
    return write(folder / "mixed.trace.h5", [(2, 2), (5, 10), (4, 9)], failed=1, heads=True)


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three samples of 4 steps each."""
    return write(tmp_path_factory.mktemp("even") / "even.trace.h5", [(4, 8)] * 3, seed=3)


def rows(path: Path, name: str) -> list[np.ndarray]:
    with open_trace(path) as trace:
        return [trace.row(name, i).astype(float) for i in range(trace.n_samples) if not trace.array("failed")[i]]


def panel(figure, label: str):
    return next(axes for axes in figure.get_axes() if axes.get_label() == label)


def texts(figure) -> list:
    """Every piece of text that is seen."""
    found = list(figure.texts)
    for axes in figure.get_axes():
        found += [c for c in axes.get_children() if hasattr(c, "get_fontsize")]
        legend = axes.get_legend()
        found += [*legend.get_texts(), legend.get_title()] if legend else []
        if not axes.axison:
            continue
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found.append(axis.label)
            for place, label in zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=False):  # none: hidden
                if low - 1e-9 <= place <= high + 1e-9:
                    found.append(label)
    return [t for t in found if t is not None and t.get_visible() and t.get_text().strip()]


def check_layout(figure) -> None:
    """No text over another, none cut off, none smaller than 8 points, and no legend over data, as it is saved."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        _check_layout(figure)


def _check_layout(figure) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    placed = []
    for text in texts(figure):
        box = text.get_window_extent(renderer)
        if text is figure._suptitle:  # its last lines are empty: they hold the place of the line below
            title = text.get_text().rstrip("\n")
            box = box.from_extents(box.x0, box.y1 - box.height / (1 + text.get_text().count("\n")), box.x1, box.y1)
            assert title
        placed.append((text.get_text().strip(), box))
        assert text.get_fontsize() >= 8
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, text
    for (a, one), (b, other) in itertools.combinations(placed, 2):
        width = min(one.x1, other.x1) - max(one.x0, other.x0)
        height = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert width <= 1 or height <= 2, f"{a!r} lies over {b!r}"
    for axes in figure.get_axes():
        if axes.get_legend() and axes.axison:
            legend, data = axes.get_legend().get_window_extent(renderer), axes.get_window_extent(renderer)
            assert legend.y0 >= data.y1 - 2 or legend.x0 >= data.x1 - 2


SINGLE = [name for name, figure in FIGURES.items() if not figure.many]

# ---------------------------------------------------------------- readable


@pytest.mark.parametrize("name", SINGLE)
def test_titles_tell_the_run_and_texts_do_not_collide(mixed: Path, name: str) -> None:
    figure = draw([mixed], name)
    words = " ".join(t.get_text() for t in texts(figure))
    assert "Some-Model-8B" in words and "demo" in words
    assert "n = 1" in words if name == "importance" else "n = 3 samples, 2 to 5 steps, 1 failed" in words
    assert any(f"`{variable}`" in figure._supxlabel.get_text() for variable in FIGURES[name].needs)
    check_layout(figure)


@pytest.mark.parametrize("name", SINGLE)
def test_one_sample_of_one_step(tmp_path: Path, name: str) -> None:
    check_layout(draw([write(tmp_path / "one.trace.h5", [(1, 1)])], name))


@pytest.mark.parametrize("name", SINGLE)
def test_two_steps_of_an_unfinished_run(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "two.trace.h5", [(2, 3), (2, 3)], partial=True, visual=4)
    assert path.exists()
    figure = draw([path], name)
    check_layout(figure)
    assert "unfinished" in " ".join(t.get_text() for t in figure.texts)


def test_long_samples_and_many_of_them(tmp_path: Path) -> None:
    path = write(tmp_path / "long.trace.h5", [(70, 64)] * 34 + [(3, 64)], visual=4)
    for name in ("attention_mass", "confidence", "commit_order", "retention", "cost"):
        check_layout(draw([path], name))


@pytest.mark.parametrize("name", ["attention_mass", "confidence", "commit_order", "cost"])
def test_without_visual_tokens(tmp_path: Path, name: str) -> None:
    check_layout(draw([write(tmp_path / "blind.trace.h5", [(2, 3), (3, 3)], visual=0)], name))


# ---------------------------------------------------------------- what is drawn is in the trace


def at_progress(values: list[np.ndarray], places: int, place: int) -> np.ndarray:
    """What each sample has at the middle of a place, told by going through its steps."""
    middle = (place + 0.5) / places
    return np.stack([next(v[s] for s in range(len(v)) if middle < (s + 1) / len(v)) for v in values])


def test_attention_mass_is_the_mean_of_the_answers_rows(mixed: Path) -> None:
    figure, rng = draw([mixed], "attention_mass"), np.random.default_rng(5)
    mass = [100 * v[:, :, 1] for v in rows(mixed, "attention_mass")]
    members = {"visual": [1, 2], "text": [0, 3], "answer": [4]}
    for _ in range(8):
        group, place, layer = rng.choice(list(members)), rng.integers(5), rng.integers(LAYERS)
        expected = at_progress(mass, 5, place)[:, layer, members[group]].sum(-1).mean()
        assert panel(figure, group).images[0].get_array()[layer, place] == pytest.approx(expected, rel=1e-5)
    line = panel(figure, "steps").get_lines()[0]
    assert line.get_xdata()[1] == pytest.approx(30)  # the middle of the second of five parts
    assert line.get_ydata()[1] == pytest.approx(at_progress(mass, 5, 1)[:, :, 1:3].sum(-1).mean(), rel=1e-5)
    line = panel(figure, "layers").get_lines()[2]
    assert line.get_ydata()[2] == pytest.approx(np.mean([v[:, 2, 4].mean() for v in mass]), rel=1e-5)
    by_head = panel(figure, "visual by head").images[0].get_array()
    expected = np.mean([v[:, 0, 1:3].sum(-1).mean() for v in mass])
    np.testing.assert_allclose(by_head[0], [expected, expected / 2], rtol=1e-5)


def test_attention_mass_of_one_sample_layer_and_step(mixed: Path) -> None:
    figure = draw([mixed], "attention_mass", sample=3, layer=1, step=-1)
    mass = 100 * rows(mixed, "attention_mass")[1][:, :, 1]
    np.testing.assert_allclose(panel(figure, "answer").images[0].get_array().T, mass[:, :, 4], rtol=1e-5)
    steps, layers = panel(figure, "steps").get_lines()[1], panel(figure, "layers").get_lines()[1]
    np.testing.assert_allclose(steps.get_xdata(), range(5))
    np.testing.assert_allclose(steps.get_ydata(), mass[:, 1, 0] + mass[:, 1, 3], rtol=1e-5)
    np.testing.assert_allclose(layers.get_ydata(), mass[4, :, 0] + mass[4, :, 3], rtol=1e-5)


def test_a_variable_with_heads_alone_is_averaged_over_them(tmp_path: Path) -> None:
    path = write(tmp_path / "h.trace.h5", [(2, 2)], without=("attention_mass",), heads=False)
    with pytest.raises(ProbeError, match=r"attention_mass.*probe run record/attention_mass"):
        draw([path], "attention_mass")
    header = TraceHeader("heads", "name: heads", "1", "mini", coords=COORDS)
    mass = np.random.default_rng(1).random((2, LAYERS, HEADS, 2, 5))
    with TraceWriter(tmp_path / "only.trace.h5", header, [BY_HEAD]) as writer:
        writer.write(SampleRecord(0, arrays={BY_HEAD.name: mass}))
    figure = draw([tmp_path / "only.trace.h5"], "attention_mass")
    expected = 100 * mass[:, :, :, 1, 4].mean(2).T
    np.testing.assert_allclose(panel(figure, "answer").images[0].get_array(), expected, rtol=1e-5)
    expected = 100 * mass[:, :, :, 1, 4].mean(0)
    np.testing.assert_allclose(panel(figure, "answer by head").images[0].get_array(), expected, rtol=1e-5)


def test_the_head_mean_form_says_so(tmp_path: Path) -> None:
    variable = Variable(
        "attention_mass", ("step", "layer", "segment", "segment_key"), "1", SAID.replace("softmax", "head_mean_logits")
    )
    header = TraceHeader("form", "name: form", "1", "mini", coords=COORDS)
    with TraceWriter(tmp_path / "form.trace.h5", header, [variable]) as writer:
        writer.write(SampleRecord(0, arrays={"attention_mass": np.full((2, LAYERS, 2, 5), 0.2)}))
    assert "mean of the heads' logits" in draw([tmp_path / "form.trace.h5"])._supxlabel.get_text()


@pytest.mark.parametrize("name", ["confidence", "entropy"])
def test_confidence_of_committed_and_of_masked_tokens(mixed: Path, name: str) -> None:
    values, commits = rows(mixed, name), rows(mixed, "commit_step")
    axes = panel(draw([mixed], "confidence"), name)
    committed, masked = (line.get_ydata() for line in axes.get_lines()[:2])
    for place in range(5):
        now, later = [], []
        for v, commit in zip(values, commits, strict=True):
            step = next(s for s in range(len(v)) if (place + 0.5) / 5 < (s + 1) / len(v))
            for position, c in enumerate(commit):
                if c == step:
                    now.append(v[step, position])
                elif c > step:
                    later.append(v[step, position])
        assert committed[place] == pytest.approx(np.median(now), rel=1e-5)
        if later:
            assert masked[place] == pytest.approx(np.median(later), rel=1e-5)
        else:
            assert np.isnan(masked[place])


def test_commit_order(mixed: Path) -> None:
    commits = rows(mixed, "commit_step")
    figure = draw([mixed], "commit_order")
    table = panel(figure, "samples").images[0].get_array()
    for i, commit in enumerate(commits):
        np.testing.assert_array_equal(table[i, : len(commit)], commit)
        assert np.ma.getmaskarray(table[i, len(commit) :]).all()
    counts = panel(figure, "counts").images[0].get_array().filled(0)
    assert counts.sum() == sum(map(len, commits))
    assert counts[int(commits[1][6]), 6] == sum(c[6] == commits[1][6] for c in commits if len(c) > 6)
    one = panel(draw([mixed], "commit_order", sample=3), "positions")
    np.testing.assert_array_equal(one.collections[0].get_offsets(), np.stack([np.arange(10), commits[1]], 1))


def test_retention(mixed: Path) -> None:
    figure = draw([mixed], "retention", layer=2)
    left = [100 * v / 24 for v in rows(mixed, "visual_tokens")]
    shown = panel(figure, "left").images[0].get_array()
    for place, layer in itertools.product(range(5), range(LAYERS)):
        assert shown[layer, place] == pytest.approx(at_progress(left, 5, place)[:, layer].mean())
    fates = rows(mixed, "visual_kept")
    bars = {c.get_label(): [b.get_height() for b in c] for c in panel(figure, "fates over steps").containers}
    assert set(bars) == {"kept", "dropped", "merged"}
    for fate in (Fate.KEPT, Fate.DROPPED, Fate.MERGED):
        expected = [100 * (at_progress(fates, 5, p)[:, 2] == fate).mean() for p in range(5)]
        np.testing.assert_allclose(bars[fate.name.lower()], expected)
    bars = {c.get_label(): [b.get_height() for b in c] for c in panel(figure, "fates over layers").containers}
    expected = [np.mean([100 * (v[:, k] == Fate.DROPPED).mean() for v in fates]) for k in range(LAYERS)]
    np.testing.assert_allclose(bars["dropped"], expected)


def test_importance_is_painted_where_the_tokens_are(mixed: Path) -> None:
    figure = draw([mixed], "importance", sample=3, layer=1, step=2)
    values, box = rows(mixed, "visual_importance")[1][2, 1], boxes(24)
    axes = panel(figure, "tiles (finer) at step 2")
    painted = next(c for c in axes.collections if c.get_array() is not None)
    tiles = [k for k in range(4, 24) if not np.isnan(box[k]).any() and not np.isnan(values[k])]
    np.testing.assert_allclose(painted.get_array(), values[tiles])
    for path, k in zip(painted.get_paths(), tiles, strict=True):
        np.testing.assert_allclose(path.get_extents().extents, box[k])
    assert panel(figure, "kept at step 2").get_title(loc="left") == "12 of 24 visual tokens left"
    assert panel(draw([mixed], "importance"), "whole picture at step 1") is not None  # the last step of sample 1


def test_cost_by_phase_and_step(mixed: Path) -> None:
    figure = draw([mixed], "cost")
    for name in ("seconds", "flops"):
        values = rows(mixed, name)
        bars = {c.get_label(): [b.get_height() for b in c] for c in panel(figure, name).containers}
        for phase, step in ((1, 0), (2, 3), (4, 4)):
            expected = np.mean([v[step, phase] for v in values if len(v) > step])
            assert bars[PHASES[phase]][step] == pytest.approx(expected)
    seconds = rows(mixed, "seconds")
    total = {c.get_label(): [b.get_width() for b in c] for c in panel(figure, "total").containers}
    expected = 100 * sum(v[:, 3].sum() for v in seconds) / sum(v.sum() for v in seconds)
    assert total["sampler"][0] == pytest.approx(expected)
    assert [b.get_height() for b in panel(figure, "samples").patches] == [3, 3, 2, 2, 1]


def test_steps_of_one_number_are_not_turned_into_shares(even: Path) -> None:
    figure = draw([even], "attention_mass")
    np.testing.assert_array_equal(panel(figure, "steps").get_lines()[0].get_xdata(), range(4))
    assert panel(figure, "steps").get_xlabel() == "denoising step"


# ---------------------------------------------------------------- several runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    made = [("fastv", 0.5), ("fastv", 0.25), ("divprune", 0.5), ("fastv/baseline", 0.5)]
    return [
        write(folder / f"{i}.trace.h5", [(2, 2)] * 4, recipe=r, dial=f"{{keep: {k}, layer: 2}}", seed=i, visual=4)
        for i, (r, k) in enumerate(made)
    ]


def test_tradeoff_points_and_front(runs: list[Path]) -> None:
    figure = draw(runs)
    check_layout(figure)
    legend = next(a.get_legend() for a in figure.get_axes() if a.get_legend())
    words = [t.get_text() for t in legend.get_texts()]
    assert words[:4] == ["fastv  keep 0.5", "fastv  keep 0.25", "divprune", "fastv/baseline"]
    scores, flops = ([np.mean(rows(p, n)) for p in runs] for n in ("score", "flops_unrecorded"))
    axes = panel(figure, "flops")
    for container, x, path in zip(axes.containers, flops, runs, strict=True):
        point, _, bars = container
        score = np.array(rows(path, "score"))
        half = 1.96 * score.std(ddof=1) / np.sqrt(len(score))
        assert (point.get_xdata()[0], point.get_ydata()[0]) == pytest.approx((x, score.mean()))
        low, high = bars[0].get_segments()[0][:, 1]
        assert (low, high) == pytest.approx((score.mean() - half, score.mean() + half))
    front = next(line for line in axes.get_lines() if line.get_label() == "Pareto front")
    best = [i for i in range(4) if not any(flops[j] < flops[i] and scores[j] > scores[i] for j in range(4))]
    assert sorted(front.get_xdata()) == pytest.approx(sorted(flops[i] for i in best))
    assert (np.diff(front.get_xdata()) >= 0).all() and (np.diff(front.get_ydata()) >= 0).all()


@pytest.mark.parametrize("most", [9.9e9, 1.82e10, 1.37e15])
def test_ticks_of_costs_have_room(tmp_path: Path, most: float) -> None:
    paths = [write(tmp_path / f"{i}.trace.h5", [(1, 1)], seed=i, visual=4, flops=most / (i + 1)) for i in range(2)]
    check_layout(draw(paths))


def test_many_runs_have_looks_of_their_own(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / f"{i}.trace.h5", [(1, 1)] * 2, recipe=f"recipe-{i % 9}", dial=f"{{k: {i}}}", seed=i, visual=4)
        for i in range(18)
    ]
    figure = draw(paths, "tradeoff")
    check_layout(figure)
    legend = next(a.get_legend() for a in figure.get_axes() if a.get_legend())
    looks = [(h.get_color(), h.get_marker()) for h in legend.legend_handles[:18]]
    assert len(set(looks)) == 18
    assert len({t.get_text() for t in legend.get_texts()}) == 19


def test_pareto_front_by_hand() -> None:
    from probe.views.figure_cost import pareto

    assert pareto([1, 2, 3, 4, np.nan], [0.1, 0.5, 0.4, 0.9, 1.0]) == [0, 1, 3]
    assert pareto([1, 1, 1], [0.2, 0.7, 0.7]) == [1, 2]


def test_runs_without_scores_are_refused(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.trace.h5", [(1, 1)], score=float("nan"), seed=i) for i in range(2)]
    with pytest.raises(ProbeError, match="has a score"):
        draw(paths, "tradeoff")


# ---------------------------------------------------------------- files, defaults, mistakes


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_files_by_ending_are_the_same_every_time(even: Path, tmp_path: Path, ending: str) -> None:
    first, second = (plot([even], "retention", tmp_path / f"{n}.{ending}").read_bytes() for n in "ab")
    assert first == second
    assert first.startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[ending])


def test_pictures_are_wide_enough(even: Path, tmp_path: Path) -> None:
    assert Image.open(plot([even], "cost", tmp_path / "a.png")).width >= 1000


def test_the_default_is_what_the_trace_asks_for(even: Path, tmp_path: Path) -> None:
    with open_trace(even) as trace:
        assert figures.default_figure(trace) == "confidence"
    for asked, without, expected in (
        ("attention_mass", ("attention_mass",), "confidence"),
        ("visual_importance", (), "importance"),
        ("something", (), "attention_mass"),
    ):
        path = write(tmp_path / f"{asked}.trace.h5", [(1, 1)], default=asked, without=without)
        with open_trace(path) as trace:
            assert figures.default_figure(trace) == expected


def test_the_list_names_every_figure() -> None:
    assert [name for name, _ in list_figures()] == [
        "attention_mass", "confidence", "commit_order", "retention", "importance", "cost", "tradeoff",
        "late_pruning",
    ]  # fmt: skip
    assert all(len(said) < 110 for _, said in list_figures())


def test_mistakes_are_told_in_words(even: Path, mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    for said, call in {
        r"no figure is called `retantion`; did you mean `retention`": lambda: plot([even], "retantion", out),
        r"ends in \.png, \.pdf, \.svg": lambda: plot([even], "cost", tmp_path / "a.bmp"),
        r"create .*nowhere first": lambda: plot([even], "cost", tmp_path / "nowhere" / "a.png"),
        r"has no sample 2; it holds 1, 3, 5": lambda: plot([even], "cost", out, sample=2),
        r"sample 7: it failed \(no such picture\)": lambda: plot([mixed], "cost", out, sample=7),
        r"no layer 9; layers are 0 to 2": lambda: plot([even], "retention", out, layer=9),
        r"no step -5; steps are 0 to 3": lambda: plot([even], "importance", out, step=-5),
        r"no choice of layer; leave out --layer": lambda: plot([even], "cost", out, layer=1),
        r"draws one trace, and 2 were given": lambda: plot([even, mixed], "cost", out),
        r"give two traces or more": lambda: plot([even], "tradeoff", out),
        r"at least one file": lambda: plot([], None, out),
    }.items():
        with pytest.raises(ProbeError, match=said):
            call()
    assert not out.exists()


def test_traces_with_nothing_to_draw(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.trace.h5", [])
    failed = write(tmp_path / "failed.trace.h5", [], failed=2)
    blind = write(tmp_path / "blind.trace.h5", [(2, 2)], visual=0)
    poor = write(tmp_path / "poor.trace.h5", [(2, 2)], without=("visual_importance", "seconds"))
    for said, path, name in (
        ("holds no samples", empty, None),
        ("all 2 samples failed", failed, "cost"),
        ("no sample has visual tokens", blind, "retention"),
        ("nothing to paint on", blind, "importance"),
        ("needs the variable `visual_importance`; record it: `probe run record/visual_importance`", poor, "importance"),
        ("needs the variable `seconds`; every `probe run` records it", poor, "cost"),
    ):
        with pytest.raises(ProbeError, match=said):
            draw([path], name)


def test_without_matplotlib_the_message_says_what_to_install(even: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ProbeError, match=r"pip install 'dmllm-probe\[plot\]'"):
        plot([even], "cost", Path("a.png"))


def test_importing_the_page_of_figures_does_not_import_matplotlib() -> None:
    import subprocess

    code = "import sys, probe.views.figures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0


def test_roles_that_stand_side_by_side_differ_in_colour() -> None:
    from probe.views.figure_style import ROLE_COLOURS

    together = [
        ("visual", "text", "answer"), ("committed", "masked"), tuple(PHASES), tuple(f.name.lower() for f in Fate),
    ]  # fmt: skip
    for roles in together:
        assert len({ROLE_COLOURS[r] for r in roles}) == len(roles)


# ---------------------------------------------------------------- the page


def fenced(language: str) -> list[str]:
    return [part.split("```", 1)[0] for part in PAGE.read_text().split(f"```{language}\n")[1:]]


def test_every_command_of_the_page_draws_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from probe.__main__ import load_cli

    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(REPO / "recipes")
    commands = [shlex.split(line) for block in fenced("sh") for line in block.splitlines()]
    assert {name for words in commands for name in words} >= {*SINGLE}
    cli = load_cli()
    for words in commands:
        if words[1] == "run":
            limit = "4" if "quickstart" in words else "1"  # the page looks at sample 3 of that run
            words = [limit if before == "--limit" else word for before, word in zip(["", *words], words, strict=False)]
            words += [] if "--limit" in words else ["--limit", limit]
            words += ["--set", "generate.gen_length=8", "--set", "generate.steps=4"]  # short answers will do
        if words[1] == "sweep":
            words += ["--limit", "1", "--set", "sweep.data=world/short", "--set", "sweep.backbones=miniature"]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            cli.main()
            raise SystemExit(0)
        assert not end.value.code, words
        if "-o" in words:
            made = Path(words[words.index("-o") + 1])
            assert made.stat().st_size > 5000
            if made.suffix == ".png":
                assert Image.open(made).width >= 1000
    for code in fenced("python"):
        exec(compile(code, "page", "exec"), {})
    assert Path("retention.pdf").exists()


def test_every_figure_has_a_picture_on_the_page() -> None:
    for name in FIGURES:
        assert f"## {name}: " in PAGE.read_text()
        with Image.open(PAGE.parent / "figures" / f"{name}.png") as image:
            assert image.width == 1000


def test_an_open_trace_draws_itself(mixed: Path) -> None:
    from matplotlib.figure import Figure

    with open_trace(mixed) as trace:
        figure = trace.plot("retention")
        assert isinstance(figure, Figure)
        with pytest.raises(ProbeError, match="retention"):
            trace.plot("retentoin")
