"""One self-contained HTML page of one or several traces: `write_report`. Opens from disk, fetches nothing.

The page is `report_page.html`, its style `report_page.css`, its wiring `report_page.js`; Plotly draws the charts.
Tables (`report_tables.py`) are plain HTML; what depends on a chosen sample is packed and unpacked by the page.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from probe.errors import ProbeError
from probe.site import Fate
from probe.trace import Trace, open_trace
from probe.views import report_data as data
from probe.views.report_tables import Item, option, run_table, sample_table

_HERE = Path(__file__).parent
_FATES = {
    Fate.KEPT: ("kept", "in the layer's attention"),
    Fate.DROPPED: ("dropped", "removed"),
    Fate.MERGED: ("merged", "folded into another token"),
    Fate.WITHDRAWN: ("withdrawn", "taken out from this layer on"),
    Fate.MASKED: ("masked", "computed, but not looked at"),
    Fate.SKIPPED: ("skipped", "carried around this layer"),
    Fate.EVICTED: ("evicted", "not in the layer's cache until its next refresh"),
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
        from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]
    except ImportError as error:
        raise ProbeError("a report needs Plotly: pip install 'dmllm-probe[report]'") from error
    return str(get_plotlyjs()).replace("\r\n", "\n")


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
        run_table=run_table(traces, labels),
        notes="".join(f"<p class='note'>{escape(n)}</p>" for n in _notes(traces, labels, rows, items)),
        options="".join(option(item) for item in items),
        sample_table=sample_table(items, labels),
        details="".join(_details(t, label) for t, label in zip(traces, labels, strict=True)),
        **{f"{panel}_lanes": _lanes(panel, labels) for panel in ("picture", "answer", "tokens", "map", "mass")},
        answers="".join(f"<div class='lane' id='said-{k}'></div>" for k in range(len(traces))),
        run=_json(_run(traces, labels, shown, items)),
        payloads="".join(
            f"<script type='text/plain' id='payload-{i}'>{x.payload}</script>" for i, x in enumerate(items)
        ),
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
) -> list[Item]:
    items: list[Item] = []
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
        items.append(Item(number, records, payload))
    return items


def _run(
    traces: Sequence[Trace], labels: Sequence[str], shown: Sequence[data.Shown], items: Sequence[Item]
) -> dict[str, Any]:
    """What the page knows without a sample: names, units, words."""
    sides: list[dict[str, Any]] = []
    maps: dict[str, dict[str, Any]] = {}
    described: dict[str, dict[str, str]] = {}
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
                    {
                        "variable": v.name,
                        "place": place,
                        "label": f"{v.name}{': ' if name else ''}{name}",
                        "name": name,
                    },
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


def _notes(
    traces: Sequence[Trace], labels: Sequence[str], rows: dict[int, list[int | None]], items: Sequence[Item]
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
