"""`python -m probe` and the console command.

The command line lives in `cli.py` at the top of the checkout. An installed wheel carries it as `probe/_cli.py`, so that
no global module called `cli` is taken; in a checkout it is loaded from beside the package.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_cli() -> ModuleType:
    """The command-line module, wherever this copy of the package keeps it."""
    name = "probe._cli"
    if name in sys.modules:
        return sys.modules[name]
    package = Path(__file__).resolve().parent
    path = next(p for p in (package / "_cli.py", package.parent / "cli.py") if p.is_file())
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Run the command line. Nothing looks for garbage until a command begins: what is made until then stays."""
    gc.disable()
    load_cli().main()


if __name__ == "__main__":
    main()
