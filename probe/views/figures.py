"""`probe plot`: what a trace holds as figures. One function per figure; this page names them and saves them.

`draw` gives a matplotlib figure (for a notebook), `plot` a file. Every number drawn is a variable of the trace, or a
mean or quantile of one; the small print says of which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.errors import ProbeError
from probe.registry import nearest
from probe.trace import open_trace
from probe.trace_reader import Trace
from probe.views.figure_attention import attention_mass
from probe.views.figure_cost import cost, tradeoff
from probe.views.figure_data import Wanted, variables_like
from probe.views.figure_decoding import commit_order, confidence
from probe.views.figure_late import late_pruning
from probe.views.figure_style import STYLE, need_matplotlib
from probe.views.figure_visual import importance, retention

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MplFigure


@dataclass(frozen=True)
class Figure:
    """A figure: what it shows, how it is drawn, the variables it needs, and which of sample, layer, step it takes.

    `function(trace, wanted)` draws one trace, `function(traces, wanted)` several if `many`. `recipe` is the shipped
    recipe that records what it needs; empty: every run does.
    """

    description: str
    function: Callable[[Any, Wanted], MplFigure]
    needs: tuple[str, ...]
    takes: tuple[str, ...] = ("sample",)
    recipe: str = ""
    many: bool = False


FIGURES: Mapping[str, Figure] = {
    "attention_mass": Figure(
        "attention of the answer to picture, text and itself, per layer and step (the study's figure 2)",
        attention_mass, ("attention_mass",), ("sample", "layer", "step"), "record/attention_mass",
    ),
    "confidence": Figure(
        "confidence of committed and of still masked tokens over steps; entropy and margin if recorded",
        confidence, ("confidence", "commit_step"),
    ),
    "commit_order": Figure(
        "which position of the answer is committed at which step", commit_order, ("commit_step",),
    ),
    "retention": Figure(
        "visual tokens that are left, per layer and step, and what became of the others",
        retention, ("visual_tokens",), ("sample", "layer", "step"),
    ),
    "importance": Figure(
        "attention that each visual token receives, painted on the picture, with what was kept",
        importance, ("visual_importance", "visual_box"), ("sample", "layer", "step"), "record/visual_importance",
    ),
    "cost": Figure("time and FLOPs by phase, in all and per step", cost, ("seconds", "flops")),
    "tradeoff": Figure(
        "score against FLOPs, seconds and visual tokens of several runs, with the Pareto front",
        tradeoff, ("score", "visual_tokens", "flops_unrecorded", "seconds_unrecorded"), (), many=True,
    ),
    "late_pruning": Figure(
        "score left when pruning begins with the first step, and when later (the study's figure 1)",
        late_pruning, ("score", "visual_tokens"), (), many=True,
    ),
}  # fmt: skip
"""Every figure by name."""

ENDINGS = (".png", ".pdf", ".svg")


def list_figures() -> list[tuple[str, str]]:
    """Names, and what each shows in one line."""
    return [(name, figure.description) for name, figure in FIGURES.items()]


def plot(
    traces: Sequence[str | Path],
    figure: str | None,
    out: Path,
    *,
    sample: int | None = None,
    layer: int | None = None,
    step: int | None = None,
) -> Path:
    """Draw a figure into a file; its ending says which kind. Without a name: the trace's own default."""
    out = Path(out)
    if out.suffix.lower() not in ENDINGS:
        raise ProbeError(f"cannot write {out.name}: a figure ends in {', '.join(ENDINGS)}")
    if out.parent != Path() and not out.parent.is_dir():
        raise ProbeError(f"cannot write {out}: create {out.parent} first")
    need_matplotlib()
    import matplotlib

    drawn = draw(traces, figure, sample=sample, layer=layer, step=step)
    # dates would make two files of one figure differ
    metadata = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(out.suffix.lower())
    with matplotlib.rc_context(STYLE):
        try:
            drawn.savefig(out, metadata=metadata)
        except OSError as error:
            raise ProbeError(f"cannot write {out}: {error.strerror or error}") from error
    return out


def draw(
    traces: Sequence[str | Path],
    figure: str | None = None,
    *,
    sample: int | None = None,
    layer: int | None = None,
    step: int | None = None,
) -> MplFigure:
    """A figure as matplotlib's own object, which a notebook shows."""
    need_matplotlib()
    import matplotlib

    if figure is not None and figure not in FIGURES:
        raise ProbeError(f"no figure is called `{figure}`; {nearest(figure, list(FIGURES))}")
    if not traces:
        raise ProbeError("no trace to draw: give at least one file")
    wanted = Wanted(sample, layer, step)
    with ExitStack() as stack:
        opened = [stack.enter_context(open_trace(path)) for path in traces]
        name = figure or ("tradeoff" if len(opened) > 1 else default_figure(opened[0]))
        chosen = FIGURES[name]
        for option in ("sample", "layer", "step"):
            if getattr(wanted, option) is not None and option not in chosen.takes:
                raise ProbeError(f"the figure `{name}` has no choice of {option}; leave out --{option}")
        if len(opened) > 1 and not chosen.many:
            raise ProbeError(f"the figure `{name}` draws one trace, and {len(opened)} were given")
        if len(opened) < 2 and chosen.many:
            raise ProbeError(f"the figure `{name}` compares runs: give two traces or more")
        for trace in opened:
            _check(trace, name, chosen)
        with matplotlib.rc_context(STYLE):
            result = chosen.function(opened if chosen.many else opened[0], wanted)
            for _ in range(2):  # lays out while the style holds; the second time with the first one's tick labels
                result.draw_without_rendering()
        return result


def default_figure(trace: Trace) -> str:
    """The figure that the trace asks for, or the one of that variable; if it cannot be drawn, the first that can."""
    asked = str(trace.attrs.get("default_plot", ""))
    can = [name for name, figure in FIGURES.items() if not figure.many and not _missing(trace, figure)]
    if not can:
        raise ProbeError(f"{trace.path.name} has no variable that a figure shows; `probe show {trace.path}` lists them")
    return next((name for name in can if name == asked or asked in FIGURES[name].needs), can[0])


def _missing(trace: Trace, figure: Figure) -> list[str]:
    # signals may be recorded under longer names (`as: attention_mass_masked`)
    return [n for n in figure.needs if n not in trace.variables and not (figure.recipe and variables_like(trace, n))]


def _check(trace: Trace, name: str, figure: Figure) -> None:
    if not trace.n_samples:
        raise ProbeError(f"{trace.path.name}: nothing to draw: it holds no samples")
    missing = _missing(trace, figure)
    if missing:
        right = (
            f"record it: `probe run {figure.recipe}`, or add `record: [{missing[0]}]` to a probe of your recipe"
            if figure.recipe
            else "every `probe run` records it, so this trace comes from elsewhere"
        )
        raise ProbeError(f"{trace.path.name}: the figure `{name}` needs the variable `{missing[0]}`; {right}")
