"""What `probe show` prints: a trace on one screen, or a part of one variable as numbers, a heat map, CSV or JSON.

Every cell of a map has a character that says its level, so that it reads without colour. Colours go from blue to
orange, which differ for everyone and stand out on dark and on light terminals.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.style import Style
from rich.table import Table
from rich.text import Text

from probe.trace_reader import Trace
from probe.trace_schema import Variable
from probe.views.selection import CODES_WITHOUT_NAMES, Pick, Selection, select

LEVELS = "▁▂▃▄▅▆▇█"
CODES = "█·▒░×o+#%&"
MISSING = " "
_BLUE_TO_ORANGE = ("#2f6fb7", "#4a7fb5", "#668bab", "#83908f", "#a09070", "#bd904b", "#d68c26", "#e68600")
_OKABE_ITO = ("#009e73", "#56606b", "#e69f00", "#56b4e9", "#d55e00", "#cc79a7", "#f0e442", "#0072b2")
_MOST_ROWS = 60  # of a map or a table; more are averaged, or cut
_SAMPLED = 64  # rows of the file that the summary's statistics read, at most

# -------------------------------------------------------------------- the whole trace


def render_summary(trace: Trace) -> RenderableType:
    """The run in numbers, then its variables. Works on partial and on odd files."""
    numbers = trace.summary()
    head = trace.header
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    size = trace.path.stat().st_size
    state = "partial: the run has not finished" if trace.partial else "finished"
    facts.add_row("trace", Text(f"{trace.path}  ({_amount(size, 'byte')}, {state})"))
    words = [f"hash {head.recipe_hash[:12]}" if head.recipe_hash else "", f"seed {head.seed}", head.created]
    facts.add_row("recipe", Text(_joined(head.recipe_name, words)))
    words = [head.weights_revision and f"revision {head.weights_revision[:12]}", head.dtype, head.attention_kernel]
    facts.add_row("backbone", Text(_joined(head.backbone, [*words, head.device])))
    tasks = ", ".join(t for t in numbers["tasks"] if t)
    failed = f", {numbers['n_failed']} failed" if numbers["n_failed"] else ""
    facts.add_row("samples", Text(f"{numbers['n_samples']}{failed}{f'  ({tasks})' if tasks else ''}"))
    facts.add_row("score", _score(numbers))
    for name, text in (("time", _time(numbers)), ("compute", _compute(numbers)), ("visual", _visual(numbers))):
        if text:
            facts.add_row(name, text)
    reasons = sorted({str(r) for r in trace.array("failed") if r}) if numbers["n_failed"] else []
    for reason in reasons[:3]:
        facts.add_row("failure", Text(reason, style="red"))
    return Group(facts, Text(), VariableTable(trace))


def _joined(first: str, rest: Sequence[str]) -> str:
    known = [r for r in rest if r]
    return f"{first or 'unknown'}  ({', '.join(known)})" if known else first or "unknown"


def _score(numbers: Mapping[str, Any]) -> Text:
    if numbers["mean_score"] is None:
        return Text("none (no sample has a reference)", style="dim")
    text = Text(f"{numbers['mean_score']:.3f}")
    if numbers["score_interval"]:
        low, high = numbers["score_interval"]
        text.append(f" ± {(high - low) / 2:.3f}  (95 % interval {low:.3f} to {high:.3f}, ")
    else:
        text.append("  (")
    metrics = ", ".join(m for m in numbers["metrics"] if m)
    return text.append(f"{metrics}{', ' if metrics else ''}n = {numbers['n_scored']})")


def _time(numbers: Mapping[str, Any]) -> str:
    if numbers["seconds_per_sample"] is None:
        return ""
    return f"{numbers['seconds_per_sample']:.3g} s per sample, {numbers['seconds_total']:.3g} s in all"


def _compute(numbers: Mapping[str, Any]) -> str:
    parts = []
    if numbers["flops_per_sample"] is not None:
        parts.append(f"{_amount(numbers['flops_per_sample'], 'FLOP')} per sample")
    if numbers["peak_memory"]:
        parts.append(f"at most {_amount(numbers['peak_memory'], 'byte')} of memory")
    return ", ".join(parts)


def _visual(numbers: Mapping[str, Any]) -> str:
    if numbers["retention"] is None:
        return ""
    kept = f"{100 * numbers['retention']:.3g} % kept on average over steps and layers"
    return f"{numbers['visual_tokens']:.4g} tokens per sample, {kept}"


@dataclass(frozen=True)
class VariableTable:
    """The variables of a trace; on a wide terminal also what they are."""

    trace: Trace

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One line per variable, if the width allows."""
        trace, wide = self.trace, options.max_width >= 140
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        table.add_column("variable", no_wrap=True)
        table.add_column("axes (longest)", overflow="fold", no_wrap=wide)
        table.add_column("unit", overflow="fold", max_width=12)
        for name in ("min", "mean", "max"):
            table.add_column(name, justify="right", no_wrap=True)
        if wide:
            table.add_column("what it is", overflow="fold")
        rows = np.unique(np.linspace(0, max(0, trace.n_samples - 1), _SAMPLED).astype(int)).tolist()
        rows = rows[: trace.n_samples]
        for name, variable in trace.variables.items():
            axes = ", ".join(f"{axis}\N{NO-BREAK SPACE}{trace.axes.get(axis, '?')}" for axis in variable.dims)
            unit = "" if variable.units == "1" else variable.units
            cells = [name, axes or "—", unit, *_statistics(trace, variable, rows)]
            table.add_row(*map(Text, [*cells, variable.long_name] if wide else cells))
        note = f"mean: of the samples' own means. One variable: probe show {trace.path} NAME"
        if trace.n_samples > len(rows):
            note += f"\nStatistics are over {len(rows)} of the {trace.n_samples} samples."
        yield table
        yield Text()
        yield Text(note, style="dim")


def _statistics(trace: Trace, variable: Variable, rows: Sequence[int]) -> tuple[str, str, str]:
    """Least value, mean over samples of each one's mean, greatest; of codes with names, the share of the first."""
    try:
        recorded = [r for r in rows if trace.checksums(r).get(variable.name, 0) >= 0]
        parts = [np.ravel(trace.row(variable.name, r)).astype(float) for r in recorded]
    except Exception:  # an odd or damaged variable must not hide the others; `probe verify` says what is wrong
        return "?", "unreadable", "?"
    flags = variable.flags or {}
    parts = [p[~np.isnan(p)] if not flags else p[p != variable.fill_value] for p in parts]
    parts = [p for p in parts if len(p)]
    if not parts:
        return "", "no values", ""
    if flags:
        name, code = next(iter(flags.items()))
        return "", f"{100 * float(np.mean([np.mean(p == code) for p in parts])):.1f} % {name}", ""
    with np.errstate(invalid="ignore"):  # infinities
        mean = float(np.mean([p.mean() for p in parts]))
    least, most = min(float(p.min()) for p in parts), max(float(p.max()) for p in parts)
    return _number(least), "" if variable.name in CODES_WITHOUT_NAMES else _number(mean), _number(most)


_PREFIXES = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def _number(value: float) -> str:
    """Three or four digits: `0.4963`, `12.3`, `125923`, `4.99 T`, `1.6e-05`."""
    if not math.isfinite(value):
        return "—" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if abs(value) >= 1e6:
        prefix, size = next((p, s) for p, s in _PREFIXES if abs(value) >= s)
        return f"{value / size:.3g} {prefix}"
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.2g}"


def _amount(value: float, unit: str) -> str:
    """`1.24 TFLOP`, `3.1 MB`."""
    short = "B" if unit == "byte" else unit
    prefix, size = next(((p, s) for p, s in _PREFIXES if value >= s), ("", 1.0))
    return f"{value / size:.3g} {prefix}{short}"


# -------------------------------------------------------------------- one variable


def render_variable(
    trace: Trace,
    name: str,
    sample: Pick = None,
    step: Pick = None,
    layer: Pick = None,
    head: Pick = None,
    mean: Sequence[str] = (),
    at: Mapping[str, Pick] | None = None,
) -> RenderableType:
    """A part of a variable: a value, a list, a table where numbers fit, else a heat map.

    Axes beyond two are averaged away, and the title says so; of codes (fates, tokens) the first place is shown.
    """
    chosen = select(trace, name, sample=sample, step=step, layer=layer, head=head, mean=mean, at=at)
    if chosen.is_text:
        return Group(_title(trace, chosen), Text(), _texts(chosen))
    chosen = flatten(chosen)
    body: RenderableType
    if not chosen.values.size or np.ma.getmaskarray(chosen.values).all():
        body = Text("No values: nothing was recorded here." + _failures(trace, sample), style="dim")
    elif not chosen.dims:
        value = chosen.values.item()
        unit = "" if chosen.variable.units in ("", "1") else f" {chosen.variable.units}"
        body = Text(chosen.flags.get(value, str(value)) if chosen.flags else f"{_number(float(value))}{unit}", "bold")
    else:
        body = Grid(chosen)
    return Group(_title(trace, chosen), Text(), body)


def _failures(trace: Trace, sample: Pick) -> str:
    """Why the picked samples have no values, if they failed."""
    reasons = np.atleast_1d(np.ma.getdata(select(trace, "failed", sample=sample).values)).tolist()
    known = sorted({str(r) for r in reasons if r})
    return f" Failed: {'; '.join(known[:3])}." if known else ""


def flatten(chosen: Selection) -> Selection:
    """At most two axes with more than one place: axes of one place go first, then by mean or, of codes, the first."""
    for axis in [a for a, n in zip(chosen.dims, chosen.values.shape, strict=True) if n == 1]:
        if len(chosen.dims) > 1:
            chosen = chosen.drop(axis, 0)
    order = ("sample", "head", "segment", "phase", "corner", "layer", "step")
    while len(chosen.dims) > 2:
        axis = next((a for a in order if a in chosen.dims), chosen.dims[0])
        chosen = trimmed(chosen.drop(axis, 0)) if chosen.is_code else chosen.mean(axis)
    return chosen


def trimmed(chosen: Selection) -> Selection:
    """Without places at the end of an axis that only other samples have."""
    known = ~np.ma.getmaskarray(chosen.values)
    for k, axis in enumerate(chosen.dims):
        there = np.flatnonzero(known.any(axis=tuple(j for j in range(known.ndim) if j != k)))
        length = int(there[-1]) + 1 if len(there) else 0
        values = np.ma.MaskedArray(chosen.values.take(range(length), axis=k))
        known = known.take(range(length), axis=k)
        chosen = replace(chosen, values=values, labels={**chosen.labels, axis: chosen.labels[axis][:length]})
    return chosen


def _title(trace: Trace, chosen: Selection) -> Text:
    variable = chosen.variable
    text = Text(variable.name, style="bold")
    unit = f" [{variable.units}]" if variable.units not in ("", "1") else ""
    text.append(f"{unit}  {variable.long_name}", style="not bold")
    picked = [n for n in chosen.notes if not n.startswith("mean over ")]
    averaged = [n.removeprefix("mean over ") for n in chosen.notes if n.startswith("mean over ")]
    parts = [*picked, f"mean over {', '.join(averaged)}"] if averaged else picked
    lines = [f"{trace.path.name}{' (partial)' if trace.partial else ''}: " + ("; ".join(parts) or "all samples")]
    if chosen.dims:
        axes = [f"{a} ({n})" for a, n in zip(chosen.dims, chosen.values.shape, strict=True)]
        lines[0] += f"; shown: {' by '.join(axes)}"
    known = np.ma.compressed(chosen.values) if not chosen.is_text and not chosen.is_code else np.zeros(0)
    if known.size > 1:
        with np.errstate(invalid="ignore"):
            least, mean, most = (_number(float(f(known))) for f in (np.min, np.mean, np.max))
        lines.append(f"least {least}, mean {mean}, greatest {most}")
    if variable.formula:
        lines.append(f"formula: {variable.formula}")
    for line in lines:
        text.append(f"\n{line}", style="dim not bold")
    return text


def _texts(chosen: Selection) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for axis in chosen.dims:
        table.add_column(axis, justify="right", no_wrap=True)
    table.add_column(chosen.variable.name, overflow="fold", ratio=1)
    for where, text in _tidy(chosen):
        table.add_row(*where, Text(str(text)))
    return table


# -------------------------------------------------------------------- tables and maps


@dataclass(frozen=True)
class Grid:
    """One or two axes, drawn as wide as the terminal is: numbers if they fit, else one character per cell."""

    chosen: Selection

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Decide by the width that there is."""
        chosen, width = self.chosen, options.max_width
        values = np.ma.MaskedArray(chosen.values)
        rows_axis, columns_axis = chosen.dims if len(chosen.dims) == 2 else (chosen.dims[0], "")
        row_labels = list(chosen.labels[rows_axis])
        if not columns_axis:
            values, columns = values[:, None], [chosen.variable.name]
        else:
            columns = list(chosen.labels[columns_axis])
        if len(values) <= _MOST_ROWS:
            form = _form(values)
            cells = [[self._cell(v, form) for v in row] for row in values.tolist()]
            widths = [max(len(c), *(len(row[k]) for row in cells)) for k, c in enumerate(columns)]
            total = max(len(rows_axis), *map(len, row_labels)) + sum(w + 4 for w in widths)
            if total <= width:
                yield from self._numbers(values, cells, row_labels, columns, rows_axis, columns_axis)
                return
        if not columns_axis:
            yield from self._wrapped(chosen, width)
        else:
            yield from self._map(values, row_labels, columns, rows_axis, columns_axis, width)

    def _cell(self, value: float | None, form: str) -> str:
        if value is None:
            return "—"
        if self.chosen.flags:
            return self.chosen.flags.get(int(value), str(value))
        return format(value, form) if form else _number(float(value))

    def _numbers(
        self,
        values: np.ma.MaskedArray,
        cells: Sequence[Sequence[str]],
        row_labels: Sequence[str],
        columns: Sequence[str],
        rows_axis: str,
        columns_axis: str,
    ) -> Iterator[RenderableType]:
        scale = Scale.of(self.chosen, values)
        plain = self.chosen.is_code and not self.chosen.flags  # the size of a token's number says nothing
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        table.add_column(rows_axis, justify="right", no_wrap=True, style="bold")
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        for label, row, texts in zip(row_labels, values, cells, strict=True):
            drawn = []
            for value, text in zip(row.tolist(), texts, strict=True):
                glyph, style = scale.draw(value)
                drawn.append(Text(text) if plain else Text.assemble((glyph, style), f" {text}"))
            table.add_row(label, *drawn)
        if columns_axis:
            yield Text(f"rows: {rows_axis}, columns: {columns_axis}", style="dim")
        yield table

    def _wrapped(self, chosen: Selection, width: int) -> Iterator[RenderableType]:
        """One long axis, some fifty places to a line."""
        axis = chosen.dims[0]
        labels = list(chosen.labels[axis])
        longest = max(map(len, labels))
        per_line = max(10, (width - 2 * longest - 5) // 10 * 10)
        scale = Scale.of(chosen, chosen.values)
        yield Text(f"{axis}, {per_line} to a line", style="dim")
        for start in range(0, len(labels), per_line):
            part = chosen.values[start : start + per_line]
            last = labels[min(start + per_line, len(labels)) - 1]
            yield _line(f"{labels[start]:>{longest}}–{last:<{longest}} ", part.tolist(), scale, 1)
        yield Text()
        yield scale.legend()

    def _map(
        self,
        values: np.ma.MaskedArray,
        row_labels: Sequence[str],
        columns: Sequence[str],
        rows_axis: str,
        columns_axis: str,
        width: int,
    ) -> Iterator[RenderableType]:
        notes = []
        per_row = -(-len(values) // _MOST_ROWS)
        if per_row > 1:
            values, row_labels = _binned(values, 0, per_row, self.chosen.is_code), row_labels[::per_row]
            notes.append(f"a line is {_of_bin(per_row, rows_axis, self.chosen)}")
        label_width = max(len(rows_axis) + 2, *map(len, row_labels)) + 1
        room = max(10, width - label_width)
        per_column = -(-values.shape[1] // room)
        if per_column > 1:
            values = _binned(values, 1, per_column, self.chosen.is_code)
            columns = columns[::per_column]
            notes.append(f"a character is {_of_bin(per_column, columns_axis, self.chosen)}")
        cell = max(1, min(4, room // max(1, values.shape[1])))
        scale = Scale.of(self.chosen, values)
        yield Text(f"{' ' * label_width}{columns_axis} →", style="dim")
        yield Text(f"{rows_axis + ' ↓':<{label_width}}"[:label_width] + _ticks(columns, cell), style="dim")
        for label, row in zip(row_labels, values, strict=True):
            yield _line(f"{label:>{label_width - 1}} ", row.tolist(), scale, cell)
        yield Text()
        yield scale.legend()
        if notes:
            yield Text("; ".join(notes), style="dim")


def _form(values: np.ma.MaskedArray) -> str:
    """A format under which the digits of a table stand below each other; empty if values differ too much in size."""
    known = np.abs(np.ma.compressed(values).astype(float))
    known = known[np.isfinite(known)]
    if values.dtype.kind in "iu":
        return "d"
    largest = float(known.max(initial=0))
    if not known.size or not 1e-2 <= largest < 1e5:
        return ""
    return f".{max(0, 3 - math.floor(math.log10(largest)))}f"


def _line(label: str, values: Sequence[float | None], scale: Scale, cell: int) -> RenderableType:
    text = Text(label, style="bold", no_wrap=True, overflow="crop")
    for value in values:
        glyph, style = scale.draw(value)
        text.append(glyph * cell, Style.parse("not bold") + style)
    return text


def _ticks(columns: Sequence[str], cell: int) -> str:
    """Labels under which their column begins, as many as do not touch."""
    line = ""
    for k, label in enumerate(columns):
        start = k * cell
        wanted = not label.isdigit() or k == 0 or k % (5 if cell > 2 else 10) == 0
        if wanted and len(line) <= start - (1 if line else 0):
            line = line.ljust(start) + label
    return line


def _of_bin(count: int, axis: str, chosen: Selection) -> str:
    return f"the {'most frequent' if chosen.is_code else 'mean'} of {count} places along {axis}"


def _binned(values: np.ma.MaskedArray, axis: int, count: int, codes: bool) -> np.ma.MaskedArray:
    """Neighbours along an axis in one: their mean, or, of codes, the most frequent."""
    values = np.ma.MaskedArray(np.moveaxis(values, axis, 0))
    parts = []
    for start in range(0, len(values), count):
        part = values[start : start + count]
        if not codes:
            parts.append(np.ma.MaskedArray(part.mean(axis=0)))
            continue
        best = np.ma.masked_all(part.shape[1:], dtype=part.dtype)
        votes = np.zeros(part.shape[1:], int)
        for code in np.unique(np.ma.compressed(part)):
            count_of = np.ma.filled(part == code, False).sum(axis=0)
            best[count_of > votes] = code
            votes = np.maximum(votes, count_of)
        parts.append(best)
    return np.ma.MaskedArray(np.moveaxis(np.ma.stack(parts), 0, axis))


@dataclass(frozen=True)
class Scale:
    """From value to character and colour: eight levels between two ends, or a character per named code."""

    low: float
    high: float
    greatest: float
    codes: Mapping[int, str]
    missing: bool
    whole: bool

    @classmethod
    def of(cls, chosen: Selection, values: np.ma.MaskedArray) -> Scale:
        """Ends at the least value and at the 99th percentile (one outlier would flatten all else), if that differs."""
        known = np.ma.compressed(values).astype(float)
        known = known[np.isfinite(known)] if np.isfinite(known).any() else np.zeros(1)
        low, high, top = (float(f(known)) for f in (np.min, lambda x: np.percentile(x, 99), np.max))
        missing = bool(np.ma.getmaskarray(values).any())
        clipped = top - low > 2 * (high - low) > 0
        return cls(low, high if clipped else top, top, chosen.flags, missing, bool(values.dtype.kind in "iu"))

    def draw(self, value: float | None) -> tuple[str, Style]:
        """Character and style of one value."""
        if value is None:
            return MISSING, Style.null()
        if self.codes:
            place = list(self.codes).index(int(value)) if int(value) in self.codes else len(self.codes)
            colour = _OKABE_ITO[place % len(_OKABE_ITO)]
            return CODES[place] if place < len(CODES) else "?", Style(color=colour)
        level = self.level(value)
        return LEVELS[level], Style(color=_BLUE_TO_ORANGE[level])

    def level(self, value: float) -> int:
        """0 to 7."""
        if self.high <= self.low:
            return len(LEVELS) - 1 if value > self.high else 0
        share = (value - self.low) / (self.high - self.low)
        return int(min(len(LEVELS) - 1.0, max(0.0, share * len(LEVELS))))

    def legend(self) -> Text:
        """What the characters mean."""
        text = Text("legend  ", style="bold")
        if self.codes:
            for code, name in self.codes.items():
                glyph, style = self.draw(code)
                text.append(glyph, Style.parse("not bold") + style)
                text.append(f" {name}   ", style="not bold")
        else:
            step = (self.high - self.low) / len(LEVELS)
            for k in range(len(LEVELS) if step > 0 else 1):
                glyph, style = self.draw(self.low + (k + 0.5) * step)
                text.append(glyph, Style.parse("not bold") + style)
                text.append(f" {_short(self.low + k * step)}  ", style="not bold")
            if step > 0:
                text.append(f"(each: from this value up; the last to {_short(self.greatest)})", style="dim not bold")
        if self.missing:
            text.append("  blank: none", style="dim not bold")
        return text


def _short(value: float) -> str:
    return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}" if abs(value) < 1e5 else f"{value:.1e}"


# -------------------------------------------------------------------- for other programs


def _tidy(chosen: Selection) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value that there is, with its place along each axis."""
    mask = np.ma.getmaskarray(chosen.values)
    data = np.ma.getdata(chosen.values)
    for place in np.ndindex(*data.shape):
        if not mask[place]:
            value: Any = data[place]
            value = value.item() if isinstance(value, np.generic) else value
            where = tuple(chosen.labels[axis][k] for axis, k in zip(chosen.dims, place, strict=True))
            yield where, chosen.flags.get(value, value) if chosen.flags else value


def to_csv(trace: Trace, name: str, **selection: Any) -> str:
    """The selection as CSV, one value per line after its place along each axis; only values that a sample has.

    Takes what `render_variable` takes; averages only over `mean`.
    """
    chosen = select(trace, name, **selection)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*chosen.dims, name])
    for where, value in _tidy(chosen):
        writer.writerow([*where, value])
    return out.getvalue()


def to_json(trace: Trace, name: str, **selection: Any) -> str:
    """The selection as JSON: description, axes with the names of their places, nested values (null: none,
    infinities as texts)."""
    chosen = select(trace, name, **selection)
    values = np.ma.MaskedArray(chosen.values).tolist()
    content = {
        "trace": str(trace.path),
        "variable": name,
        "long_name": chosen.variable.long_name,
        "units": chosen.variable.units,
        "picked": list(chosen.notes),
        "dims": list(chosen.dims),
        "labels": {axis: list(labels) for axis, labels in chosen.labels.items()},
        "values": _without_nan(values),
    }
    if chosen.flags:
        content["flags"] = {name: code for code, name in chosen.flags.items()}
    return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"


def _without_nan(values: Any) -> Any:
    if isinstance(values, list):
        return [_without_nan(v) for v in values]
    if isinstance(values, float) and not math.isfinite(values):
        return None if math.isnan(values) else str(values)
    return values


__all__ = ["render_summary", "render_variable", "to_csv", "to_json"]
