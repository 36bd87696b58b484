"""How every figure looks: colours by role, type sizes, title, small print. Matplotlib is imported in functions only.

Colours are Okabe-Ito's (Okabe & Ito 2008, eight colours that differ for every kind of colour vision) for kinds, and
`cividis` for amounts. A role has the same colour in every figure.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.errors import ProbeError
from probe.trace_reader import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

ORANGE, SKY, GREEN = "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#8A8A8A"
INK, FAINT = "#222222", "#555555"
NOTHING = "#E4E4E4"
"""Where there is no value."""

ROLE_COLOURS: dict[str, str] = {
    # key segments of attention
    "visual": ORANGE,
    "text": BLUE,
    "answer": GREEN,
    # answer tokens while decoding
    "committed": GREEN,
    "masked": PURPLE,
    # fates of a visual token (`masked` is the one above)
    "kept": ORANGE,
    "dropped": GREY,
    "merged": SKY,
    "withdrawn": BLUE,
    "skipped": VERMILION,
    "evicted": GREEN,
    # phases of a pass
    "encode": ORANGE,
    "backbone": BLUE,
    "head": SKY,
    "sampler": GREEN,
    "probe": PURPLE,
}
"""What has a colour of its own, in every figure."""

SERIES = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, INK)
"""Colours of things that have no role, such as runs."""

AMOUNTS = "cividis"
"""Colour map of amounts: even in lightness, and alike for every kind of colour vision."""

STYLE: Any = {  # matplotlib types the keys as a literal of its own
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so that figures are alike everywhere
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "lines.linewidth": 2.0,
    "lines.markersize": 4.5,
    "savefig.facecolor": "white",
    "svg.hashsalt": "probe",  # the same figure is the same file
    "svg.fonttype": "none",
}

WIDTH = 10.0
"""Inches. The smallest type (9 pt) is 12 pixels high where the figure is shown 1,000 pixels wide."""

DPI = 150


def need_matplotlib() -> None:
    """Say what to install, if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ProbeError("figures need matplotlib: pip install 'dmllm-probe[plot]'") from error


def new_figure(height: float) -> Figure:
    """An empty figure that lays itself out; no window, no global state."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    engine = ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.07)
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout=engine)


def head(figure: Figure, title: str, about: str) -> None:
    """What the figure shows, and of which run."""
    lines = textwrap.wrap(about, 130) or [""]
    # the layout makes room for the title alone: empty lines of it hold the place of the smaller ones
    figure.suptitle(title + "\n" * len(lines), x=0.012, ha="left", fontsize=14, fontweight="bold", linespacing=1.15)
    below = 1 - 0.385 / figure.get_figheight()
    figure.text(0.012, below, "\n".join(lines), ha="left", va="top", fontsize=10, color=FAINT, linespacing=1.35)


def small_print(figure: Figure, lines: Sequence[str]) -> None:
    """Which variables of the trace are drawn, and how they were averaged."""
    wrapped = [part for line in lines for part in textwrap.wrap(line, 150)]
    figure.supxlabel("\n".join(wrapped), x=0.012, ha="left", fontsize=8.5, color=FAINT, linespacing=1.35)


def backbone_name(source: str) -> str:
    """A Hub id as it is; of a folder, its name."""
    return Path(source).name if source.startswith((".", "/", "~")) else source or "unknown backbone"


def run_words(trace: Trace) -> str:
    """`miniature · recipe quickstart`."""
    state = " · unfinished run" if trace.partial else ""
    return f"{backbone_name(trace.header.backbone)} · recipe {trace.header.recipe_name or 'unknown'}{state}"


def whole_numbers(axis: Any, most: int = 8) -> None:
    """Ticks at whole numbers only, `most` + 1 at most."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=most))


def heat_map(axes: Axes, values: np.ndarray, extent: Sequence[float], low: float, high: float) -> AxesImage:
    """`values (row, column)`, row 0 at the bottom; grey where there is no value."""
    axes.set_facecolor(NOTHING)
    image = axes.imshow(
        np.ma.masked_invalid(values),
        extent=(extent[0], extent[1], extent[2], extent[3]),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap=AMOUNTS,
        vmin=low,
        vmax=high,
    )
    axes.spines[:].set_visible(False)
    return image
