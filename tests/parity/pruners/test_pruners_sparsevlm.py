"""SparseVLM: raters, counts by rank and by list, recycling, the whole chain; SparseVLM+'s heads; the study's form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruner_cases import Case, check, check_best, edit_of, mask_of, of, plan_of, scored
from torch import Tensor

from probe.attend import attention_rows
from probe.decide import decide
from probe.scores import heads_with_most, raters, relevance
from probe.selections import clusters
from probe.selections.counts import attention_rank
from probe.site import Plan

SCORE = {"attention": {"queries": "raters", "heads": "mean"}}


@pytest.mark.cases("pruners", of("raters"))
def test_raters(case: Case) -> None:
    """For several samples the original's threshold is the mean over all of them; ours is a sample's own by default."""
    samples = list(zip(case.inputs["v"], case.inputs["t"], strict=True))
    found = torch.stack([relevance(v, t) for v, t in samples])
    limit = float(found.mean()) if len(samples) > 1 else "mean"
    chosen = torch.stack([raters(v, t, limit) for v, t in samples])  # type: ignore[arg-type]
    where = chosen.nonzero()
    torch.testing.assert_close(found.sum(1), torch.ones(len(samples)))
    check(case, {"relevance": found, "batch_index": where[:, 0], "rater_index": where[:, 1]})


def seen_by_raters(case: Case) -> tuple[Tensor, int]:
    """Attention of the rater rows to the visual tokens, `(head, rater, n)`."""
    p, attn = case.params, case.inputs["attn"]
    n, start = p["n_vis"], p["v_start"]
    return attn[0, :, start + n + case.inputs["rater_index"], start : start + n], n


def kept_of(case: Case, keep: Any) -> tuple[Plan | None, Tensor, int, Tensor]:
    rows, n = seen_by_raters(case)
    edit = edit_of({"top_k": {"keep": keep}}, "recycle", SCORE, site="layer.output")
    given: dict[str, Any] = {
        "n": n,
        "received": rows.mean(1),
        "attended": rows.mean(0),
        "hidden": torch.randn(n, 8, generator=torch.Generator().manual_seed(0)),
        "noise": torch.zeros,
    }
    from pruner_cases import CLOCK, Given

    return decide(edit, Given(given), CLOCK), scored(edit, **given), n, rows


@pytest.mark.cases("pruners", of("sparse_rank"))
def test_count_by_rank(case: Case) -> None:
    p = case.params
    plan, score, n, rows = kept_of(case, {"rank": {"scale": p["scale"], "bias": p["bias"]}})
    kept = torch.arange(n) if plan is None else plan.kept
    check_best(kept, score, kept.shape[0])
    got = {
        "kept_mask": mask_of(kept, n)[None],
        "score": score[None],
        "rank": attention_rank(rows.mean(0)),
        "n_keep": kept.shape[0],
        "merge_flag": plan is not None,
    }
    check(case, {k: v for k, v in got.items() if not (case.tie and k == "kept_mask")})


@pytest.mark.cases("pruners", of("sparse_list"))
def test_count_by_list(case: Case) -> None:
    p = case.params
    number = p["token_list"][p["layer_to_entry"][str(p["layer"])]]
    plan, score, n, _ = kept_of(case, {"number": number, "spare": 1})
    kept = torch.arange(n) if plan is None else plan.kept
    check_best(kept, score, kept.shape[0])
    got = {"kept_mask": mask_of(kept, n)[None], "score": score[None], "n_keep": kept.shape[0], "rank": None}
    check(case, {k: v for k, v in got.items() if not (case.tie and k == "kept_mask")})


@pytest.mark.cases("pruners", of("sparse_clusters"))
def test_recycling_clusters(case: Case) -> None:
    found = [
        clusters(x, case.params["clusters"], noise)
        for x, noise in zip(case.inputs["x"], case.inputs["noise"], strict=True)
    ]
    got = {
        "merged": torch.stack([c.merged for c in found]),
        "centers": torch.stack([c.centers for c in found]),
        "assignment": torch.stack([c.assignment for c in found]),
        "density": torch.stack([c.density for c in found]),
        "center_score": torch.stack([c.peak for c in found]),
    }
    if case.tie:  # any centre will do, but every point has one, and means are over members
        for c in found:
            assert c.assignment.bincount(minlength=c.centers.shape[0]).sum() == c.assignment.shape[0]
            assert (c.assignment[c.centers] == torch.arange(c.centers.shape[0])).all()
    check(case, {k: v for k, v in got.items() if not case.tie})


@pytest.mark.cases("pruners", of("sparse_chain"))
def test_pruning_and_recycling_over_layers(case: Case) -> None:
    p, inputs = case.params, case.inputs
    start, n, text = p["sys_len"], p["n_vis"], p["text_len"]
    embeds = inputs["input_embeddings"][0]
    judges = raters(embeds[start : start + n], embeds[start + n :]).nonzero()[:, 0]
    recycle = {"share": p["recycle_fraction"], "divisor": p["cluster_divisor"], "positions": "compact"}
    edit = edit_of(
        {"top_k": {"keep": {"rank": {"scale": p["scale"], "bias": p["bias"]}}}},
        {"recycle": recycle},
        SCORE,
        site="layer.output",
    )
    got: dict[str, Any] = {"rater_index": judges}
    alive, lengths = n, []
    counts: list[int] = []
    for j, layer in enumerate(p["pruning_layers"]):
        counts += [alive] * (layer - len(counts))
        hidden, attn = inputs[f"in{j}_layer_output"][0], inputs[f"in{j}_attn"][0]
        assert hidden.shape[0] == start + alive + text
        rows = attn[:, start + alive + judges, start : start + alive]
        noise = inputs[f"noise{j}"][0] if f"noise{j}" in inputs else None
        visual = hidden[start : start + alive]
        given: dict[str, Any] = {
            "n": alive,
            "original": n,
            "hidden": visual,
            "received": rows.mean(1),
            "attended": rows.mean(0),
            "noise": lambda m, noise=noise: noise_of(m, noise),
        }
        plan = plan_of(edit, **given)
        new = visual[plan.kept] if plan.values is None else plan.values
        assert new.shape[0] == plan.kept.shape[0] + plan.appended
        alive = new.shape[0]
        counts.append(alive)
        got[f"p{j}_hidden"] = torch.cat([hidden[:start], new, hidden[start + visual.shape[0] :]])[None]
        got[f"p{j}_position_ids"] = torch.arange(start + alive + text)[None]
        lengths.append(start + alive + text)
    total = len(case.expected.get("visual_tokens_per_layer", counts))
    counts += [alive] * (total - len(counts))
    got |= {"visual_tokens_per_layer": counts, "sequence_length_after": lengths}
    got["average_visual_tokens"] = sum(counts) / len(counts)
    check(case, got)


def noise_of(m: int, noise: Tensor | None) -> Tensor:
    assert noise is not None
    assert noise.shape == (m,)
    return noise


@pytest.mark.cases("pruners", of("sparse_heads"))
def test_heads_with_most_attention(case: Case) -> None:
    p = case.params
    rows = case.inputs["attn"][0, :, case.inputs["rater_abs"], p["v_start"] : p["v_start"] + p["n_vis"]]
    score = {"attention": {"queries": "raters", "heads": {"top": p["heads_kept"]}}}
    edit = edit_of({"top_k": {"keep": 1}}, "drop", score)
    received = rows.mean(1)
    value = scored(edit, n=p["n_vis"], received=received)
    check(case, {"heads": heads_with_most(received, p["heads_kept"]), "score": value[None]})


@pytest.mark.cases("pruners", of("study_sparsevlm"))
def test_as_the_study_has_it(case: Case) -> None:
    """One layer, all text behind the picture as raters, softmax of head-mean logits, a share of the tokens."""
    p, q, k = case.params, case.inputs["q"], case.inputs["k"]
    n, start = p["n_vis"], p["sys_len"]
    judges = raters(case.inputs["v_emb"][0], case.inputs["t_emb"][0]).nonzero()[:, 0]
    rows = (start + n + judges)[None]
    weights = attention_rows(q, k, rows, None, q.shape[-1] ** -0.5, "head_mean_logits")
    score = {"attention": {"queries": "raters_answer", "form": "head_mean_logits"}}
    keep = {"share": p["keep_ratio"], "round": "truncate"}
    edit = edit_of({"top_k": {"keep": keep}}, {"recycle": {"lasts": "generation"}}, score, site="layer.output")
    drawn: list[int] = []

    def noise(m: int) -> Tensor:
        drawn.append(m)
        return torch.zeros(m)

    hidden = torch.randn(n, 8, generator=torch.Generator().manual_seed(1))
    given: dict[str, Any] = {"n": n, "received": weights[0, :, :, start : start + n].mean(1), "hidden": hidden}
    plan = plan_of(edit, noise=noise, **given)
    value = scored(edit, **given)
    check_best(plan.kept, value, plan.kept.shape[0])
    got = {
        "rater_index": judges,
        "score": value[None],
        "kept_mask": mask_of(plan.kept, n)[None],
        "n_recycled": drawn[0] if drawn else 0,
        "n_clusters": plan.appended,
    }
    check(case, {k: v for k, v in got.items() if not (case.tie and k == "kept_mask")})
