"""The tables of a report page, as HTML, and one sample as they take it. Every text is escaped here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from probe.data.metrics import agreement
from probe.errors import ProbeError
from probe.summary import Row, summarise
from probe.trace import Trace
from probe.trace_schema import SampleRecord
from probe.views.table import flops_text


@dataclass(frozen=True)
class Item:
    """One sample as the page shows it: its records (None where a trace lacks it) and its packed payload."""

    number: int
    records: tuple[SampleRecord | None, ...]
    payload: str

    @property
    def any(self) -> SampleRecord:
        """The first record that says what was asked."""
        present = [r for r in self.records if r is not None]
        return next((r for r in present if r.question), present[0])

    @property
    def failed(self) -> str:
        """The reason of the first trace in which the sample failed."""
        return next((r.failed for r in self.records if r is not None and r.failed), "")


def _number(value: float, form: str = ".3f") -> str:
    return "–" if math.isnan(value) else format(value, form)


def _cell(text: str, value: float | None = None) -> str:
    sort = "" if value is None else f" data-value='{'' if math.isnan(value) else repr(value)}'"
    return f"<td{' class=number' if value is not None else ''}{sort}>{escape(text)}</td>"


def _table_rows(traces: Sequence[Trace], labels: Sequence[str]) -> list[Row]:
    try:
        return list(summarise([t.path for t in traces], labels))
    except ProbeError:  # a trace of other software, or of an older version: what every trace has
        pass
    nan = math.nan
    out = []
    for trace, label in zip(traces, labels, strict=True):
        said = trace.summary()
        score = nan if said["mean_score"] is None else said["mean_score"]
        interval = said["score_interval"]
        half = (interval[1] - interval[0]) / 2 if interval else nan
        ran = said["n_samples"] - said["n_failed"]
        out.append(
            Row(
                label=label,
                n=ran,
                score=score,
                score_half_width=half,
                agreement=_agreement(traces[0], trace),
                seconds=nan,
                flops=nan,
                visual_tokens=nan,
                retention=nan,
                untouched=0,
            )
        )
    return out


def _agreement(first: Trace, other: Trace) -> float:
    said = dict(zip(first.samples.tolist(), first.array("prediction"), strict=True))
    pairs = zip(other.samples.tolist(), other.array("prediction"), other.array("failed"), strict=True)
    found = [agreement(str(said[n]), str(text)) for n, text, failed in pairs if not failed and n in said]
    return sum(found) / len(found) if found else math.nan


def run_table(traces: Sequence[Trace], labels: Sequence[str]) -> str:
    """The table that ends a run, one line per trace; the first is what others are compared with."""
    rows = _table_rows(traces, labels)
    base = rows[0]
    heads = ["run", "samples", "score", "visual tokens", "FLOPs", "seconds"]
    if len(rows) > 1:
        heads[3:3] = ["agrees"]
        heads += ["speed"]
    body = []
    for row in rows:
        interval = "" if math.isnan(row.score_half_width) else f" ± {row.score_half_width:.2f}"
        kept = "" if math.isnan(row.retention) else f" ({row.retention:.0%})"
        known = row.seconds > 0 and base.seconds > 0
        cells = [
            _cell(str(row.n), row.n),
            _cell(_number(row.score) + interval, row.score),
            _cell(_number(row.visual_tokens, ".1f") + kept, row.visual_tokens),
            _cell("–" if math.isnan(row.flops) else flops_text(row.flops), row.flops),
            _cell(_number(row.seconds), row.seconds),
        ]
        if len(rows) > 1:
            cells.insert(2, _cell("" if row is base else _number(row.agreement), row.agreement))
            speed = base.seconds / row.seconds if known else math.nan
            cells.append(_cell("" if row is base else "–" if not known else f"{speed:.2f}×", speed))
        body.append(f"<tr><th scope='row'>{escape(row.label)}</th>{''.join(cells)}</tr>")
    head = "".join(f"<th scope='col'{' class=number' if i else ''}>{h}</th>" for i, h in enumerate(heads))
    agrees = f"; agrees: share of answer tokens equal to those of {escape(base.label)}" if len(rows) > 1 else ""
    return (
        "<div class='scroller' tabindex='0' role='region' aria-label='The runs in numbers'>"
        f"<table id='runs'><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        f"<p class='caption'>Means over samples that did not fail. Score: with half of its 95 % interval{agrees}. "
        "Visual tokens: mean over layers and steps. Seconds and FLOPs: per sample, with nothing recorded.</p>"
    )


def option(item: Item) -> str:
    """A line of the list in which a sample is chosen."""
    record = item.any
    text = " · ".join(t for t in (str(item.number), record.task, record.question.replace("\n", " ")[:70]) if t)
    return f"<option value='{escape(str(item.number))}'>{escape(text + (' (failed)' if item.failed else ''))}</option>"


def sample_table(items: Sequence[Item], labels: Sequence[str]) -> str:
    """One line per sample; headings are buttons that sort."""

    def heading(name: str, kind: str, column: int, rows: int = 1) -> str:
        button = f"<button type='button' class='sort'>{name}</button>"
        return f"<th scope='col' rowspan='{rows}' class='{kind}' data-column='{column}'>{button}</th>"

    first = (("sample", "number"), ("question", "text"), ("right answer", "text"))
    above = "".join(heading(name, kind, k, 2) for k, (name, kind) in enumerate(first))
    below = ""
    for k, label in enumerate(labels):
        above += f"<th scope='colgroup' colspan='2' class='group'>{escape(label)}</th>"
        below += heading("answer", "text", 3 + 2 * k) + heading("score", "number", 4 + 2 * k)
    head = f"<tr>{above}</tr><tr>{below}</tr>"
    body = []
    for i, item in enumerate(items):
        record = item.any
        choose = f"<button type='button' class='choose' data-sample='{i}'>{item.number}</button>"
        cells = [
            f"<td class='number' data-value='{item.number}'>{choose}</td>",
            _cell(record.question),
            _cell(record.references[0] if record.references else ""),
        ]
        for r in item.records:
            if r is None:
                cells += ["<td class='missing'>not in this trace</td>", _cell("", math.nan)]
            elif r.failed:
                cells += [f"<td class='missing'>failed: {escape(r.failed)}</td>", _cell("", math.nan)]
            else:
                cells += [_cell(r.prediction), _cell(_number(r.score), r.score)]
        body.append(f"<tr data-sample='{i}'>{''.join(cells)}</tr>")
    widest = f"min-width:{18 + 14 * len(labels)}rem"
    return f"<table id='samples' style='{widest}'><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"
