"""Python files that a user names with `--plugin`: importing one registers what it decorates.

A recipe can never do this; only the person at the command line (or an installed package's entry point) can.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from probe.errors import ProbeError
from probe.probe_code import CODE_PROBES, CodeProbe


def load_plugins(paths: Sequence[Path]) -> list[CodeProbe]:
    """Import the files; returns the code probes that they define (scores and the like register themselves)."""
    before = set(CODE_PROBES)
    for path in paths:
        if not path.is_file():
            raise ProbeError(f"--plugin {path}: there is no such file")
        spec = importlib.util.spec_from_file_location(f"probe_plugin_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ProbeError(f"--plugin {path}: not a Python file (it should end in .py)")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except ProbeError:
            raise
        except Exception as error:
            raise ProbeError(f"--plugin {path}: {type(error).__name__}: {error}") from error
    return [probe for name, probe in CODE_PROBES.items() if name not in before]
