"""Finding and reading checkpoints, and what is said when that fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from probe.backbones import backbones, facts_of, known_backbones, load, visual_count
from probe.backbones import checkpoint as files
from probe.backbones.tiny import write_tiny
from probe.errors import ProbeError


def shard(folder: Path, parts: int = 3) -> Path:
    """Split the weights of a checkpoint into several files with an index."""
    weights = load_file(folder / files.WEIGHTS)
    (folder / files.WEIGHTS).unlink()
    keys = sorted(weights)
    places = {}
    for part in range(parts):
        name = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        own = keys[part::parts]
        save_file({k: weights[k] for k in own}, folder / name)
        places |= dict.fromkeys(own, name)
    (folder / files.INDEX).write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    return folder


def test_shards_are_the_same_model(checkpoint):
    whole, split = checkpoint(), shard(checkpoint())
    for (name, a), (other, b) in zip(load(whole).state_dict().items(), load(split).state_dict().items(), strict=True):
        assert name == other
        assert a.equal(b)


def test_missing_shard(checkpoint):
    folder = shard(checkpoint())
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ProbeError, match=r"lacks 1 of 3 weight files: model-00002-of-00003.safetensors"):
        load(folder)


@pytest.mark.parametrize(
    "index", ["{}", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": "x.bin"}}', "["]
)
def test_bad_index(checkpoint, index):
    folder = checkpoint()
    (folder / files.INDEX).write_text(index, encoding="utf-8")
    with pytest.raises(ProbeError, match=r"model.safetensors.index.json"):
        load(folder)


def test_nothing_there(tmp_path):
    with pytest.raises(ProbeError, match="no such folder"):
        load(tmp_path / "absent")
    with pytest.raises(ProbeError, match=r"no config.json; it holds nothing"):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ProbeError, match=r"it holds notes.txt"):
        load(tmp_path)
    with pytest.raises(ProbeError, match="is a file"):
        load(tmp_path / "notes.txt")


def test_pickles_are_refused(checkpoint):
    folder = checkpoint()
    (folder / files.WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(ProbeError, match=r"pickles \(pytorch_model.bin\), which can run code and are not read"):
        load(folder)


def test_no_weights(checkpoint):
    folder = checkpoint()
    (folder / files.WEIGHTS).unlink()
    with pytest.raises(ProbeError, match=r"no model.safetensors and no model.safetensors.index.json; it holds config"):
        load(folder)
    assert facts_of(folder).layers == 2


def test_truncated_weights(checkpoint):
    folder = checkpoint()
    data = (folder / files.WEIGHTS).read_bytes()
    (folder / files.WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(ProbeError, match="not a complete safetensors file"):
        load(folder)


def test_broken_config(checkpoint):
    folder = checkpoint()
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ProbeError, match=r"config.json cannot be read as JSON"):
        load(folder)


def test_names_and_shapes_are_checked_before_anything_is_read(checkpoint):
    folder = checkpoint()
    weights = load_file(folder / files.WEIGHTS)
    gone = [k for k in weights if "layers.1.self_attn" in k and "model.layers" in k]
    for key in [*gone, "model.norm.weight", "model.image_newline"]:
        del weights[key]
    weights["model.extra"] = torch.zeros(2, 3)
    weights["lm_head.weight"] = torch.zeros(4, 32)
    save_file(weights, folder / files.WEIGHTS)
    with pytest.raises(ProbeError) as caught:
        load(folder)
    message = str(caught.value)
    assert "6 missing: " in message
    assert "and 1 more" in message
    assert "1 unexpected: model.extra [2, 3]" in message
    assert "lm_head.weight [4, 32] instead of [320, 32]" in message


def test_another_kind_of_model(checkpoint):
    with pytest.raises(ProbeError, match=r"model_type 'llava' in config.json is of no known backbone: .*llada_v"):
        load(checkpoint(model_type="llava"))


def test_hub(checkpoint, monkeypatch, tmp_path):
    """A Hub id is fetched through huggingface_hub: safetensors and small files only, at the revision asked for."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = shutil.move(checkpoint(), tmp_path / commit)
    asked = []

    def snapshot_download(name, *, revision=None, allow_patterns=None):
        asked.append((name, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = load("someone/a-model", revision="main")
    assert (model.source, model.revision) == ("someone/a-model", commit)
    assert asked == [("someone/a-model", "main", files.PATTERNS)]
    assert not any(p.endswith((".bin", ".py", ".pt")) for p in files.PATTERNS)
    assert facts_of("someone/a-model").width == 32
    assert "*.safetensors" not in asked[-1][2]


def test_hub_unreachable(monkeypatch):
    def snapshot_download(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ProbeError, match=r"`someone/a-model` at revision v2 is no folder here .*OSError: no route"):
        load("someone/a-model", revision="v2")


def test_facts_of_the_published_model_need_no_download(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("a download"))
    facts = facts_of("GSAI-ML/LLaDA-V")
    assert visual_count("GSAI-ML/LLaDA-V", [(640, 480)]) == 2929
    assert (facts.layers, facts.heads, facts.width, facts.vocabulary, facts.encoder_layers) == (
        32,
        32,
        4096,
        126349,
        26,
    )


def test_known_backbones():
    known = {k.name: k for k in known_backbones()}
    assert known["GSAI-ML/LLaDA-V"].width == 4096
    for name, info in known.items():
        facts = facts_of(name)
        assert (info.layers, info.width, info.vocabulary) == (facts.layers, facts.width, facts.vocabulary)
        assert info.about


def test_fingerprint(checkpoint):
    one, same, other = checkpoint(), checkpoint(), checkpoint(seed=1)
    prints = [files.resolve(f).fingerprint for f in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]


def test_fingerprint_of_large_files_samples_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_SAMPLE", 256)
    weights = {"a": torch.zeros(50_000), "b": torch.zeros(50_000)}
    save_file(weights, tmp_path / files.WEIGHTS)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    before = files.Checkpoint(tmp_path, "x").fingerprint
    save_file({k: v + 1 for k, v in weights.items()}, tmp_path / files.WEIGHTS)
    assert files.Checkpoint(tmp_path, "x").fingerprint != before


def test_an_installed_adapter_is_found(checkpoint, monkeypatch):
    """A plugin registers a function with `accepts`; `load` hands it the checkpoint and the options."""
    folder, asked = checkpoint(model_type="other"), {}

    class Adapter:
        @classmethod
        def from_checkpoint(cls, checkpoint, **options):
            asked.update(options, folder=checkpoint.folder)
            return cls()

    monkeypatch.setattr(backbones, "_entries", dict(backbones._entries))
    backbones.register(lambda: Adapter, name="other", accepts=lambda config: config["model_type"] == "other")
    assert isinstance(load(folder, dtype="float64", twist=3), Adapter)
    assert asked == {"folder": folder, "device": "cpu", "dtype": "float64", "attention": None, "twist": 3}
    backbones.register(lambda: Adapter, name="rival", accepts=lambda config: True)
    with pytest.raises(ProbeError, match="claimed by several backbones: other, rival"):
        load(folder)


PICTURES = [(120, 80), (64, 200)]
OPTIONS = [
    ("rp-yu/Dimple-7B", {"max_pixels": 4096}),
    ("rp-yu/Dimple-7B", {"min_pixels": 20000, "max_pixels": 30000}),
    ("rp-yu/Dimple-7B", {"pixels": "evaluation"}),
    ("Qwen/Qwen2.5-VL-7B-Instruct", {"max_pixels": 2048, "attention": "eager"}),
    ("jacklishufan/lavida-dream-v1.0-instruct", {"pool": "none"}),
    ("jacklishufan/lavida-llada-v1.0-instruct", {"several": "list", "pool": "average"}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("sizes", [PICTURES[:1], PICTURES])
def test_counts_heed_options_of_loading(name, options, sizes, tmp_path, picture):
    folder = write_tiny(name, tmp_path / "model")
    prompt = load(folder, **options).encode([picture(*size) for size in sizes], "What is it?")
    assert visual_count(folder, sizes, **options) == prompt.n_visual


def test_options_decide_counts_of_published_models():
    assert visual_count("rp-yu/Dimple-7B", [(640, 480)], max_pixels=112896) == 130
    assert visual_count("rp-yu/Dimple-7B", [(640, 480)]) == 391


def test_an_option_that_nobody_has_is_an_error(small):
    with pytest.raises(ProbeError, match="not loaded with a setting called 'max_pixel'"):
        load(small, max_pixel=3)
