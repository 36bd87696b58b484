"""Every command and snippet of the pages runs, what they print is what they tell, and what they point to is there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pages
import pytest
from typer.main import get_command

from probe.__main__ import load_cli

DOCS = pages.REPO / "docs"
NAMES = (
    "start", "data", "study", "python", "pruners", "decoding", "backbones", "adapter", "architecture", "sweeps",
)  # fmt: skip
OURS = [pages.REPO / "README.md", *(DOCS / f"{name}.md" for name in NAMES)]
ALL = [pages.REPO / "README.md", *sorted(DOCS.glob("*.md"))]
OTHERS = [page for page in ALL if page not in OURS]  # their recipes and outputs have tests of their own
README = OURS[0].read_text()
RUN = (
    "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt . && "
    ".venv/bin/probe run recipes/quickstart.yaml"
)
TEST = "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[dev]' && .venv/bin/pytest"


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the checkout's recipes and some pictures in it, to run a page in."""
    pages.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", OURS, ids=lambda p: p.stem)
def test_everything_on_the_page_runs_and_prints_what_it_tells(page: Path, desk: Path) -> None:
    wrong = pages.check(page)
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize("page", OTHERS, ids=lambda p: p.stem)
def test_python_on_other_pages_compiles_and_their_commands_exist(page: Path) -> None:
    commands = set(commands_of_the_program())
    for block in pages.blocks(page.read_text()):
        if block.kind == "python":
            compile(block.text, f"{page.name}:{block.line}", "exec")
        if block.kind in ("sh", ""):
            for word in re.findall(r"^probe (\S+)", block.text, flags=re.MULTILINE):
                assert word in commands, f"{page.name}:{block.line}: there is no command `probe {word}`"


def test_python_on_the_page_of_recipes_runs(desk: Path) -> None:
    found = [b for b in pages.blocks((DOCS / "recipes.md").read_text()) if b.kind == "python"]
    assert found
    for block in found:
        pages.run(block)


@pytest.mark.parametrize("page", ALL, ids=lambda p: p.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_two_commands_stand_in_blocks_of_their_own() -> None:
    installing = [b.text for b in pages.blocks(README) if b.kind == "sh" and "venv" in b.text]
    assert installing == [f"{RUN}\n", f"{TEST}\n"]
    assert (pages.REPO / "constraints.txt").is_file()


def test_the_ten_line_recipe_has_ten_lines() -> None:
    recipe = next(b.text for b in pages.blocks(README) if b.kind == "yaml")
    assert len(recipe.splitlines()) == 10


def test_python_on_the_readme_is_short() -> None:
    code = next(b.text for b in pages.blocks(README) if b.kind == "python")
    assert len([line for line in code.splitlines() if line.strip()]) < 10


def test_the_backbone_of_ones_own_is_short() -> None:
    (code,) = [b for b in pages.blocks((DOCS / "adapter.md").read_text()) if b.file]
    assert len(code.text.splitlines()) < 150


def test_the_readme_lists_the_commands() -> None:
    assert re.findall(r"^\| `probe (\w+)", README, flags=re.MULTILINE) == commands_of_the_program()


def commands_of_the_program() -> list[str]:
    return list(get_command(load_cli().app).commands)


def test_public_names_are_listed() -> None:
    import probe

    table = (DOCS / "python.md").read_text().split("## The public names")[1].split("\n\n`import probe`")[0]
    assert set(re.findall(r"`probe\.(\w+)", table)) == set(probe.__all__)


def test_every_identity_names_a_test_that_exists() -> None:
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", (DOCS / "architecture.md").read_text())
    assert len(named) >= 20
    for file, name in named:
        assert f"def {name}(" in (pages.REPO / file).read_text(), f"{file} has no {name}"


def test_every_file_that_the_architecture_names_exists() -> None:
    text = (DOCS / "architecture.md").read_text() + (DOCS / "backbones.md").read_text()
    named = set(re.findall(r"`((?:probe/|backbones/|tests/|recipes/)[\w/]+(?:\.\w+)?/?)`", text))
    for name in named - {"probe/_cli.py"}:  # that one is made with the wheel
        there = [pages.REPO / name, pages.REPO / "probe" / name, pages.REPO / "probe" / f"{name}.py"]
        assert any(p.exists() for p in there), name


MODULES = {"pyyaml": "yaml", "pillow": "PIL", "huggingface-hub": "huggingface_hub"}


def dependencies() -> tuple[set[str], set[str]]:
    """What the project declares, and which of it the source imports."""
    project = tomllib.loads((pages.REPO / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[><=!~\[]", d)[0] for d in project["dependencies"]}
    source = "\n".join(p.read_text() for p in [pages.REPO / "cli.py", *(pages.REPO / "probe").rglob("*.py")])
    pattern = r"^\s*(?:import|from) {}\b"
    return declared, {d for d in declared if re.search(pattern.format(MODULES.get(d, d)), source, flags=re.MULTILINE)}


def test_every_dependency_is_in_use_and_has_its_line() -> None:
    text = (DOCS / "architecture.md").read_text()
    table = re.findall(r"^\| ([^|]+) \|", text.split("## Dependencies")[1].split("##")[0], flags=re.MULTILINE)
    extras = tomllib.loads((pages.REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    optional = {re.split(r"[><=!~\[]", d)[0] for kind, names in extras.items() if kind != "dev" for d in names}
    listed = {name.strip() for row in table for name in row.split(",")} - {"package", "---"} - optional
    declared, used = dependencies()
    assert listed == declared == used


def test_a_page_that_tells_something_else_is_found_out(desk: Path) -> None:
    page = desk / "page.md"
    page.write_text("```sh\nprobe verify nowhere.h5\n```\n```text\nintact\n```\n```python\n1 / 0\n```\n")
    wrong = pages.check(page)
    assert [w.split(":")[0] for w in wrong] == ["page.md, line 2", "page.md, line 5", "page.md, line 8"]
    assert pages.differs("mean 3.5 of world/a\n", "mean 17 of world/b, world/c\n") == ""
    assert pages.differs("first 1\n...\nlast 2\n", "first 9\nmiddle\nlast 8\n") == ""
    assert pages.differs("first 1\n", "first 9\nmiddle\n")
    assert pages.differs("least 1\n", "greatest 1\n")
