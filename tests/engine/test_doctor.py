"""The adapter checklist: every registered backbone passes it in small form, and every check sees what it is for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from probe import attend, doctor
from probe.__main__ import load_cli
from probe.backbones import backbones, load, resolve
from probe.backbones.base import LayerModules
from probe.backbones.tiny import tiny_names, write_tiny
from probe.doctor import identities
from probe.doctor.patient import SLOTS, Patient
from probe.errors import ProbeError
from probe.ledger import Ledger
from probe.site import Plan, Role
from probe.store import KeyStore
from probe.tracer import Tracer

MAY_NOT_APPLY = {"cache"}
"""Checks that a registered backbone may be without: one has no cache of its own."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The small form of a published model, written once."""
    written: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in written:
            written[name] = write_tiny(name, tmp_path_factory.mktemp("tiny") / "model")
        return written[name]

    return folder


def patient_of(folder: Path, **options: Any) -> Patient:
    return Patient(load(folder, **options), resolve(folder), **options)


@pytest.mark.parametrize("name", tiny_names())
def test_every_backbone_is_well(name: str, folders: Any) -> None:
    """The identities of the engine among them: with and without its cache, one sample and four."""
    found = {f.name: f for f in doctor.examine(patient_of(folders(name), dtype="float64"))}
    assert {f.name: f.detail for f in found.values() if f.status == "fail"} == {}
    assert {n for n, f in found.items() if f.status == "skip"} <= MAY_NOT_APPLY
    assert list(found) == list(doctor.checks())
    assert all(f.about.endswith(".") and f.detail for f in found.values())


def test_every_adapter_has_a_small_form() -> None:
    assert [entry.name for entry in backbones if not entry.meta.get("tiny")] == []
    published = {p.name for entry in backbones for p in entry.meta["published"]}
    assert set(tiny_names()) <= published


@pytest.fixture
def well(folders: Any) -> Patient:
    """A small Dimple: shifted logits, several axes, a cache of its own. To be made unwell."""
    return patient_of(folders("rp-yu/Dimple-7B"))


Sabotage = Callable[[Patient, pytest.MonkeyPatch], None]
SABOTAGES: dict[str, tuple[str, Sabotage]] = {}


def unwell(check: str) -> Callable[[Sabotage], Sabotage]:
    """Something that goes wrong, and the check that must see it."""

    def note(sabotage: Sabotage) -> Sabotage:
        SABOTAGES[sabotage.__name__] = check, sabotage
        return sabotage

    return note


@unwell("keys")
def names_are_not_compared(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("probe.backbones.weights.check_names", lambda *a: None)


@unwell("keys")
def a_tensor_was_never_filled(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    patient.backbone.register_buffer("forgotten", torch.empty(3, device="meta"))


@unwell("facts")
def a_size_is_wrong(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    patient.backbone.facts = replace(patient.backbone.facts, vocabulary=patient.backbone.facts.vocabulary + 1)


@unwell("facts")
def the_default_decoder_is_unknown(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    patient.backbone.defaults = replace(patient.backbone.defaults, unmask={"nobody": {}})


@unwell("facts")
def the_head_gives_another_type(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    head = patient.backbone.head
    patch.setattr(patient.backbone, "head", lambda hidden: head(hidden).double())


@unwell("roles")
def a_visual_row_is_called_a_question(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    first = patient.prompts[0]
    role = first.role.clone()
    role[first.visual == 2] = int(Role.QUESTION)
    patient.prompts[0] = replace(first, role=role)


@unwell("roles")
def visual_tokens_are_miscounted(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("probe.doctor.adapter.visual_count", lambda folder, sizes: 3)


@unwell("encoder")
def encoding_is_called_too_cheap(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(patient.backbone, "encode_flops", lambda features: 1.0)


@unwell("sites")
def a_layer_joins_otherwise(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    first, *others = patient.backbone.layers
    joined = replace(first, join=lambda residual, mlp, ids: residual + 2 * mlp)
    patch.setattr(patient.backbone, "_layers", (joined, *others))


@unwell("sites")
def norms_are_mistaken(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    first, *others = patient.backbone.layers
    norms = {"pre_mlp_norm": first.pre_attention_norm, "pre_attention_norm": first.pre_mlp_norm}
    patch.setattr(patient.backbone, "_layers", (replace(first, **norms), *others))


@unwell("mask")
def layers_are_causal(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    for layer in patient.backbone.layers:
        layer.attention.is_causal = True


@unwell("mask")
def padding_is_seen(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(patient.backbone, "sees", lambda query, key: (None,))


@unwell("mask")
def it_claims_to_be_causal(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    patient.backbone.causal = True


@unwell("rotary")
def positions_are_counted_anew(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    given = patient.backbone.position_ids
    patch.setattr(patient.backbone, "position_ids", lambda p: given(_counted(p)))


def _counted(position: torch.Tensor) -> torch.Tensor:
    count = torch.arange(position.shape[1])
    return count.reshape(1, -1, *[1] * (position.dim() - 2)).expand_as(position)


@unwell("rotary")
def an_axis_is_forgotten(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    given = patient.backbone.position_ids
    patch.setattr(patient.backbone, "position_ids", lambda p: given(p[..., 0]) if p.dim() == 3 else given(p))


@unwell("prefix")
def stored_values_are_lost(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    from probe.doctor.patient import KeptKeys

    update = KeptKeys.update

    def forgetful(self: KeptKeys, key: Any, value: Any, layer_idx: int, *more: Any, **named: Any) -> Any:
        key, value = update(self, key, value, layer_idx, *more, **named)
        return key, value * (layer_idx != 1)

    patch.setattr(KeptKeys, "update", forgetful)


@unwell("rows")
def rows_are_scaled_otherwise(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    plain = attend.attention_rows
    patch.setattr(attend, "attention_rows", lambda q, k, rows, mask, scaling, form: plain(q, k, rows, mask, 1.0, form))


@unwell("shift")
def slots_are_read_at_their_own_rows(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Tracer, "_head_places", lambda self, state, request: state.layout.locate(request.rows))


@unwell("cache")
def stored_keys_are_stale(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    write = KeyStore.write

    def wrong(self: KeyStore, *given: Any, **more: Any) -> Any:
        key, value = write(self, *given, **more)
        return key.roll(1, 2), value

    patch.setattr(KeyStore, "write", wrong)


@unwell("batch")
def a_sample_depends_on_its_place(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    head = patient.backbone.head
    patch.setattr(patient.backbone, "head", lambda h: head(h) * (1 + torch.arange(h.shape[0])[:, None, None] / 10))


@unwell("keep")
def an_intervention_changes_what_it_keeps(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    from probe import pass_state

    def one_less(edit: Any, source: Any, clock: Any) -> Plan:
        return Plan(torch.arange(int(source.give("n", {})) - 1))

    patch.setattr(pass_state, "decide", one_less)


@unwell("record")
def looking_changes_what_is_seen(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    answer = attend._answer_requests

    def meddle(asked: Any, module: Any, query: torch.Tensor, *more: Any) -> None:
        answer(asked, module, query, *more)
        query.mul_(1.01)

    patch.setattr(attend, "_answer_requests", meddle)


@unwell("drop")
def dropping_renumbers(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    from probe import pass_state

    plain = pass_state.take
    patch.setattr(pass_state, "take", lambda x, index, streams=1: plain(x, index.flip(1), streams))


@unwell("withdraw")
def withdrawing_shuffles(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    from probe import pass_state

    plain = pass_state.take
    patch.setattr(pass_state, "take", lambda x, index, streams=1: plain(x, index.flip(1), streams))


@unwell("ledger")
def the_ledger_loses_count(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    table = Ledger.table

    def wrong(self: Ledger, sample: int) -> Any:
        kept, counts = table(self, sample)
        return kept, counts + 1

    patch.setattr(Ledger, "table", wrong)


@unwell("flops")
def a_layer_is_called_too_cheap(patient: Patient, patch: pytest.MonkeyPatch) -> None:
    costs = patient.backbone.costs
    patch.setattr(patient.backbone, "costs", replace(costs, mlp=costs.mlp - 1))


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_what_goes_wrong_is_seen_by_the_check_that_is_for_it(
    sabotage: str, well: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, act = SABOTAGES[sabotage]
    _ = well.prompts
    act(well, monkeypatch)
    (finding,) = doctor.examine(well, [check])
    assert finding.status == "fail", finding.detail


def test_every_check_can_fail() -> None:
    assert {check for check, _ in SABOTAGES.values()} == set(doctor.checks()) - {"cost"}


def test_a_check_that_breaks_down_is_a_failure_with_its_reason(well: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(well.backbone, "head", lambda hidden: 1 / 0)
    found = {f.name: f for f in doctor.examine(well, ["shift", "mask"])}
    assert found["shift"].status == "fail" and "ZeroDivisionError" in found["shift"].detail
    assert found["mask"].status == "pass"


def test_without_a_tokenizer_or_a_checkpoint(folders: Any) -> None:
    """A sample of random tokens stands in; the decoder is examined as closely, answers are not."""
    model: Any = load(folders("GSAI-ML/LLaDA-V"))
    model.tokenizer = None
    found = {f.name: f for f in doctor.examine(Patient(model))}
    assert {f.detail for f in found.values() if f.status == "fail"} == set()
    assert {n for n, f in found.items() if f.status == "skip"} == {c.__name__ for c in identities.CHECKS} | {"cache"}
    assert "no checkpoint" in found["keys"].detail and "no tokenizer" in found["roles"].detail


def test_a_kernel_of_others_is_not_looked_into(well: Patient) -> None:
    well.backbone.lm.config._attn_implementation = "sdpa"
    found = {f.name: f for f in doctor.examine(well, ["rows", "flops", "sites"])}
    assert [found[n].status for n in ("rows", "flops", "sites")] == ["skip", "skip", "pass"]
    assert "sdpa" in found["flops"].detail


def test_sizes_of_small_forms(folders: Any, tmp_path: Path) -> None:
    for name in tiny_names():
        facts = load(write_tiny(name, tmp_path / name, layers=2, width=64, seed=1)).facts
        assert (facts.layers, facts.width) == (2, 64)
    for wrong in ({"layers": 1}, {"width": 40}):
        with pytest.raises(ProbeError, match="multiple of 32"):
            write_tiny(tiny_names()[0], tmp_path / "wrong", **wrong)


@pytest.fixture
def invoke() -> Callable[..., Any]:
    def go(*words: str) -> Any:
        return CliRunner().invoke(load_cli().app, ["doctor", *words], catch_exceptions=False)

    return go


def test_the_command_prints_a_line_per_check_and_exits_with_1_if_one_fails(
    invoke: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("GSAI-ML/LLaDA-V", "--random-weights", "--only", "sites", "--only", "mask")
    good = invoke(*words)
    assert good.exit_code == 0
    assert "2 passed, 0 failed" in good.output
    assert "3 layers of width 32, random weights" in good.output
    monkeypatch.setattr("probe.doctor.decoder.modules_of", lambda layer: {"layer": layer.layer, "mlp": layer.mlp})
    bad = invoke(*words, "--json")
    assert bad.exit_code == 1
    told = json.loads(bad.output)
    assert told["failed"] == ["sites"]
    assert [(c["name"], c["status"]) for c in told["checks"]] == [("sites", "fail"), ("mask", "pass")]


def test_wrong_words(invoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProbeError, match="did you mean `mask`"):
        invoke("--only", "maks")
    with pytest.raises(ProbeError, match="no small form"):
        invoke("nobody/knows-it", "--random-weights")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ProbeError, match="add --random-weights"):
        invoke("GSAI-ML/LLaDA-V")


def test_what_hooks_need_is_what_layer_modules_hold() -> None:
    from probe.doctor.patient import modules_of

    parts = ("layer", "attention", "pre_mlp_norm", "mlp", "pre_attention_norm")
    layer = LayerModules(**{name: torch.nn.Identity() for name in parts})
    assert set(modules_of(layer)) == set(parts)
    assert SLOTS > 1


@pytest.mark.parametrize("seed", [2, 5])
def test_rounding_that_grows_with_every_pass_is_no_fault(seed: int, tmp_path: Path) -> None:
    """DiffusionGemma is told what it expected; in float32 later passes differ more than two runs of others would."""
    name = next(n for n in tiny_names() if "diffusiongemma" in n)
    folder = write_tiny(name, tmp_path / "model", layers=5, seed=seed)
    found = doctor.examine(patient_of(folder, dtype="float32"), ("cache", "batch", "drop", "withdraw"))
    assert {f.name: f.detail for f in found if f.status != "pass"} == {}
