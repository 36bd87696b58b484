"""The DiffusionGemma adapter against the native class with the same weights: masks, logits, caches, surgery, cost."""

from __future__ import annotations

import itertools

import pytest
import torch
from gemma_checkpoint import IDS, NativeRun, Store, native, processed, rows, soft_types, tiny_config, write_gemma
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaEncoderModel

from probe import attend
from probe.backbones import gemma_prompt as text
from probe.backbones import load
from probe.backbones.diffusion_gemma_modules import sees
from probe.backbones.rows import Rows

LETTERS = (len(IDS), 270)
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_gemma(tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def oracle(folder):
    return native(folder)


def letters(count, seed=0):
    return torch.randint(*LETTERS, (1, count), generator=torch.Generator().manual_seed(seed))


def run(model, embeds, query, key=None, store=None):
    """Final-normed rows of a pass, under the backbone's own masks."""
    masks = model.sees(query, query if key is None else key)
    call = {"position_ids": model.row_ids(query), "attention_mask": masks, "past_key_values": store}
    return model.lm(inputs_embeds=embeds, **call).last_hidden_state


@pytest.mark.parametrize("prompt", [1, 6, 7, 8, 23])
@pytest.mark.parametrize("canvas", [1, 5])
def test_one_pass_is_encoder_and_decoder(model, oracle, prompt, canvas):
    ids, tokens = letters(prompt), letters(canvas, 1)
    reference = NativeRun(oracle)
    encoded = reference.encode(ids)
    previous = None
    for _ in range(2):
        expected = reference.logits(tokens, previous)
        embeds = torch.cat([model.embed(ids), model.condition(model.embed(tokens), previous)], 1)
        hidden = run(model, embeds, rows(prompt, canvas))
        torch.testing.assert_close(hidden[:, :prompt], encoded, **CLOSE)
        torch.testing.assert_close(model.head(hidden[:, prompt:]), expected, **CLOSE)
        previous = expected / 0.6


def test_self_conditioning_and_scalars_matter(model):
    """Else the comparisons above could not fail on them."""
    tokens = letters(5)
    plain, first = model.embed(tokens), model.condition(model.embed(tokens), None)
    told = model.condition(model.embed(tokens), torch.randn(1, 5, 272, generator=torch.Generator().manual_seed(0)))
    assert (plain - first).abs().max() > 0.1 < (told - first).abs().max()
    layer = model.lm.layers[0]
    assert (layer.layer_scalar - layer.encoder_scalar).abs() > 0.01


@pytest.mark.parametrize("prompt", [3, 20])
def test_canvas_after_canvas_with_a_stored_prefix(model, oracle, prompt):
    """Prompt and first canvas in one pass; a later pass of the canvas alone; then the finished canvas and the next."""
    reference, store = NativeRun(oracle), Store()
    ids, canvas = letters(prompt), 5
    reference.encode(ids)
    held: Rows | None = None
    closed, before = ids, 0
    for block in range(3):
        tokens = letters(canvas, block + 5)
        start = before + closed.shape[1]
        query = rows(closed.shape[1], canvas, start=before)
        seen = query if held is None else held.then(query)
        embeds = torch.cat([model.embed(closed), model.condition(model.embed(tokens), None)], 1)
        hidden = run(model, embeds, query, seen, store)
        expected = reference.logits(tokens)
        torch.testing.assert_close(model.head(hidden[:, closed.shape[1] :]), expected, **CLOSE)
        # only the closed rows stay stored
        store.held = {i: (k[:, :, :start], v[:, :, :start]) for i, (k, v) in store.held.items()}
        held = rows(start)
        store.keeps = False
        again = letters(canvas, block + 50)
        alone = rows(0, canvas, start=start)
        hidden = run(model, model.condition(model.embed(again), expected), alone, held.then(alone), store)
        torch.testing.assert_close(model.head(hidden), reference.logits(again, expected), **CLOSE)
        store.keeps = True
        reference.encode(again)
        closed, before = again, start


def test_pictures(model, oracle, picture):
    images = [picture(31, 17), picture(12, 40)]
    prompt = model.encode(images, "Compare them.")
    count = int((prompt.role == 1).sum())
    assert count == prompt.n_visual == sum(a * d for a, d in (model.grid.fit(*i.size) for i in images))
    ids = torch.where(prompt.ids < 0, IDS[text.PICTURE], prompt.ids)[None]
    tokens = letters(5, 3)
    reference = NativeRun(oracle)
    encoded = reference.encode(ids, mm_token_type_ids=soft_types(ids), **processed(images, model.grid))
    expected = reference.logits(tokens)
    group = torch.full_like(prompt.visual, -1)
    group[prompt.visual >= 0] = prompt.picture[prompt.visual[prompt.visual >= 0]].long()
    query = rows(len(prompt.ids), 5, picture=group)
    hidden = run(model, torch.cat([prompt.embeds[None], model.condition(model.embed(tokens), None)], 1), query)
    torch.testing.assert_close(hidden[:, : len(prompt.ids)], encoded, **CLOSE)
    torch.testing.assert_close(model.head(hidden[:, len(prompt.ids) :]), expected, **CLOSE)
    # and the masks of pictures are no formality
    blind = run(model, prompt.embeds[None], rows(len(prompt.ids)))
    assert (blind - encoded).abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(12))
def test_masks_are_the_native_ones(seed):
    """Encoder masks for both kinds of layer: pictures of any place and length, or behind a cache of any length.

    Never both: natively, pictures are looked up without the cache's offset, and only prompts have them.
    """
    draw = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=draw))

    window, length, past = number(2, 9), number(1, 14), number(1, 14) if seed % 2 else 0
    config = tiny_config(sliding_window=window)
    types = torch.zeros(past + length, dtype=torch.int64)
    for _ in range(0 if past else 2):
        first = number(0, length)
        types[first : first + number(1, 6)] = 1
    cache = DynamicCache(config=config.text_config)
    for i in range(4):
        size, heads = (8, 2) if i % 2 == 0 else (16, 1)
        if past:
            cache.update(torch.zeros(1, heads, past, size), torch.zeros(1, heads, past, size), i)
    config.text_config._attn_implementation = "sdpa"
    expected = DiffusionGemmaEncoderModel.create_masks_for_generate(
        config=config,
        inputs_embeds=torch.empty(1, length, 0),
        attention_mask=torch.ones(1, past + length, dtype=torch.bool),
        past_key_values=cache,
        position_ids=torch.arange(past, past + length)[None],
        mm_token_type_ids=types[None] if not past else None,
    )
    starts = types.diff(prepend=torch.zeros(1, dtype=torch.int64)).clamp(min=0).cumsum(0) - 1
    key = rows(past + length, picture=torch.where(types > 0, starts, -1))
    query = key.take(torch.arange(past, past + length)[None])
    windows = {"sliding_attention": window, "full_attention": None}
    for kind, mask in zip(windows, sees(query, key, list(windows.values())), strict=True):
        wanted = torch.ones(1, 1, length, past + length) if expected[kind] is None else expected[kind]
        lost = past + length - wanted.shape[-1]  # a sliding cache has forgotten the oldest keys
        assert mask[..., lost:].equal(wanted.bool())
        assert not mask[..., :lost].any()


def test_rows_that_nobody_sees_see_themselves(model):
    """Kernels differ on rows that see nothing, and a NaN would spread from there."""
    known = rows(9, 3)
    place = torch.arange(12)[None]
    hidden = Rows(known.position, known.picture, known.open, torch.zeros(1, 12, dtype=torch.bool), place)
    for mask in model.sees(hidden, hidden):
        assert mask.equal(torch.eye(12, dtype=torch.bool)[None, None])


def test_the_canvas_sees_what_the_native_cache_holds(model, oracle):
    reference = NativeRun(oracle)
    reference.encode(letters(20))
    query = rows(0, 5, start=20)
    masks = model.sees(query, rows(20).then(query))
    for layer, mask in zip(model.layers, (masks[m.kind] for m in model.layers), strict=True):
        held = reference.cache.layers[layer.attention.layer_idx].keys.shape[2]
        assert mask.sum(-1).unique().tolist() == [held + 5]
        assert mask[..., 20 - held :].all()


def test_a_padded_batch_is_its_samples(model):
    lengths, canvas = (9, 4, 13), 5
    most = max(lengths) + canvas
    embeds, parts, singles = torch.zeros(3, most, 32), [], []
    for b, n in enumerate(lengths):
        ids, tokens = letters(n, b), letters(canvas, b + 9)
        own = torch.cat([model.embed(ids), model.condition(model.embed(tokens), None)], 1)
        one = rows(n, canvas)
        singles.append(run(model, own, one))
        embeds[b, : n + canvas] = own[0]
        pad = most - n - canvas
        filler = Rows(
            torch.zeros(1, pad, dtype=torch.int64),
            torch.full((1, pad), -1),
            torch.zeros(1, pad, dtype=torch.bool),
            torch.zeros(1, pad, dtype=torch.bool),
        )
        parts.append(one.then(filler))
    fields = ("position", "picture", "open", "real")
    real = [p.real if p.real is not None else torch.ones_like(p.open) for p in parts]
    whole = Rows(*(torch.cat([getattr(p, f) for p in parts]) for f in fields[:3]), torch.cat(real))
    together = run(model, embeds, whole)
    for b, n in enumerate(lengths):
        torch.testing.assert_close(together[b, : n + canvas], singles[b][0], **CLOSE)


def test_a_plain_call_makes_its_own_masks(model):
    """`attention_mask` None and `(batch, key)`, and no ids at all."""
    embeds = model.embed(letters(9))
    expected = run(model, embeds, rows(9))
    assert model.lm(inputs_embeds=embeds).last_hidden_state.equal(expected)
    padded = torch.cat([embeds, torch.zeros(1, 3, 32)], 1)
    mask = (torch.arange(12) < 9)[None]
    got = model.lm(inputs_embeds=padded, attention_mask=mask).last_hidden_state[:, :9]
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("first", range(5))
def test_rows_that_leave_at_a_layer_are_rows_that_nobody_sees_from_there(model, first):
    """Surgery through the contract alone: hooks that narrow rows, tables, ids and masks of every later layer."""
    prompt, canvas = 15, 5
    ids, tokens = letters(prompt), letters(canvas, 1)
    embeds = torch.cat([model.embed(ids), model.condition(model.embed(tokens), None)], 1)
    group = torch.full((prompt,), -1)
    group[2:11] = 0
    query = rows(prompt, canvas, picture=group)
    gone = torch.tensor([3, 5, 6, 9])
    keep = torch.tensor([i for i in range(prompt + canvas) if i not in gone])[None]
    short = query.take(keep)
    real = torch.ones(1, prompt + canvas, dtype=torch.bool)
    real[0, gone] = False
    hidden_rows = Rows(query.position, query.picture, query.open, real)

    def narrow(i, at_entry):
        def hook(module, args, kwargs):
            hidden = args[0]
            if at_entry:
                hidden = hidden[:, keep[0]]
            tables = tuple(t[:, keep[0]] for t in kwargs["position_embeddings"])
            masks = model.sees(short, short)
            told = {"attention_mask": masks[model.layers[i].kind], "position_ids": model.row_ids(short)}
            return (hidden, *args[1:]), {**kwargs, **told, "position_embeddings": tables}

        return hook

    def hide(i):
        def hook(module, args, kwargs):
            return args, {**kwargs, "attention_mask": model.sees(query, hidden_rows)[model.layers[i].kind]}

        return hook

    def answer(hook_of):
        handles = [
            model.layers[i].layer.register_forward_pre_hook(hook_of(i), with_kwargs=True) for i in range(first, 4)
        ]
        out = run(model, embeds, query)
        for handle in handles:
            handle.remove()
        return model.head(out[:, -canvas:])

    dropped, masked = answer(lambda i: narrow(i, i == first)), answer(hide)
    torch.testing.assert_close(dropped, masked, **CLOSE)
    untouched = model.head(run(model, embeds, query)[:, -canvas:])
    assert torch.equal(dropped, untouched) == (first == 4)


def test_the_end_of_a_layer_is_its_join(model):
    """What `layer.after_attention` relies on: residual stream, output of `mlp`, and `join` make the layer's output."""
    seen: dict[str, torch.Tensor] = {}
    for modules in model.layers:
        handles = [
            modules.pre_mlp_norm.register_forward_hook(lambda m, a, o: seen.update(residual=a[0])),
            modules.mlp.register_forward_hook(lambda m, a, o: seen.update(mlp=o)),
            modules.layer.register_forward_hook(lambda m, a, o: seen.update(out=o)),
        ]
        query = rows(6, 3)
        run(model, model.embed(letters(9)), query)
        for handle in handles:
            handle.remove()
        assert modules.join(seen["residual"], seen["mlp"], model.row_ids(query)).equal(seen["out"])


@pytest.mark.parametrize("form", ["softmax", "head_mean_logits"])
def test_rows_of_attention_beside_the_kernel(model, folder, form):
    """Asked rows equal the eager map's, in layers of both kinds, with the native scaling of 1."""
    eager = load(folder, attention="eager")
    embeds, query = model.embed(letters(11)), rows(7, 4)
    wanted = torch.tensor([[0, 5, 8, 10]])
    for i, (ours, theirs) in enumerate(zip(model.layers, eager.layers, strict=True)):
        got: list[torch.Tensor] = []
        maps: list[torch.Tensor] = []
        attend.ask(ours.attention, [attend.RowRequest(wanted, form, lambda w, _, g=got: g.append(w))])
        handle = theirs.attention.register_forward_hook(lambda m, a, o, s=maps: s.append(o[1]))
        run(model, embeds, query)
        run(eager, embeds, query)
        attend.forget(ours.attention)
        handle.remove()
        expected = maps[0][:, :, wanted[0]]
        if form == "softmax":
            torch.testing.assert_close(got[0], expected, **CLOSE)
        mask = model.sees(query, query)[ours.kind][:, :, wanted[0]].expand_as(got[0])
        assert (got[0][~mask] == 0).all(), i
        torch.testing.assert_close(got[0].sum(-1), torch.ones_like(got[0].sum(-1)), **CLOSE)


def test_cost_of_every_layer_and_of_pictures(folder, picture):
    """Executed FLOPs equal torch's counter, experts and missing value projections included."""
    model = load(folder, attention="eager", experts="eager")
    query = rows(9, 4)
    embeds = model.embed(letters(13))
    with FlopCounterMode(display=False) as counter:
        run(model, embeds, query)
    dims = model.costs.each
    assert counter.get_total_flops() == sum(d.attention(13, 13) + d.mlp_block(13) for d in dims)
    assert [model.costs.at(i) for i in range(model.costs.layers)] == list(dims)
    assert dims[0].attention(2, 5) != dims[1].attention(2, 5)
    with FlopCounterMode(display=False) as counter:
        model.head(embeds)
    assert counter.get_total_flops() == model.costs.head(13)
    for previous in (None, torch.zeros(1, 13, 272)):
        with FlopCounterMode(display=False) as counter:
            model.condition(embeds, previous)
        assert counter.get_total_flops() == model.costs.condition(13, told=previous is not None)
    with FlopCounterMode(display=False) as counter:
        features = model.encode_images([picture(31, 17), picture(12, 40)])
    assert counter.get_total_flops() == model.encode_flops(features)


def test_kinds_of_experts_agree(model, folder):
    embeds = model.embed(letters(9))
    for experts in ("eager", "batched_mm"):
        other = load(folder, experts=experts)
        torch.testing.assert_close(run(other, embeds, rows(9)), run(model, embeds, rows(9)), **CLOSE)


def test_caps_hold(model):
    logits = model.head(1e3 * torch.randn(2, 32, generator=torch.Generator().manual_seed(0)))
    assert 29 < logits.abs().max() <= 30
    assert logits.dtype == torch.float32


def test_rotary_tables_are_those_of_the_layers(model, oracle):
    position = torch.tensor([[0, 3, 40]])
    cos, sin = model.rotary(torch.zeros(1, 3, 32), position)
    rotary = oracle.model.decoder.rotary_emb
    for kind, part in zip(model.lm.kinds, (slice(0, 8), slice(8, 24)), strict=True):
        own = rotary(torch.zeros(1, 3, 32), position, kind)
        assert cos[..., part].equal(own[0]) and sin[..., part].equal(own[1])
    assert cos.shape[-1] == 24


def test_rows_then_and_take():
    first, second = rows(3), rows(0, 2, start=3)
    both = first.then(second)
    assert both.position.tolist() == [[0, 1, 2, 3, 4]] and both.real is None
    hidden = Rows(second.position, second.picture, second.open, torch.tensor([[True, False]]))
    mixed = first.then(hidden)
    assert mixed.real is not None and mixed.real.tolist() == [[True, True, True, True, False]]
    taken = mixed.take(torch.tensor([[4, 0]]))
    assert taken.position.tolist() == [[4, 0]] and taken.open.tolist() == [[True, False]]
    assert taken.real is not None and taken.real.tolist() == [[False, True]]
    axes = Rows(torch.tensor([[[7, 1], [8, 2]]]), *(itertools.repeat(torch.zeros(1, 2, dtype=torch.bool), 2)))
    assert axes.first_axis.tolist() == [[7, 8]]
