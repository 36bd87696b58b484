"""Who may import whom, who may change a sequence's length, who may touch a library: read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PROBE = REPO / "probe"
FILES = [REPO / "cli.py", *sorted(PROBE.rglob("*.py"))]


def module(path: Path) -> str:
    """`probe/scores/__init__.py` is `scores`, `probe/backbones/base.py` is `backbones.base`, `cli.py` is `cli`."""
    inside = path.relative_to(PROBE if PROBE in path.parents else REPO).with_suffix("")
    return ".".join(inside.parts).removesuffix(".__init__")


MODULES = {module(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def imports(tree: ast.Module) -> set[tuple[str, str]]:
    """`(module, name)` of everything that is imported, wherever; a whole module has the name `*`."""
    found: set[tuple[str, str]] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "*") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in line {node.lineno}"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}".removeprefix("probe.")
                if str(node.module).split(".")[0] == "probe" and whole in MODULES:
                    found.add((f"probe.{whole}", "*"))
                else:
                    found.add((str(node.module), alias.name))
    return found


def ours_in(tree: ast.Module) -> set[str]:
    """Modules of this package that a tree imports, without the leading `probe.`."""
    return {m.removeprefix("probe.") for m, _ in imports(tree) if m.split(".")[0] == "probe"}


def ours(name: str) -> set[str]:
    """Modules of this package that a module imports."""
    return ours_in(MODULES[name])


def taken(name: str, source: str) -> set[str]:
    """Names that a module takes from another one of ours."""
    return {what for m, what in imports(MODULES[name]) if m == f"probe.{source}"}


COMMAND_LINE = {name for name in MODULES if name == "cli" or name.startswith("cli_")}
"""The files of the command line."""


def users(library: str) -> set[str]:
    """Modules that import a library."""
    return {name for name in MODULES if any(m.split(".")[0] == library for m, _ in imports(MODULES[name]))}


EXACTLY: dict[str, set[str]] = {
    "site": set(),
    "errors": set(),
    "cost": set(),
    "closed_forms": set(),
    "data.strings": set(),
    "data.benchmarks": {"data.strings"},
    "data.letters": {"data.strings"},
    "data.vqa": {"data.strings"},
    "data.totals": set(),
    "data.metrics": {"data.benchmarks", "data.letters", "data.strings", "data.vqa"},
    "timing": set(),
    "heap": set(),
    "upload": set(),
    "attend": {"parallel", "site"},
    "parallel": set(),
    "trace_journal": set(),
    "registry": {"errors"},
    "surgery": {"site", "upload"},
    "ledger": {"site", "surgery"},
    "store": {"site", "surgery"},
    "signals": {"registry", "site"},
    "loop": {"canvas", "decoding", "errors", "site", "upload"},
    "canvas": {"backbones.base", "site", "surgery"},
    "signals.encoder": {"registry", "site"},
    "backbones.base": {"backbones.rows", "cost", "errors", "site"},
    "backbones.rows": set(),
    "decoding.schedule": {"errors"},
    "decoding.renoise": {"decoding", "errors", "registry"},
    "decoding.stop": set(),
    "decoding.unmask": {"upload"},
    "decoding.draw": set(),
    "decoding.policy": {"decoding", "site"},
    "decoding.rule": {"decoding", "errors"},
}
"""Modules that may import just these of ours."""


@pytest.mark.parametrize("name", EXACTLY)
def test_lower_layers_import_no_more_than_they_may(name: str) -> None:
    found = {"decoding" if m.startswith("decoding") else m for m in ours(name)}
    assert found <= EXACTLY[name]


PACKAGES = {
    "scores": {"cost", "errors", "registry", "site"},
    "selections": {"errors", "registry", "site"},
    "operations": {"errors", "registry", "scores", "selections", "site", "surgery"},
}
"""What the files of a package may import besides each other."""


@pytest.mark.parametrize("package", PACKAGES)
def test_the_vocabulary_knows_no_model_and_no_loop(package: str) -> None:
    for name in (n for n in MODULES if n.split(".")[0] == package):
        assert {m.split(".")[0] for m in ours(name)} - {package} <= PACKAGES[package], name
        assert taken(name, "surgery") <= {"Positions"}
        assert taken(name, "cost") <= {"pairwise"}


def test_backbones_know_no_probe_no_loop_no_trace() -> None:
    allowed = {"attend", "cost", "errors", "parallel", "registry", "site"}
    for name in (n for n in MODULES if n.split(".")[0] == "backbones"):
        assert {m for m in ours(name) if m.split(".")[0] != "backbones"} <= allowed, name
        assert taken(name, "attend") <= {"KERNELS", "kernel_name"}, name


def test_only_its_state_changes_the_length_of_a_view() -> None:
    """Views of the encoder are sequences of their own: `encoder_state` shortens them, `encoder_pass` says when."""
    assert {n for n in MODULES if "shorten" in taken(n, "encoder_state")} == {"encoder_pass"}
    assert ours("encoder_state") <= {"backbones.base", "errors", "site"}


def test_only_the_engine_knows_both_the_loop_and_the_model() -> None:
    both = {n for n in MODULES if "loop" in ours(n) and any(m.split(".")[0] == "backbones" for m in ours(n))}
    both = {n for n in both if n.split(".")[0] != "doctor"}  # which examines the one through the other
    assert both <= {"tracer", "pass_state", "pass_source", "looking", "generate", "runner", "calibrate_run"}


def test_recipes_and_traces_know_nothing_of_the_engine() -> None:
    engine = {"loop", "tracer", "pass_state", "looking", "generate", "runner", "canvas", "surgery", "backbones"}
    for name in MODULES:
        if name.startswith(("recipe", "trace_")) or name in ("compile", "compile_call", "explain", "trace"):
            assert not {m.split(".")[0] for m in ours(name)} & engine, name


def test_each_library_has_its_place() -> None:
    assert users("h5py") == {"trace"}
    assert users("xarray") == {"trace_reader"}
    assert users("nnsight") == {"probe_code"}
    assert users("yaml") == {"recipe_yaml"}
    assert users("typer") == COMMAND_LINE
    assert users("av") == {"data.video"}
    assert users("datasets") == {"data.hub"}
    assert users("lmms_eval") == {"data.harness", "lmms", "lmms_adapter", "lmms_score"}
    assert users("ray") == {"sweep_ray"}
    assert all(n == "attend" or n.startswith(("backbones.", "zoo.")) for n in users("transformers"))


def calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a module, with the name of the innermost function around it."""

    def walk(node: ast.AST, function: str) -> Iterator[tuple[str, ast.Call]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call):
                yield function, child
            inside = child.name if isinstance(child, ast.FunctionDef) else function
            yield from walk(child, inside)

    return walk(MODULES[name], "")


PICKING = {"gather", "index_select", "scatter", "scatter_", "narrow", "take_along_dim", "index_copy_", "index_fill_"}
ALONG_A_SEQUENCE = {
    ("tracer", "__call__"): "rows of the last hidden state for the head",
    ("pass_state", "_conditioned"): "noise that slots show, as the model wants it",
    ("canvas", "write"): "committed embeddings into rows that are there",
    ("looking", "received"): "one sample's columns of averaged attention",
    ("looking", "attended_rows"): "one sample's columns of attention rows",
    ("looking", "keys"): "one sample's keys of chosen rows",
    ("pass_source", "_projected"): "one sample's columns of attention",
    ("delta_cache", "_where"): "rows that a layer computes anew",
    ("delta_cache", "_chosen_rows"): "rows that a layer computes anew",
    ("delta_cache", "_forward"): "what those rows add to the residual stream",
    ("pass_source", "_keys"): "one sample's stored keys",
    ("attend", "_reweight"): "attention output of reweighted rows",
    ("attend", "_with_bias"): "mask rows of a chunk",
    ("signals", "visual_importance"): "attention from keys to visual indices",
    ("loop", "_carry_out"): "a snapshot of tokens",
    ("assemble", "_signal"): "answer slots that are open in both runs",
}
"""Functions outside of `surgery` that pick along dimension 1. None of them hands on a shortened sequence."""
OUTSIDE = ("zoo", "bench", "views", "data", "decoding", "scores", "selections", "operations", "decide")
"""Where the engine holds no sequence: a decoding policy has rows of answer slots, the vocabulary one sample's tokens,
and the bench compares with loops written by hand."""


def test_only_surgery_changes_the_length_of_a_sequence() -> None:
    """A layout is made in `surgery` alone; its knives are used by canvas and pass alone; nobody else picks rows."""
    engine = [n for n in MODULES if n.split(".")[0] not in OUTSIDE and n != "surgery"]
    engine = [n for n in engine if n == "backbones.base" or n.split(".")[0] not in ("backbones", "trace")]
    picking = set()
    for name in engine:
        for function, call in calls(name):
            called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            assert called != "Layout", f"{name} makes a layout"
            first = call.args[0] if call.args else None
            along = isinstance(first, ast.Constant) and first.value == 1
            if called in PICKING and (along or any(k.arg == "dim" for k in call.keywords)):
                picking.add((name, function))
    assert picking <= set(ALONG_A_SEQUENCE)
    knives = {"narrow", "hide", "take", "restore", "select", "extend", "resize", "take_columns", "put_columns"}
    users_of = {n for n in MODULES if taken(n, "surgery") & knives}
    assert users_of <= {"canvas", "pass_state", "store", "shadow", "delta_cache"}


def test_only_tracer_and_encoder_put_hooks_on_modules() -> None:
    hooking = {n for n in MODULES for _, c in calls(n) if "register_forward" in getattr(c.func, "attr", "")}
    assert {n for n in hooking if n.split(".")[0] != "doctor"} == {"tracer", "encoder"}


def test_the_command_line_computes_nothing_and_imports_nothing_heavy_at_its_top() -> None:
    for name in COMMAND_LINE:
        at_top = ast.Module([n for n in MODULES[name].body if isinstance(n, ast.Import | ast.ImportFrom)], [])
        assert ours_in(at_top) <= {"errors", *COMMAND_LINE}, name


def test_help_and_a_bare_import_load_no_heavy_library() -> None:
    code = (
        "import sys, probe\n"
        "from probe.__main__ import main\n"
        "sys.argv = ['probe', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'nnsight', 'h5py', 'numpy', 'PIL', 'pydantic', 'yaml'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {sorted(heavy)}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "run" in done.stdout
