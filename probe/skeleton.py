"""What `probe new` writes: a commented recipe, and on request a plugin with a score of one's own and its test."""

from __future__ import annotations

import re
from keyword import iskeyword
from pathlib import Path

from probe.errors import ProbeError
from probe.registry import scores

RECIPE = """\
# {name}: say here in one line what it does, and where the idea comes from.
# `probe check {name}.yaml{plugin}` says in words what it will do; `probe run {name}.yaml{plugin}` runs it beside the
# unpruned model. Both take --backbone, and --set keep=0.5 turns a dial.

schema: 1
name: {name}
about: keep the visual tokens that {what}
dial:
  keep: 0.25      # share of the visual tokens that stay (0.25, 25%), or a number of them (64)
  start: 0.0      # share of the steps that run unpruned first (50%), or a step
  layer: 2        # the first layer that runs without the others: 2, -1 (the last one), 50%
probes:
  # An intervention: where it acts, what each visual token is worth, which ones stay, what becomes of the others.
  - name: prune
    at: {{site: layer.input, layer: $layer, steps: {{from: $start}}}}   # or {{site: before_lm}}, before the first layer
    score: {score}
    select: {{top_k: {{keep: $keep}}}}                              # the best; or greedy_diverse, stride, ...
    do: {{drop: {{positions: keep, lasts: forward}}}}               # lasts: generation takes them away for good
  # And something to look at: how the answer's attention divides, in every layer and at every step.
  - name: look
    at: {{site: layer.attention, layers: all}}
    record: [attention_mass]
"""

PLUGIN = '''\
"""{name}: a score of one's own."""

import probe
from torch import Tensor


@probe.score
def {word}(hidden: Tensor, *, power: float = 2.0) -> Tensor:
    """How far a token lies from the mean of all visual tokens."""
    # `hidden` is (n, width): the states of the n visual tokens of one sample, where the recipe's probe stands. Name
    # other tensors and they are given: embedding, keys, received, box, view, generator (docs/python.md lists them).
    # Parameters behind the * are what a recipe may set; their annotations check it.
    away = hidden.float() - hidden.float().mean(0)
    return away.abs().pow(power).sum(-1)  # (n,) float32, higher means keep
'''

TEST = '''\
"""What {word} promises. Run with `pytest {test}`."""

from pathlib import Path

import probe
import torch
from probe.plugins import load_plugins
from probe.registry import scores

HERE = Path(__file__).parent
load_plugins([HERE / "{file}"])


def test_a_token_far_from_the_others_is_worth_most():
    hidden = torch.zeros(5, 8)
    hidden[3] = 1.0
    score = scores["{word}"].function(hidden)
    assert score.shape == (5,)
    assert score.argmax() == 3


def test_the_recipe_keeps_as_many_tokens_as_it_says(tmp_path):
    recipe = probe.load_recipe(HERE / "{recipe}", ["keep=16", "start=0%"])
    short = recipe.with_sets(["generate.gen_length=4", "generate.steps=2"])
    result = probe.run(short, limit=1, out=tmp_path, baseline=False)
    assert result.failed == 0
    with probe.open(result.trace) as trace:
        assert (trace.row("visual_tokens", 0)[:, recipe.dial["layer"] :] == 16).all()
'''

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,60}")


def write(name: str, folder: Path, *, plugin: bool = False) -> list[Path]:
    """Write `FOLDER/NAME.yaml`, and with `plugin` `NAME.py` and `test_NAME.py`. Nothing that exists is replaced."""
    if not _NAME.fullmatch(name):
        raise ProbeError(f"`{name}` cannot name a recipe here: use letters, digits, _ and -, and begin with a letter")
    word = name.replace("-", "_")
    if plugin:
        import probe.vocabulary  # noqa: F401  (the built-in scores must be known)

        if word in scores or iskeyword(word) or word in ("probe", "torch"):
            raise ProbeError(f"a score cannot be called `{word}`: that name is taken; choose another")
    names = {"recipe": f"{name}.yaml", "file": f"{word}.py", "test": f"test_{word}.py"}
    if plugin:
        fill = {
            "what": f"{word} finds worth most",
            "score": f"{{{word}: {{power: 2.0}}}}",
            "plugin": f" --plugin {word}.py",
        }
    else:
        fill = {
            "what": "the answer attends to most",
            "score": "{attention: {layer: -1, queries: answer}}",
            "plugin": "",
        }
    texts = {names["recipe"]: RECIPE.format(name=name, **fill)}
    if plugin:
        texts |= {
            names["file"]: PLUGIN.format(name=name, word=word),
            names["test"]: TEST.format(word=word, **names),
        }
    paths = {folder / file: text for file, text in texts.items()}
    for path in paths:
        if path.exists():
            raise ProbeError(f"{path} is there already; choose another name, or another folder with -o")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in paths.items():
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ProbeError(f"cannot write into {folder}: {error.strerror}; name another folder with -o") from None
    return list(paths)
