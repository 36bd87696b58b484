"""A folder of pictures, and one question about each of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from probe.data.pictures import open_image
from probe.data.sample import Sample
from probe.data.video import SUFFIXES
from probe.errors import ProbeError


def pictures_in(folder: Path) -> list[Path]:
    """The pictures that lie in a folder (not in folders inside it), in the order of their names."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())


def from_folder(path: str | Path, question: str) -> Iterator[Sample]:
    """A sample for each picture of a folder, in the order of their names, which are the ids; no reference answers.

    Pictures are read when their sample's turn comes; reading may go on after a damaged one.
    """
    path = Path(path)
    if not path.is_dir():
        raise ProbeError(f"there is no folder {path}")
    if not question.strip():
        raise ProbeError(f"an empty question about the pictures in {path}; say what to ask")
    files = pictures_in(path)
    if not files:
        raise ProbeError(f"the folder {path} holds no pictures; known: {', '.join(SUFFIXES)}")
    return map(partial(_sample, question), files)  # a map goes on after an exception


def _sample(question: str, file: Path) -> Sample:
    return Sample(file.name, (open_image(file),), question)
