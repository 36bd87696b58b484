"""What `probe compare` prints: tables that fit 80 columns, each number explained below the table it stands in."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from probe.compare import Comparison, Divergence, LateStart, Run, StepDivergence
from probe.intervals import Estimate
from probe.views.comparison_committed import committed_tables
from probe.views.comparison_parts import explained, grid
from probe.views.table import flops_text

_ROWS = 12  # of the table by step; a longer course is shown at chosen steps
_BAR = 10


def render_comparison(comparison: Comparison) -> RenderableType:
    """The comparison as tables: what is compared, answers, cost, divergence, late starts, commits."""
    c = comparison
    parts: list[RenderableType] = [_runs(c)]
    parts += [Text(f"! {warning}", style="bold yellow") for warning in c.warnings]
    parts += [Text(), *_answers(c), Text(), *_cost(c)]
    held = [(r, r.divergence) for r in c.runs if r.divergence is not None]
    if held:
        parts += [Text(), *_divergence(held, c.reference.label)]
    if c.late:
        parts += [Text(), *_late(c.late, c.reference.label)]
    if c.committed:
        parts += [Text(), *committed_tables(c.committed, c.runs, c.reference.label)]
    for run, divergence in held:
        parts += [Text(), *_by_step(run, divergence)]
    parts += _said_by_step([d for _, d in held], c.reference.label)
    return Group(*parts)


def to_json(comparison: Comparison) -> str:
    """Everything as JSON; null where nothing is known."""
    return json.dumps(comparison.to_dict(), ensure_ascii=False, allow_nan=False) + "\n"


def to_csv(comparison: Comparison) -> str:
    """One line per sample and run; empty where nothing is known."""
    out = io.StringIO()
    rows = comparison.to_dict()["samples"]
    names = ["run", "sample", "sample_id", "task", "score_reference", "score", "agreement", "slots", "changed"]
    writer = csv.DictWriter(out, [*names, "first_step", "kl_first", "kl_last"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


# -------------------------------------------------------------------- the tables


def _runs(c: Comparison) -> RenderableType:
    table = grid("", "run", "keep", "start", "other dials", "file", left=6)
    table.columns[4].no_wrap = table.columns[5].no_wrap = False
    table.columns[5].overflow = "fold"
    files = [name.removesuffix(".trace.h5") for name in _telling([Path(r.path) for r in (c.reference, *c.runs)])]
    for run, file in zip((c.reference, *c.runs), files, strict=True):
        others = ", ".join(f"{k}={v}" for k, v in run.dials.items() if k not in ("keep", "start"))
        # the dials of a run without interventions turn nothing
        dials = ("-", "-", "-") if run.recipe.endswith("/baseline") else (
            str(run.dials.get("keep", "-")), str(run.dials.get("start", "-")), others or "-"
        )  # fmt: skip
        table.add_row(Text(run.label, style="bold"), Text(run.recipe), *map(Text, dials), Text(file))
    left = f"; {c.left_out} left out" if c.left_out else ""
    runs, samples = _count(len(c.runs), "run"), _count(c.n, "sample")
    title = f"{runs} against {c.reference.label}, paired over {samples}{left}"
    return Group(Text(title, style="bold"), Text(), table)


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _telling(paths: Sequence[Path]) -> list[str]:
    """Names of files, with as many of their folders as it takes to tell them apart."""
    for depth in range(1, max(len(p.parts) for p in paths) + 1):
        names = ["/".join(p.parts[-depth:]) for p in paths]
        if len(set(names)) == len({str(p) for p in paths}):
            return names
    return [str(p) for p in paths]


def _answers(c: Comparison) -> Iterable[RenderableType]:
    table = grid("answers", "score", "difference", "95 % interval", "agreement", "95 % interval", "changed")
    for run in (c.reference, *c.runs):
        changed = run.divergence.changed.value if run.divergence else math.nan
        table.add_row(
            run.label, _number(run.score.value), _signed(run.score_difference.value),
            _interval(run.score_difference, "+"), _number(run.agreement.value), _interval(run.agreement),
            _percent(changed),
        )  # fmt: skip
    yield table
    a = c.reference.label
    yield from explained(
        f"score: mean over the {c.reference.score.n} samples that have a reference answer",
        f"difference: score - {a}'s score, mean over samples; paired t interval",
        f"agreement: share of the answer's tokens that equal {a}'s (loyalty); t interval",
        f"changed: of the slots filled in both, those with another token than {a}'s",
    )


def _cost(c: Comparison) -> Iterable[RenderableType]:
    table = grid("cost", "visual kept", "at the end", "FLOPs", "ratio", "seconds", "ratio")
    for run in (c.reference, *c.runs):
        table.add_row(
            run.label, _percent(run.retention), _percent(run.retention_end), flops_text(run.flops),
            _times(run.flops_ratio), _number(run.seconds), _times(run.seconds_ratio),
        )  # fmt: skip
    yield table
    lines = [
        "visual kept: share of the visual tokens, mean over all steps and layers",
        "at the end: the same at the last step",
        f"FLOPs: executed per sample; ratio: to {c.reference.label}'s, below 1 is cheaper",
    ]
    if any(math.isnan(r.seconds) for r in (c.reference, *c.runs)):
        lines.append("seconds: per sample; -: not timed without recording, so no speed is told")
    else:
        lines.append(f"seconds: per sample with nothing recorded; ratio: to {c.reference.label}'s")
    yield from explained(*lines)


def _divergence(held: Sequence[tuple[Run, Divergence]], reference: str) -> Iterable[RenderableType]:
    a, none = reference, any(not d.n for _, d in held)
    counts = ["n: samples that lost visual tokens; only these count here"]
    counts += ["none: no sample lost any, so all of them count"] * none
    if any(d.loss.n for _, d in held):
        table = grid("information", "n", "loss", "95 % interval", "left", "restored", "95 % interval")
        for run, d in held:
            table.add_row(
                run.label, str(d.loss.n if d.n else "none"), _number(d.loss.value), _interval(d.loss),
                _number(d.left.value), _percent(d.restored.value), _interval(d.restored, "%"),
            )  # fmt: skip
        yield table
        yield from explained(
            *counts,
            f"loss: logit_kl = KL({a} || run) in nat, of slots open at the first pruned step",
            "left: the same slots' KL, each when it was last open; t interval of loss",
            "restored: 1 - left / loss; below 0: more was lost; bootstrap interval",
        )
        yield Text()
    table = grid("answer slots", "n", "at stake", "95 % interval", "came back")
    for run, d in held:
        interval = _interval(d.stake, "%")
        table.add_row(run.label, str(d.n or "none"), _percent(d.stake.value), interval, f"{d.back} of {d.ever}")
    yield table
    yield from explained(
        *counts,
        f"at stake: of the slots open when pruning began, those that ended unlike {a}'s",
        f"came back: slots unlike {a}'s at some step, and how many of them ended like it",
        *(
            []
            if any(d.loss.n for _, d in held)
            else ["not shown: information loss and restoration; they need `logit_kl`"]
        ),
    )


def _late(late: Sequence[LateStart], reference: str) -> Iterable[RenderableType]:
    a = reference
    table = grid("late start", "s", "score", "line", f"line ({a})", "surplus", "95 % interval", "late", "early")
    for one in late:
        table.add_row(
            f"{one.label} after {one.zero}", f"{one.start:.0%}", _number(one.score), _number(one.line),
            _number(one.line_reference), _signed(one.surplus.value), _interval(one.surplus, "+"),
            _whole(one.stake.value), _whole(one.stake_zero.value),
        )  # fmt: skip
    yield table
    zero = late[0].zero if len({x.zero for x in late}) == 1 else "start 0"
    yield from explained(
        f"s: share of the steps before pruning; {zero} prunes from step 0 on",
        f"line: s + (1 - s) x {zero}'s score: committed tokens right, the rest as poor as {zero}",
        f"line ({a}): s x {a}'s score + (1 - s) x {zero}'s score: committed as right as {a}",
        f"surplus: score - line ({a}), paired t interval; above 0 is restoration",
        f"late: of the slots open when the late run began to prune, those unlike {a}",
        f"early: the same slots in {zero}",
    )


def _by_step(run: Run, divergence: Divergence) -> Iterable[RenderableType]:
    rows = _chosen(divergence.by_step)
    kl = any(not math.isnan(r.kl) for r in rows)
    scale = max((r.kl for r in rows if not math.isnan(r.kl)), default=0.0) if kl else 1.0
    origin = "first pruned step" if divergence.n else "first step"
    table = grid(f"{run.label} by step", "n", "tokens differ", "less sure by", *(["KL (nat)"] if kl else []), "")
    table.columns[-1].justify = "left"
    for row in rows:
        name = f"{row.step:+d}" if row.step else f"0  {origin}"
        shown = row.kl if kl else row.tokens
        table.add_row(
            name, str(row.n), _percent(row.tokens), _signed(row.confidence), *([_number(row.kl)] if kl else []),
            "" if math.isnan(shown) else Text(_bar(shown / scale if scale else 0.0), style="cyan"),
        )  # fmt: skip
    yield table


def _said_by_step(held: Sequence[Divergence], reference: str) -> list[RenderableType]:
    if not held:
        return []
    a = reference
    with_kl = any(not math.isnan(r.kl) for d in held for r in d.by_step)
    return explained(
        "by step: counted from each sample's first pruned one (-1: before it)",
        "n: samples that at least one of both runs was denoising",
        f"tokens differ: of the slots filled in both, those with a token unlike {a}'s",
        f"less sure by: confidence of {a} - that of the run, slots open in both",
        *([f"KL: logit_kl, KL({a} || run), mean over slots open in both"] if with_kl else []),
        "bar: KL, the longest is the largest; else tokens differ, 0 to 100 %"
        if with_kl
        else "bar: tokens differ, 0 to 100 %",
    )


def _chosen(rows: Sequence[StepDivergence]) -> list[StepDivergence]:
    """At most `_ROWS` steps: the one before the intervention, it, and later ones evenly to the last."""
    after = [r for r in rows if r.step >= 0]
    kept = [r for r in rows if r.step == -1]
    room = _ROWS - len(kept)
    if len(after) > room:
        places = sorted({round(i * (len(after) - 1) / (room - 1)) for i in range(room)})
        after = [after[i] for i in places]
    return kept + after


# -------------------------------------------------------------------- numbers


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value + 0.0:+.3f}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"


def _whole(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0%}"


def _times(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}x"


def _interval(estimate: Estimate, form: str = "") -> str:
    if math.isnan(estimate.low):
        return "-"
    if form == "%":
        return f"{estimate.low:.0%} to {estimate.high:.0%}"
    return f"{estimate.low:{form}.2f} to {estimate.high:{form}.2f}"


def _bar(share: float) -> str:
    return "█" * round(min(1.0, max(0.0, share)) * _BAR) or "▏"


__all__ = ["render_comparison", "to_csv", "to_json"]
