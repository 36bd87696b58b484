"""One self-contained HTML page of one or several traces: `write_report`. Opens from disk, fetches nothing.

The page is `report_page.html`, its style `report_page.css`, its wiring `report_page.js`; Plotly draws the charts.
Tables are written here, as plain HTML; what depends on a chosen sample is packed and unpacked by the page.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from probe.data.metrics import agreement
from probe.errors import ProbeError
from probe.site import Fate
from probe.summary import Row, summarise
from probe.trace import Trace, open_trace
from probe.trace_schema import SampleRecord
from probe.views import report_data as data
from probe.views.table import flops_text

_HERE = Path(__file__).parent
_FATES = {
    Fate.KEPT: ("kept", "in the layer's attention"),
    Fate.DROPPED: ("dropped", "removed"),
    Fate.MERGED: ("merged", "folded into another token"),
    Fate.WITHDRAWN: ("withdrawn", "taken out from this layer on"),
    Fate.MASKED: ("masked", "computed, but not looked at"),
}


def write_report(traces: Sequence[Path], out: Path, *, samples: int | None = None) -> Path:
    """Write a page that shows `traces` (one run each, over the same data) side by side; returns `out`.

    Baselines come first. `samples` is how many samples can be looked at, the first ones; by default as many as fit
    into some 40 MB. The table of runs is over all samples in any case. Raises `ProbeError`.
    """
    script = _plotly()
    if not traces:
        raise ProbeError("a report needs at least one trace")
    if samples is not None and samples < 1:
        raise ProbeError(f"a report of {samples} samples would be empty; ask for at least 1")
    with ExitStack() as stack:
        opened = [stack.enter_context(open_trace(path)) for path in traces]
        opened.sort(key=lambda t: not t.header.recipe_name.endswith("/baseline"))
        page = _page(opened, script, samples)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise ProbeError(f"cannot write {out}: {error.strerror}; name another file with -o") from error
    return out


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ProbeError("a report needs Plotly: pip install 'dmllm-probe[report]'") from error
    return str(get_plotlyjs()).replace("\r\n", "\n")


@dataclass(frozen=True)
class _Item:
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


def _page(traces: Sequence[Trace], plotly: str, wanted: int | None) -> str:
    labels = _labels(traces)
    rows = data.rows_by_number(traces)
    shown = [data.Shown.of(trace) for trace in traces]
    items = _items(traces, shown, rows, wanted)
    own = (_HERE / "report_page.js").read_text(encoding="utf-8")
    style = (_HERE / "report_page.css").read_text(encoding="utf-8")
    title = f"{traces[-1].header.recipe_name} on {Path(traces[-1].header.backbone).name}"
    about = f"{len(traces)} traces side by side, " if len(traces) > 1 else ""
    count = f"{len(rows)} sample{'s' if len(rows) != 1 else ''}"
    page = Template((_HERE / "report_page.html").read_text(encoding="utf-8"))
    return page.substitute(
        policy=_policy(plotly, own),
        title=escape(title),
        about=escape(about + count),
        run_table=_run_table(traces, labels),
        notes="".join(f"<p class='note'>{escape(n)}</p>" for n in _notes(traces, labels, rows, items)),
        options="".join(_option(item) for item in items),
        sample_table=_sample_table(items, labels),
        details="".join(_details(t, label) for t, label in zip(traces, labels, strict=True)),
        **{f"{panel}_lanes": _lanes(panel, labels) for panel in ("picture", "answer", "tokens", "map", "mass")},
        answers="".join(f"<div class='lane' id='said-{k}'></div>" for k in range(len(traces))),
        run=_json(_run(traces, labels, shown, items)),
        payloads="".join(f"<script type='text/plain' id='payload-{i}'>{x.payload}</script>" for i, x in enumerate(items)),
        style=style,
        plotly=plotly,
        script=own,
    )


def _policy(*scripts: str) -> str:
    """Only these very scripts run; styles are inline, pictures are data; nothing can be fetched."""
    hashes = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{h}'" for h in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _json(value: Any) -> str:
    """JSON that can stand inside of a script element."""
    text = json.dumps(data.plain(value), ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _labels(traces: Sequence[Trace]) -> list[str]:
    """A different name for each trace: its recipe's, with the file's where recipes are called alike."""
    names = [t.header.recipe_name or t.path.name for t in traces]
    names = ["baseline" if n.endswith("/baseline") and names.count(n) == 1 else n for n in names]
    if names.count("baseline") > 1:
        names = [t.header.recipe_name or t.path.name for t in traces]
    files = [t.path.name.removesuffix(".partial").removesuffix(".trace.h5") for t in traces]
    named = [n if names.count(n) == 1 else f"{n} ({f})" for n, f in zip(names, files, strict=True)]
    return [n if named.count(n) == 1 else f"{n} #{k + 1}" for k, n in enumerate(named)]


def _items(
    traces: Sequence[Trace],
    shown: Sequence[data.Shown],
    rows: dict[int, list[int | None]],
    wanted: int | None,
) -> list[_Item]:
    items: list[_Item] = []
    spent = 0
    for number, places in rows.items():
        if len(items) == wanted or (wanted is None and spent > data.BUDGET):
            break
        records = tuple(None if r is None else t.record(r) for t, r in zip(traces, places, strict=True))
        pack = data.Pack()
        sides = [None if r is None else data.side_of(r, s, pack) for r, s in zip(records, shown, strict=True)]
        picture = next((r.picture for r in records if r is not None and r.picture is not None), None)
        payload = pack.text({"picture": data.picture_uri(picture), "sides": sides})
        spent += len(payload)
        items.append(_Item(number, records, payload))
    return items


def _run(
    traces: Sequence[Trace], labels: Sequence[str], shown: Sequence[data.Shown], items: Sequence[_Item]
) -> dict[str, Any]:
    """What the page knows without a sample: names, units, words."""
    sides, maps, described = [], {}, {}
    for k, (trace, its) in enumerate(zip(traces, shown, strict=True)):
        records = [r for item in items if (r := item.records[k]) is not None]
        words = data.Words(trace.header.backbone, trace.header.weights_revision)
        tokens = [r.arrays["token"] for r in records if "token" in r.arrays]
        ids = sorted({i for t in tokens for i in set(t.ravel().tolist())})
        known = {str(i): text for i in ids if i >= 0 and (text := words.of(i)) is not None}
        sides.append({"label": labels[k], "words": known, "open": data.open_id(records)})
        for v in its.maps:
            for place, name in enumerate(data.map_places(v, trace)):
                maps.setdefault(
                    f"{v.name}/{name}",
                    {"variable": v.name, "place": place, "label": f"{v.name}{': ' if name else ''}{name}", "name": name},
                )
        for v in (*its.importance, *its.slots, *its.maps):
            heads = "; mean over heads" if "head" in v.dims else ""
            described.setdefault(v.name, {"units": v.units, "about": v.long_name + heads})
    return {
        "traces": sides,
        "maps": list(maps.values()),
        "variables": described,
        "importance": list(dict.fromkeys(v.name for its in shown for v in its.importance)),
        "slots": list(dict.fromkeys(v.name for its in shown for v in its.slots)),
        "fates": [{"code": int(f), "name": name, "about": about} for f, (name, about) in _FATES.items()],
        "samples": [
            {
                "number": item.number,
                "question": item.any.question,
                "references": list(item.any.references),
                "task": item.any.task,
                "failed": item.failed,
            }
            for item in items
        ],
    }


# ---------------------------------------------------------------------------------------------- tables


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


def _run_table(traces: Sequence[Trace], labels: Sequence[str]) -> str:
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
        f"<table id='runs'><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        f"<p class='caption'>Means over samples that did not fail. Score: with half of its 95 % interval{agrees}. "
        "Visual tokens: mean over layers and steps. Seconds and FLOPs: per sample; seconds with nothing recorded.</p>"
    )


def _notes(
    traces: Sequence[Trace], labels: Sequence[str], rows: dict[int, list[int | None]], items: Sequence[_Item]
) -> list[str]:
    notes = []
    for trace, label in zip(traces, labels, strict=True):
        failed = int((trace.array("failed") != "").sum())
        if trace.partial:
            notes.append(f"{label}: the run has not finished; this is what it had written.")
        if failed:
            notes.append(f"{label}: {failed} of {trace.n_samples} samples failed; they are listed with their reason.")
    if len(items) < len(rows):
        notes.append(f"The first {len(items)} of {len(rows)} samples can be looked at here; --samples takes more.")
    return notes


def _option(item: _Item) -> str:
    record = item.any
    text = " · ".join(t for t in (str(item.number), record.task, record.question.replace("\n", " ")[:70]) if t)
    return f"<option value='{escape(str(item.number))}'>{escape(text + (' (failed)' if item.failed else ''))}</option>"


def _sample_table(items: Sequence[_Item], labels: Sequence[str]) -> str:
    """One line per sample; headings are buttons that sort."""
    heads = [("sample", "number"), ("question", "text"), ("right answer", "text")]
    for label in labels:
        heads += [(f"{label}: answer", "text"), (f"{label}: score", "number")]
    head = "".join(
        f"<th scope='col' class='{kind}'><button type='button' class='sort'>{escape(name)}</button></th>"
        for name, kind in heads
    )
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
    return f"<table id='samples'><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _lanes(panel: str, labels: Sequence[str]) -> str:
    """A place per trace for one panel: its label, a chart, and what is said below it."""
    heading = "<figcaption>{}</figcaption>" if len(labels) > 1 else "<figcaption class='hidden'>{}</figcaption>"
    return "".join(
        f"<figure class='lane'>{heading.format(escape(label))}"
        f"<div class='before' id='{panel}-before-{k}'></div><div class='chart' id='{panel}-{k}'></div>"
        f"<div class='after' id='{panel}-after-{k}'></div></figure>"
        for k, label in enumerate(labels)
    )


def _details(trace: Trace, label: str) -> str:
    head = trace.header
    facts = {
        "file": trace.path.name,
        "backbone": head.backbone,
        "weights": head.weights_revision[:12],
        "device": head.device,
        "dtype": head.dtype,
        "attention": head.attention_kernel,
        "seed": str(head.seed),
        "created": head.created,
        "command": head.command,
        "versions": ", ".join(f"{k} {v}" for k, v in head.versions.items()),
    }
    lines = "".join(f"<dt>{k}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items() if v)
    return (
        f"<details><summary>{escape(label)}: recipe and how it was run</summary><dl>{lines}</dl>"
        f"<pre tabindex='0' aria-label='recipe of {escape(label)}'>{escape(head.recipe_yaml)}</pre></details>"
    )
