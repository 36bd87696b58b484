"""Checkpoints on disk: where a name leads, what a folder holds, and tensors by their published names.

Only safetensors are read: no pickle, no code from a checkpoint. Nothing here knows an architecture.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from probe.errors import ProbeError

if TYPE_CHECKING:
    import torch

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SMALL_PATTERNS = ["*.json", "*.jinja", "merges.txt"]
PATTERNS = [*SMALL_PATTERNS, "*.safetensors"]
DTYPES = ("float32", "bfloat16", "float16", "float64")
TEXT_TOWER = "text_tower"
"""The folder inside a checkpoint's where the text half of its encoder's model may lie."""
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
Shape = tuple[int, ...]
MOST_LAYERS = 1000
"""Layers that a config may claim."""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SAMPLE, _SAMPLES = 1 << 16, 32


@dataclass(frozen=True)
class Checkpoint:
    """A folder with `config.json` and usually weights and a tokenizer; `source` is its name to the user."""

    folder: Path
    source: str
    commit: str | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`; an error says what the folder holds instead."""
        config = self.json("config.json")
        if config is None:
            held = _listing(self.folder)
            raise ProbeError(f"{self.folder} is no checkpoint: no config.json; it holds {held}")
        return config

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON object beside the weights, or None when there is no such file."""
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ProbeError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(value, dict):
            raise ProbeError(f"{path} holds a {type(value).__name__}; expected an object of settings")
        return value

    @property
    def has_text_tower(self) -> bool:
        """Whether the text half of the encoder's model lies beside the weights. Reads no weights."""
        return (self.folder / TEXT_TOWER / "config.json").is_file()

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files that make up the weights, sorted."""
        index = self.json(INDEX)
        if index is None:
            if (self.folder / WEIGHTS).is_file():
                return (self.folder / WEIGHTS,)
            raise ProbeError(self._no_weights())
        places = index.get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ProbeError(f"{self.folder / INDEX} has no `weight_map` of tensor names to files")
        names = sorted(set(map(str, places.values())))
        strange = [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]
        if strange:
            raise ProbeError(f"{self.folder / INDEX} names {strange[0]!r}, no safetensors file of its folder")
        missing = [n for n in names if not (self.folder / n).is_file()]
        if missing:
            count = f"{len(missing)} of {len(names)}"
            raise ProbeError(f"{self.folder} lacks {count} weight files: {_some(missing)}")
        return tuple(self.folder / n for n in names)

    def _no_weights(self) -> str:
        pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            return (
                f"{self.folder} holds its weights as pickles ({_some(pickles)}), "
                "which can run code and are not read; convert them with safetensors.torch.save_file"
            )
        return f"{self.folder} has no weights: no {WEIGHTS} and no {INDEX}; it holds {_listing(self.folder)}"

    @contextmanager
    def tensors(self, device: str = "cpu") -> Iterator[Tensors]:
        """The weights, opened and memory-mapped, for the duration of a `with` block."""
        from safetensors import SafetensorError, safe_open

        with ExitStack() as stack:
            handles: dict[str, Any] = {}
            places: dict[str, Path] = {}
            for path in self.files:
                try:
                    handle = stack.enter_context(safe_open(path, framework="pt", device=device))
                except (SafetensorError, OSError) as error:
                    raise ProbeError(f"{path} is not a complete safetensors file: {error}") from error
                for key in handle.keys():  # noqa: SIM118 - a handle is no mapping
                    if key in handles:
                        raise ProbeError(f"{path} repeats the tensor {key} of another file")
                    handles[key], places[key] = handle, path
            yield Tensors(handles, places)

    @cached_property
    def fingerprint(self) -> str:
        """Which weights these are: the Hub's commit, else a sha256 of sizes, headers and samples of the data.

        Files up to 16 MiB are hashed whole.
        """
        if self.commit:
            return self.commit
        digest = hashlib.sha256()
        for path in self.files:
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}:".encode())
            with path.open("rb") as file:
                if size <= _SAMPLE * _SAMPLES * 8:
                    digest.update(file.read())
                    continue
                digest.update(file.read(int.from_bytes(file.read(8), "little")))
                for i in range(_SAMPLES):
                    file.seek((size - _SAMPLE) * i // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE))
        return digest.hexdigest()


class Tensors:
    """Opened weights: names, shapes and stored types without reading, tensors on demand."""

    def __init__(self, handles: Mapping[str, Any], places: Mapping[str, Path]) -> None:
        self._handles, self._places = handles, places

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Shapes by name."""
        return {k: tuple(h.get_slice(k).get_shape()) for k, h in self._handles.items()}

    def path(self, key: str) -> Path:
        """The file that a tensor is in."""
        return self._places[key]

    def read(self, key: str, rows: int | None = None) -> torch.Tensor:
        """A tensor as stored, or only its first rows; one that holds NaN or infinity raises `ProbeError`."""
        handle = self._handles[key]
        tensor: torch.Tensor = handle.get_tensor(key) if rows is None else handle.get_slice(key)[:rows]
        check_finite(key, tensor)
        return tensor


def resolve(name: str | Path, *, revision: str | None = None, weights: bool = True) -> Checkpoint:
    """The checkpoint that a name means: one of `EMBEDDED`, a folder, or `owner/name` on the Hugging Face Hub.

    With `weights=False` only the small files are fetched from the Hub.
    """
    text = str(name)
    if text in EMBEDDED:
        folder = EMBEDDED[text]
        if not folder.is_dir():
            raise ProbeError(f"the embedded checkpoint `{text}` is not installed: {folder} does not exist")
        return Checkpoint(folder, text)
    path = Path(text).expanduser()
    if path.is_dir():
        return Checkpoint(path, text)
    if path.exists():
        raise ProbeError(f"{path} is a file; give the folder with config.json and the weights")
    if not _HUB_NAME.fullmatch(text) or text.startswith("."):
        raise ProbeError(
            f"no checkpoint at {text!r}: no such folder, and no owner/name of the Hugging Face Hub; "
            f"embedded: {', '.join(EMBEDDED)}"
        )
    return _download(text, revision, weights)


def _download(name: str, revision: str | None, weights: bool) -> Checkpoint:
    from huggingface_hub import snapshot_download

    patterns = PATTERNS if weights else SMALL_PATTERNS
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the Hub's client raises many kinds; all of them mean the same to the user
        reason = str(error).strip().split("\n", 1)[0]
        where = f"`{name}`" + (f" at revision {revision}" if revision else "")
        raise ProbeError(
            f"{where} is no folder here and could not be fetched from the Hugging Face Hub "
            f"({type(error).__name__}: {reason}); check the name, the connection, or give a local folder"
        ) from error
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
    return Checkpoint(folder, name, commit)


def check_names(expected: Mapping[str, Shape], found: Mapping[str, Shape], where: object) -> None:
    """Refuse weights that are not named or shaped as the config asks; up to five of each kind are listed."""
    common = [k for k in expected if k in found and found[k] != expected[k]]
    kinds = {
        "missing": [f"{k} {list(s)}" for k, s in expected.items() if k not in found],
        "unexpected": [f"{k} {list(s)}" for k, s in found.items() if k not in expected],
        "of another shape": [f"{k} {list(found[k])} instead of {list(expected[k])}" for k in common],
    }
    wrong = [f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in kinds.items() if keys]
    if wrong:
        count = f"{len(expected)} tensors expected"
        raise ProbeError(f"{where}: the weights do not fit the config ({count}). {'; '.join(wrong)}")


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuse weights with NaN or infinity: a file damaged on its way, or training that diverged."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    values = tensor if tensor.element_size() > 1 else tensor.float()  # 8-bit floats have no minimum
    low, high = values.aminmax()
    if not bool(low.isfinite() & high.isfinite()):
        count = int((~values.isfinite()).sum())
        raise ProbeError(f"the tensor {name} holds {count} values that are NaN or infinite; fetch the weights again")


def check_sizes(source: object, **layers: int) -> None:
    """Refuse a config whose numbers of layers no model has, before anything of that size is built."""
    for name, count in layers.items():
        if not 0 <= count <= MOST_LAYERS:
            raise ProbeError(f"{source}: config.json says {count} {name}; 0 to {MOST_LAYERS} can be")


def choose_dtype(asked: str | torch.dtype, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The type to run in: the one asked for, or for `auto` the stored one, float16 being float32 on a CPU."""
    import torch

    if isinstance(asked, torch.dtype):
        return asked
    if asked == "auto":
        if not stored.is_floating_point or stored.itemsize < 2:
            raise ProbeError(f"the weights are stored as {stored}; say in which type to run: {', '.join(DTYPES)}")
        return torch.float32 if device.type == "cpu" and stored == torch.float16 else stored
    if asked not in DTYPES:
        raise ProbeError(f"dtype={asked!r}; known: auto, {', '.join(DTYPES)}")
    return cast("torch.dtype", getattr(torch, asked))


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return _some(names, 8) if names else "nothing"


_ZOO = Path(__file__).resolve().parent.parent / "zoo"
EMBEDDED: dict[str, Path] = {
    "miniature": _ZOO / "llada_v_mini",
    "miniature-ar": _ZOO / "llava_next_mini",
    "miniature-adapted": _ZOO / "lavida_dream_mini",
}
"""Checkpoints that are installed with the package."""
