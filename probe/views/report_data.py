"""What a report page shows, as plain data: read from traces, rounded, packed. Knows nothing of HTML."""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from probe.errors import ProbeError
from probe.site import Role
from probe.trace import Trace
from probe.trace_schema import SampleRecord, Variable

BUDGET = 40 << 20
"""Bytes of packed samples after which a page takes no more of them, unless it was told how many to take."""

LONGEST_SIDE = 640
LARGEST_PICTURE = 120 << 10
_OVERLAP = 0.02  # of a picture's side: views that share less than this are neighbours, not views of the same part


# ---------------------------------------------------------------------------------------------- numbers and bytes


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 with a mantissa of 13 bits (some four significant digits): the rest would only be noise to pack."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    finite = np.isfinite(values)
    near = ((bits.astype(np.uint64) + 0x200) & 0xFFFFFC00).astype("<u4")
    return np.where(finite, near, bits).astype("<u4").view("<f4")


@dataclass
class Pack:
    """Arrays and a description of them in one compressed text; `report_page.js` unpacks it.

    The text is base64 of gzip of: length of the JSON in 8 digits, the JSON, the bytes of all arrays. The bytes of
    float32 are shuffled (all first bytes, then all second ones, ...), which halves their size.
    """

    blob: bytearray = field(default_factory=bytearray)

    def add(self, values: np.ndarray) -> dict[str, Any]:
        """Append an array; what the description has to say of it. Whole numbers up to 255 take one byte each."""
        if values.dtype.kind == "f":
            kind, raw = "f4", np.ascontiguousarray(rounded(values)).view(np.uint8).reshape(-1, 4).T.tobytes()
        elif values.size == 0 or (values.min() >= 0 and values.max() <= 255):
            kind, raw = "u1", values.astype(np.uint8).tobytes()
        else:
            kind, raw = "i4", np.ascontiguousarray(values, dtype="<i4").view(np.uint8).reshape(-1, 4).T.tobytes()
        start = len(self.blob)
        self.blob += raw
        return {"kind": kind, "at": start, "shape": list(values.shape)}

    def text(self, description: Mapping[str, Any]) -> str:
        """Everything as one line of base64."""
        head = json.dumps(plain(description), ensure_ascii=False, separators=(",", ":")).encode()
        whole = f"{len(head):08d}".encode() + head + bytes(self.blob)
        return base64.b64encode(gzip.compress(whole, 9, mtime=0)).decode()


def plain(value: Any) -> Any:
    """JSON without NaN and infinities: they become null."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------------------- words and pictures


class Words:
    """Texts of token ids, if the backbone's tokenizer lies on this machine; nothing is ever downloaded for it."""

    def __init__(self, backbone: str, revision: str) -> None:
        self._tokenizer = _tokenizer_of(backbone, revision)

    def of(self, token: int) -> str | None:
        """The text that a token adds to a sentence; None if only its number is known."""
        if self._tokenizer is None:
            return None
        name = self._tokenizer.id_to_token(token)
        if name is None:
            return None
        alone = self._tokenizer.decode([token], skip_special_tokens=False)
        # decoders treat the first token of a text differently: what the second of two equal ones adds is wanted
        twice = self._tokenizer.decode([token, token], skip_special_tokens=False)
        added = twice[len(alone) :] if twice.startswith(alone) else alone
        return str(added or name)


def _tokenizer_of(backbone: str, revision: str) -> Any:
    path = _tokenizer_file(backbone, revision)
    if path is None:
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception:  # the library raises bare Exception; numbers instead of words are no reason to have no page
        return None


def _tokenizer_file(backbone: str, revision: str) -> Path | None:
    """`tokenizer.json` of an embedded backbone, of a folder, or in the cache of the Hub."""
    from probe.backbones.checkpoint import EMBEDDED

    folder = EMBEDDED.get(backbone, Path(backbone).expanduser())
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(backbone, "tokenizer.json", revision=revision or None)
    except HFValidationError:  # no name of a repository: a folder of another machine
        return None
    return Path(found) if isinstance(found, str) else None


def picture_uri(png: bytes | None) -> dict[str, Any] | None:
    """A picture as a data URI with its size in pixels; large ones are made smaller. None if it cannot be read."""
    from PIL import Image, UnidentifiedImageError

    if png is None:
        return None
    try:
        with Image.open(io.BytesIO(png)) as opened:
            image: Image.Image = opened.copy()
    except (OSError, UnidentifiedImageError, ValueError):
        return None
    width, height = image.size
    kind = "png"
    if len(png) > LARGEST_PICTURE:
        small = image.convert("RGB")
        small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=85)
        kind, png = "jpeg", buffer.getvalue()
    return {"uri": f"data:image/{kind};base64,{base64.b64encode(png).decode()}", "width": width, "height": height}


# ---------------------------------------------------------------------------------------------- visual tokens


def grids(box: np.ndarray, view: np.ndarray, role: np.ndarray) -> list[dict[str, Any]]:
    """Where visual tokens lie, as grids that can be painted one at a time.

    A model sees a picture more than once (as a whole, and in tiles), and may see several: views that do not overlap
    make one grid, e.g. all tiles. `box (visual, 4)`, `view (visual,)`, `role (visual,)`; tokens without an area are
    left out. Each grid has a `label`, its number of `tokens`, edges `x` and `y` as shares of the picture, `cell
    (len(y) - 1, len(x) - 1)` with the index of the visual token or -1, and `own`: whether the stored picture (the
    first one) is what it shows.
    """
    clean = np.nan_to_num(box, nan=0.0)
    seen = ~np.isnan(box).any(1) & (role != int(Role.NEWLINE))
    seen &= (clean[:, 2] > clean[:, 0]) & (clean[:, 3] > clean[:, 1])
    groups: list[list[int]] = []
    for v in np.unique(view[seen]).tolist():
        if groups and not any(_overlap(_extent(box, seen & (view == v)), _extent(box, seen & (view == u)))
                              for u in groups[-1]):  # fmt: skip
            groups[-1].append(v)
        else:
            groups.append([v])
    out = []
    for i, views in enumerate(groups):
        chosen = np.flatnonzero(seen & np.isin(view, views))
        x, y, cell = _cells(box[chosen], chosen)
        name = "overview" if not i else "tiles" if len(views) > 1 else f"view {views[0]}"
        own = not i or len(views) > 1
        label = name if len(groups) > 1 else "all"
        out.append({"label": label, "tokens": len(chosen), "x": x, "y": y, "cell": cell, "own": own})
    return out


def _extent(box: np.ndarray, chosen: np.ndarray) -> tuple[float, float, float, float]:
    part = box[chosen]
    return float(part[:, 0].min()), float(part[:, 1].min()), float(part[:, 2].max()), float(part[:, 3].max())


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    return wide > _OVERLAP and high > _OVERLAP


def _edges(values: np.ndarray) -> np.ndarray:
    """Sorted edges; those that differ by rounding only are one."""
    edges = np.unique(np.round(values.astype(float), 4))
    return edges[np.concatenate([[True], np.diff(edges) > 5e-4])] if len(edges) else edges


def _cells(box: np.ndarray, index: np.ndarray) -> tuple[list[float], list[float], np.ndarray]:
    x, y = _edges(box[:, [0, 2]].ravel()), _edges(box[:, [1, 3]].ravel())
    cell = np.full((len(y) - 1, len(x) - 1), -1, np.int32)
    for token, (x0, y0, x1, y1) in zip(index.tolist(), box, strict=True):
        left, right = (int(np.abs(x - e).argmin()) for e in (x0, x1))
        top, bottom = (int(np.abs(y - e).argmin()) for e in (y0, y1))
        cell[top:bottom, left:right] = token
    return x.tolist(), y.tolist(), cell


# ---------------------------------------------------------------------------------------------- variables


@dataclass(frozen=True)
class Shown:
    """The variables of a trace by the panel that shows them."""

    importance: tuple[Variable, ...]
    slots: tuple[Variable, ...]
    maps: tuple[Variable, ...]

    @classmethod
    def of(cls, trace: Trace) -> Shown:
        """By axes, so that signals of a user's own are shown too."""
        floats = [v for v in trace.declared() if v.is_float]
        first = {name: i for i, name in enumerate(("visual_importance", "confidence", "entropy", "margin"))}
        floats.sort(key=lambda v: first.get(v.name, len(first)))
        numbers = [v for v in trace.declared() if not v.flags]
        numbers.sort(key=lambda v: (v.name != "attention_mass", v.name == "visual_tokens"))
        return cls(
            tuple(v for v in floats if v.dims == ("step", "layer", "visual")),
            tuple(v for v in floats if v.dims == ("step", "position")),
            tuple(v for v in numbers if v.dims[:2] == ("step", "layer") and _named(v, trace)),
        )


def _named(variable: Variable, trace: Trace) -> bool:
    """Whether every axis after step and layer has named places (heads are averaged)."""
    return all(axis == "head" or axis in trace.coords for axis in variable.dims[2:])


def map_places(variable: Variable, trace: Trace) -> list[str]:
    """The names of the places of a map's last axes, e.g. `answer → visual`; one empty name if it has none."""
    names = [""]
    for axis in variable.dims[2:]:
        if axis != "head":
            names = [f"{n} → {place}" if n else str(place) for n in names for place in trace.coords[axis]]
    return names


def _map_values(variable: Variable, values: np.ndarray) -> np.ndarray:
    """`(step, layer, place)`, the mean over heads."""
    values = values.astype(np.float32)
    if "head" in variable.dims:
        with np.errstate(invalid="ignore"):
            values = values.mean(axis=variable.dims.index("head"))
    return values.reshape(*values.shape[:2], -1)


def open_id(records: Sequence[SampleRecord]) -> int:
    """The id that stands in answer slots before they are written: no trace says it, every trace shows it."""
    counts: Counter[int] = Counter()
    for record in records:
        token, written = record.arrays.get("token"), record.arrays.get("commit_step")
        if token is None or written is None or not token.size:
            continue
        before = np.arange(len(token))[:, None] < np.where(written < 0, len(token), written)[None, :]
        ids, times = np.unique(token[before], return_counts=True)
        counts.update(dict(zip(ids.tolist(), times.tolist(), strict=True)))
    return counts.most_common(1)[0][0] if counts else -1


def side_of(record: SampleRecord, shown: Shown, pack: Pack) -> dict[str, Any]:
    """One sample of one trace: what its panels need, arrays in `pack`."""
    arrays = record.arrays
    side: dict[str, Any] = {"failed": record.failed, "prediction": record.prediction, "score": record.score}
    for name in ("token", "commit_step", "visual_kept"):
        if name in arrays:
            side[name] = pack.add(arrays[name])
    for panel in ("importance", "slots"):
        held = [v.name for v in getattr(shown, panel) if v.name in arrays]
        side[panel] = {name: pack.add(arrays[name].astype(np.float32)) for name in held}
    held_maps = [v for v in shown.maps if v.name in arrays]
    side["maps"] = {v.name: pack.add(_map_values(v, arrays[v.name])) for v in held_maps}
    lengths = [a.shape for n, a in arrays.items() if n in ("token", "visual_kept", "visual_tokens")]
    side["steps"] = max((s[0] for s in lengths), default=0)
    side["layers"] = max((arrays[n].shape[1] for n in ("visual_kept", "visual_tokens") if n in arrays), default=0)
    side["grids"] = []
    if all(n in arrays for n in ("visual_box", "visual_view", "visual_role")):
        found = grids(arrays["visual_box"], arrays["visual_view"], arrays["visual_role"])
        side["grids"] = [{**g, "cell": pack.add(g["cell"])} for g in found]
    return side


def rows_by_number(traces: Sequence[Trace]) -> dict[int, list[int | None]]:
    """Sample number to its row in each trace (None: not there). Different questions under one number are refused."""
    out: dict[int, list[int | None]] = {}
    asked: dict[int, tuple[str, str]] = {}
    for k, trace in enumerate(traces):
        questions = trace.array("question")
        for row, number in enumerate(trace.samples.tolist()):
            out.setdefault(number, [None] * len(traces))[k] = row
            question = str(questions[row])
            other, where = asked.setdefault(number, (question, trace.path.name))
            if question and other and question != other:
                raise ProbeError(
                    f"{where} and {trace.path.name} ask different questions in sample {number} (`{other[:60]}` and "
                    f"`{question[:60]}`); a report shows runs over the same data side by side"
                )
            if question and not other:
                asked[number] = (question, trace.path.name)
    return dict(sorted(out.items()))
