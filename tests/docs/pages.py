"""Documentation as something that runs: the fenced blocks of a page, in order, in one empty folder.

What a block means follows from its language:

- `sh`: commands, one per line. `probe ...` runs in this process; `python3 -m venv ...` (the README's two
  installations, which continuous integration runs as they stand) is not run here.
- `yaml`: a recipe, or probes of one; it must compile. `python`: runs. Where the first line is `# NAME`, the block is
  written to the file NAME instead, for the commands that follow.
- `json`: a line of JSON Lines, written to `my.jsonl`.
- `text` after a `sh` or `python` block: what that printed. Numbers, bars and names of tasks may differ, words may not;
  a line `...` stands for lines left out. `error:` at its beginning means that the command ends with exit status 2.

To bring the printed outputs up to date: `python tests/docs/pages.py README.md docs/start.md` runs every command in full
and writes what it prints into the page.
"""

from __future__ import annotations

import io
import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PUBLISHED = "GSAI-ML/LLaDA-V"  # weights that no test downloads
WIDTH = 100
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and where it stands (the text's first line, and its span)."""

    kind: str
    text: str
    line: int
    span: tuple[int, int]

    @property
    def file(self) -> str | None:
        """The file that the block is, if its first line says so."""
        match = re.match(r"# ([\w-]+\.(?:yaml|py))\n", self.text)
        return match[1] if match else None


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page's text, in order."""
    found = []
    for match in _FENCE.finditer(page):
        text = re.sub(rf"^{match[1]}", "", match[3], flags=re.MULTILINE)
        found.append(Block(match[2], text, page[: match.start(3)].count("\n") + 1, match.span(3)))
    return found


@dataclass
class Printed:
    """What a block printed, and its exit status (the last command's)."""

    out: str = ""
    err: str = ""
    status: int = 0


def prepare(folder: Path) -> None:
    """What a page may take for granted: the checkout's recipes, and pictures of the reader's own."""
    from probe.zoo.world import draw

    (folder / "recipes").symlink_to(REPO / "recipes")
    draw("words", 11).image.save(folder / "page.png")
    draw("scene", 11).image.save(folder / "cat.png")


@contextmanager
def fresh_registries() -> Iterator[None]:
    """Every command is a process of its own to the reader: what a plugin registers is gone afterwards."""
    import probe.vocabulary  # noqa: F401
    from probe import registry
    from probe.backbones import backbones
    from probe.probe_code import CODE_PROBES

    kinds = [kind for kind in vars(registry).values() if isinstance(kind, registry.Registry)]
    kinds.append(backbones)
    before = [dict(kind._entries) for kind in kinds]
    codes = dict(CODE_PROBES)
    try:
        yield
    finally:
        for kind, entries in zip(kinds, before, strict=True):
            kind._entries.clear()
            kind._entries.update(entries)
        CODE_PROBES.clear()
        CODE_PROBES.update(codes)


def shortened(words: list[str]) -> list[str]:
    """A `probe run` that a test can afford: two samples, short answers, weights at hand."""
    words = ["miniature" if word == PUBLISHED else word for word in words]
    if "--limit" not in words and not any(w.startswith("data.limit") for w in words):
        words += ["--limit", "2"]
    if "--image" in words or any(w.endswith(".jsonl") or w == "world/read_words" for w in words):
        words += ["--set", "generate.gen_length=8", "--set", "generate.steps=4"]
    return words


def shortened_tools(words: list[str]) -> list[str]:
    """The same for the commands that measure: one sample, two steps, and of all pruners some."""
    quick = ["--set", "generate.gen_length=4", "--set", "generate.steps=2"]
    if words in (["budget"], ["budget", "--keep", "0.25"]):
        words = [*words, "fastv", "trim"]
    return [*words, *quick] if "generate.steps" not in " ".join(words) else words


def command(line: str, *, short: bool) -> Printed:
    """Run one `probe` command here, as the console command would."""
    from probe.__main__ import load_cli

    words = shlex.split(line, comments=True)[1:]
    if short and words[:1] == ["run"]:
        words = shortened(words)
    if short and words[:1] == ["sweep"] and "--plan" not in words:
        words = [*words, "--limit", "1"]
    if short and words[:1] in (["budget"], ["calibrate"]):
        words = shortened_tools(words)
    cli = load_cli()
    cli.out.width = cli.err.width = WIDTH
    out, err, argv, status = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = ["probe", *words]
    try:
        with redirect_stdout(out), redirect_stderr(err), fresh_registries():
            cli.main()
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.argv = argv
    return Printed(out.getvalue(), err.getvalue().strip() + "\n", status)


def run(block: Block, *, short: bool = True) -> Printed:
    """Run a block in the present folder."""
    if block.kind == "json":
        Path("my.jsonl").write_text(block.text)
    elif block.file is not None:
        Path(block.file).write_text(block.text)
    elif block.kind == "sh":
        return _commands(block, short=short)
    elif block.kind == "yaml":
        compile_yaml(block.text)
    elif block.kind == "python":
        path = Path(f"_block_{block.line}.py")
        path.write_text(block.text)
        out = io.StringIO()
        with redirect_stdout(out), fresh_registries():
            runpy.run_path(str(path))
        return Printed(out.getvalue())
    return Printed()


def _commands(block: Block, *, short: bool) -> Printed:
    printed = Printed()
    for line in block.text.splitlines():
        if line.startswith("python3 -m venv ") or not line.strip():
            continue
        if not line.startswith("probe "):
            raise AssertionError(f"line {block.line}: a command that is not known here: {line}")
        printed = command(line, short=short)
        if printed.status and line != block.text.splitlines()[-1]:
            raise AssertionError(f"{line}\n{printed.err}")
    return printed


def compile_yaml(text: str) -> None:
    """A recipe, or a list of probes put into one, compiles on the miniature."""
    from probe.backbones import facts_of
    from probe.compile import compile_recipe
    from probe.recipe import parse_recipe

    if not re.search(r"^schema:", text, flags=re.MULTILINE):
        text = f"schema: 1\nname: snippet\ndial: {{keep: 0.5}}\n{'' if 'probes:' in text else 'probes:'}\n{text}"
    compile_recipe(parse_recipe(text), facts_of("miniature"))


_NUMBER = re.compile(r"[(±+-]?[\d.][\d.,+±ex%:TZ-]*[)%,;:]*|[0-9a-f]{8,}[,)]*|[-—]|[kMGTP]?(FLOP|B)?[,)]*")
_NAMES = re.compile(r"\(?(world/\w+|exact_match|edit_similarity|token_accuracy)[,)]*")
_BARS = str.maketrans(dict.fromkeys("▁▂▃▄▅▆▇█", " "))


def shape(text: str) -> list[str]:
    """The words of an output, with every run of numbers as one `#`."""
    words: list[str] = []
    for word in text.translate(_BARS).split():
        number = _NUMBER.fullmatch(word) or _NAMES.fullmatch(word)
        if not number:
            words.append(word)
        elif words[-1:] != ["#"]:
            words.append("#")
    return words


def differs(told: str, printed: str) -> str:
    """Why a printed output is not the one that the page tells; empty if it is."""
    left = shape(printed)
    parts = [shape(part) for part in re.split(r"^\.\.\.$", told, flags=re.MULTILINE)]
    for part in parts:
        if len(parts) == 1:
            at = 0 if left == part else -1
        else:
            at = next((i for i in range(len(left) - len(part) + 1) if left[i : i + len(part)] == part), -1)
        if at < 0:
            same = next(
                (i for i, (a, b) in enumerate(zip(part, left, strict=False)) if a != b), min(len(part), len(left))
            )
            here, there = " ".join(part[same : same + 8]), " ".join(left[same : same + 8])
            return f"the page tells `{here}` where this was printed: `{there}`\n{printed}"
        left = left[at + len(part) :]
    return ""


def check(page: Path) -> list[str]:
    """Run a page in the present folder. What is wrong with it, one text per block."""
    wrong: list[str] = []
    last = Printed()
    found = blocks(page.read_text())
    for i, block in enumerate(found):
        where = f"{page.name}, line {block.line}"
        if block.kind == "text":
            expected = last.err if block.text.startswith("error:") else last.out
            if why := differs(block.text, expected):
                wrong.append(f"{where}: {why}")
            continue
        follows = found[i + 1].text if i + 1 < len(found) and found[i + 1].kind == "text" else ""
        try:
            last = run(block)
        except Exception as error:
            wrong.append(f"{where}: {type(error).__name__}: {error}")
            continue
        if last.status != (2 if follows.startswith("error:") else 0):
            wrong.append(f"{where}: exit status {last.status}\n{last.err}{last.out}")
    return wrong


def renewed(told: str, printed: str) -> str:
    """What a page tells, with what is printed now; where lines are left out, line by line, found by the first word."""
    lines = [line.rstrip() for line in printed.strip("\n").splitlines()]
    if "..." in told.splitlines():
        by_word = {line.split()[0]: line for line in reversed(lines) if line.strip()}
        lines = [by_word.get(line.split()[0], line) if line.strip() else line for line in told.splitlines()]
    return "\n".join(lines) + "\n"


def refresh(page: Path) -> None:
    """Run a page in full and write the outputs into it."""
    text = page.read_text()
    last = Printed()
    changes: list[tuple[tuple[int, int], str]] = []
    found = blocks(text)
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block.kind != "text":
            last = run(block, short=after is None or after.kind != "text")
        else:
            changes.append((block.span, renewed(block.text, last.err if block.text.startswith("error:") else last.out)))
    for (start, end), new in reversed(changes):
        text = text[:start] + new + text[end:]
    page.write_text(text)


def main() -> None:
    """Refresh the pages named on the command line."""
    import tempfile

    sys.path.insert(0, str(REPO))
    for name in sys.argv[1:]:
        page, home = Path(name).resolve(), Path.cwd()
        folder = Path(tempfile.mkdtemp())
        try:
            prepare(folder)
            os.chdir(folder)
            refresh(page)
        finally:
            os.chdir(home)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
