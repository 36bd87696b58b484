"""Python that a user names with `--plugin`: importing it registers what it decorates.

A recipe can never do this; only the person at the command line (or an installed package's entry point) can.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from probe.errors import ProbeError
from probe.probe_code import CODE_PROBES, CodeProbe


def load_plugins(paths: Sequence[Path | str]) -> list[CodeProbe]:
    """Import files, or installed modules by their dotted names; returns the code probes that they define.

    Scores and the like register themselves.
    """
    if paths:
        import probe.vocabulary  # noqa: F401  (so that a name that is taken is the plugin's fault, and said of it)
    found: list[CodeProbe] = []
    for path in paths:
        before = dict(CODE_PROBES)
        module = _imported(Path(path))
        new = {n: p for n, p in CODE_PROBES.items() if p is not before.get(n)}
        own = {n: p for n, p in CODE_PROBES.items() if p.function.__module__ == module.__name__}
        found += (new | own).values()
    return found


def _imported(path: Path) -> ModuleType:
    """The module of a file, or the installed one of this name."""
    try:
        if not path.is_file():
            return _installed(path)
        spec = importlib.util.spec_from_file_location(f"probe_plugin_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ProbeError(f"--plugin {path}: not a Python file (it should end in .py)")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module  # dataclasses look their module up while they are being made
        spec.loader.exec_module(module)
        return module
    except ProbeError as error:
        said = str(error)
        raise error if said.startswith("--plugin") else ProbeError(f"--plugin {path}: {said}") from error
    except Exception as error:
        raise ProbeError(f"--plugin {path}: {type(error).__name__}: {error}") from error


def _installed(path: Path) -> ModuleType:
    name = str(path)
    if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
        raise ProbeError(f"--plugin {path}: there is no such file")
    try:
        known = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        known = None
    if known is None:
        raise ProbeError(f"--plugin {path}: there is no such file, and no installed module of this name")
    return importlib.import_module(name)
