"""Checkpoints that lie, are damaged, or want to run code: refused in one message, and nothing of theirs runs."""

from __future__ import annotations

import collections
import copy
import json
import os
import pickle
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hardship import trials
from safetensors.torch import load_file, save_file

from probe.backbones import facts_of, load, visual_count
from probe.errors import ProbeError

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 5, 31, 33, 64, 10**3, 10**6, 10**9, 2**31, 2**62, 10**30, 0.5, -0.5, 1e300,
    float("nan"), float("inf"), "", "a", "32", "gelu", [], [1], [[1, 2]], [[48, 48], [0, 0]], {}, {"a": 1},
    {"rope_type": "linear", "factor": 1e9}, "x" * 10_000,
]  # fmt: skip
FILES = ("config.json", "vision_config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "checkpoint"))


def spoil(folder: Path, name: str, **changes: Any) -> None:
    settings = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(settings | changes))


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)

    def __init__(self, mark: Path) -> None:
        self.mark = mark


def plant(folder: Path, mark: Path) -> None:
    """Pickles and code wherever a loader might look for them."""
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pth", "rng_state.pkl", "x.ckpt"):
        (folder / name).write_bytes(pickle.dumps(Evil(mark)))
    code = f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n"
    for name in ("modeling_llada.py", "configuration_llada.py", "tokenization_x.py", "__init__.py", "builder.py"):
        (folder / name).write_text(code)
    auto = {
        "AutoConfig": "configuration_llada.C",
        "AutoModel": "modeling_llada.M",
        "AutoModelForCausalLM": "modeling_llada.M",
    }
    spoil(folder, "config.json", auto_map=auto, trust_remote_code=True, _name_or_path=str(folder))
    tokenizer = {"AutoTokenizer": ["tokenization_x.T", "tokenization_x.T"]}
    spoil(folder, "tokenizer_config.json", auto_map=tokenizer, tokenizer_class="T", trust_remote_code=True)


def test_planted_pickles_and_code_never_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    plant(folder, mark)
    model = load(folder)
    assert facts_of(folder).layers == 4 and visual_count(folder, [(96, 96)]) > 0
    assert model.encode([], "What?").n_visual == 0
    (folder / "model.safetensors").unlink()
    with pytest.raises(ProbeError, match="pickles .* can run code and are not read"):
        load(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(ProbeError, match="not a complete safetensors file"):
        load(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
    with pytest.raises(ProbeError, match="no safetensors file"):
        load(folder)
    assert not mark.exists()
    os.system(f"touch {mark}.works")  # what the pickles would have done does work here
    assert Path(f"{mark}.works").exists()


def test_a_chat_template_cannot_reach_python(folder: Path, tmp_path: Path) -> None:
    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch ran') }}"
    spoil(folder, "tokenizer_config.json", chat_template=reach)
    (folder / "chat_template.jinja").write_text(reach)
    model = load(folder)
    with pytest.raises(Exception, match="unsafe|undefined|has no"):
        model.encode([], "What?")
    assert not (Path.cwd() / "ran").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(folder: Path, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    weights[name][3, 5] = value
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ProbeError, match=rf"{name} holds 1 values that are NaN or infinite"):
        load(folder)


def test_weights_of_an_odd_type(folder: Path) -> None:
    weights = {k: v.to(torch.int8) for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ProbeError, match=r"stored as torch.int8; say in which type to run"):
        load(folder)


def test_truncated_and_flipped_shards(folder: Path) -> None:
    """A shard cut anywhere is refused; a flipped bit of the header never becomes another model silently."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    for share in (0, 4, 8, 100, header, header + 9, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:share])
        with pytest.raises(ProbeError, match="not a complete safetensors file"):
            load(folder)
    path.write_bytes(content)
    before = {k: v.clone() for k, v in load(folder).state_dict().items()}
    rng = random.Random(3)
    for _ in range(40):
        spoilt = bytearray(content)
        spoilt[rng.randrange(8 + header)] ^= 1 << rng.randrange(8)
        path.write_bytes(spoilt)
        try:
            after = load(folder).state_dict()
        except ProbeError:
            continue
        assert all(before[k].equal(v) for k, v in after.items())  # a comment, or blanks between the entries


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("config.json", {"hidden_size": 64}),
        ("config.json", {"num_hidden_layers": 5}),
        ("config.json", {"num_hidden_layers": 3}),
        ("config.json", {"num_hidden_layers": 10**9}),
        ("config.json", {"intermediate_size": 65}),
        ("config.json", {"num_key_value_heads": 1}),
        ("config.json", {"num_attention_heads": 0}),
        ("vision_config.json", {"hidden_size": 48}),
        ("vision_config.json", {"num_hidden_layers": 10**7}),
        ("vision_config.json", {"patch_size": 7}),
    ],
)
def test_a_config_that_lies_about_its_sizes(folder: Path, name: str, changes: dict[str, int]) -> None:
    spoil(folder, name, **changes)
    start = time.monotonic()
    with pytest.raises(ProbeError):
        load(folder)
    assert time.monotonic() - start < 20


def paths(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = list(data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ())
    for key, value in items[:40]:
        yield from paths(value, (*path, key))


def campaign(folder: Path, seed: int, count: int) -> collections.Counter[str]:
    """Replace one value of one of a checkpoint's small files; ask for facts, for a count, and load."""
    said: collections.Counter[str] = collections.Counter()
    whole = {name: (folder / name).read_text() for name in FILES}
    rng = random.Random(seed)
    for _ in range(count):
        name = rng.choice(FILES)
        data = copy.deepcopy(json.loads(whole[name]))
        path, odd = rng.choice(list(paths(data))), copy.deepcopy(rng.choice(ODD))
        if path:
            place = data
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = odd
        else:
            data = odd
        (folder / name).write_text(json.dumps(data))
        for act in (lambda: facts_of(folder), lambda: visual_count(folder, [(96, 96)]), lambda: load(folder)):
            start = time.monotonic()
            try:
                act()
                said["accepted"] += 1
            except ProbeError:
                said["refused"] += 1
            except Exception as error:
                raise AssertionError(f"{name} {path} = {odd!r:.60}: {type(error).__name__}: {error}") from error
            assert time.monotonic() - start < 30, (name, path, odd)
        (folder / name).write_text(whole[name])
    return said


def test_odd_settings_are_refused_or_harmless(folder: Path) -> None:
    said = campaign(folder, 1, 60)
    assert said["refused"] > 20 and said["accepted"] > 20


@pytest.mark.slow
def test_campaign_odd_settings(folder: Path) -> None:
    said = campaign(folder, 2, trials(3000))
    print(f"\ncheckpoints with one odd setting: {dict(said)}; no traceback")
