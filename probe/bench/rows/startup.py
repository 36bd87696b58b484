"""How long the command line takes to say something that needs no model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from probe.bench.line import Line, Target
from probe.bench.rows.memory import own_path
from probe.bench.shapes import Bench
from probe.bench.turns import take_turns
from probe.errors import ProbeError

HELP = Target("at most", 3.0)
CHECK = Target("at most", 2.0, "s")
LOADED = """
import sys
from probe.__main__ import main
sys.argv = ["probe", *sys.argv[1:]]
try: main()
except SystemExit as end: assert not end.code
print("LOADED", *sorted({"torch", "safetensors.torch"} & set(sys.modules)))
"""


def run(bench: Bench) -> list[Line]:
    """`probe --help` against importing typer and rich; `probe check` in seconds."""

    def check(results: Mapping[str, Any]) -> str:
        loaded = _python("-c", LOADED, "--help").stdout.splitlines()[-1]
        if loaded != "LOADED":
            raise ProbeError(f"bench row `startup`: `probe --help` imports {loaded.removeprefix('LOADED ')}")
        if "check" not in results["help"].stdout:
            raise ProbeError("bench row `startup`: `probe --help` does not name its commands")
        return "help is whole, and no torch was imported"

    turns = take_turns(
        {
            "help": lambda: _python("-m", "probe", "--help"),
            "typer and rich": lambda: _python("-c", "import typer, rich"),
        },
        max(bench.repeats, 5),
        check,
        processor=_children,
    )

    def check_recipe(results: Mapping[str, Any]) -> str:
        said = results["check"].stdout
        if "fastv" not in said:
            raise ProbeError("bench row `startup`: `probe check fastv` says nothing of it")
        loaded = _python("-c", LOADED, "check", "fastv").stdout.splitlines()[-1].removeprefix("LOADED").strip()
        return f"no weights read; imported: {loaded or 'no torch'}"

    checked = take_turns(
        {"check": lambda: _python("-m", "probe", "check", "fastv")}, bench.repeats, check_recipe, processor=_children
    )
    return [
        Line(
            row="startup",
            what="`probe --help` / `import typer, rich`, each in a process of its own",
            target=HELP,
            value=turns.ratio("help", "typer and rich"),
            cpu=turns.ratio("help", "typer and rich", cpu=True),
            equal=turns.equal,
            note=f"{turns.seconds('help').median:.2f} s and {turns.seconds('typer and rich').median:.2f} s",
        ),
        Line(
            row="startup",
            what="`probe check fastv`, a process of its own",
            target=CHECK,
            value=checked.seconds("check"),
            equal=checked.equal,
        ),
    ]


def _children() -> float:
    """Processor seconds of finished child processes."""
    import os

    used = os.times()
    return used.children_user + used.children_system


def _python(*words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=own_path(), check=False)
    if done.returncode:
        raise ProbeError(f"bench row `startup`: {' '.join(words[:3])} failed: {done.stderr.strip()[-400:]}")
    return done
