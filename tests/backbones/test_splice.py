"""Splicing against a brute force over python lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probe.backbones.splice import IMAGE, NOTHING, splice
from probe.errors import ProbeError

TABLE = torch.arange(10.0)[:, None].expand(10, 2) + 1


def embed(ids):
    return TABLE[ids]


@given(
    st.lists(st.lists(st.sampled_from([IMAGE, 0, 1, 2, 9]), min_size=1, max_size=8), min_size=1, max_size=4),
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.sampled_from(["left", "right"]),
    st.one_of(st.none(), st.integers(1, 12)),
    st.randoms(use_true_random=False),
)
def test_splice(rows, sizes, side, limit, random):
    width = max(map(len, rows))
    ids = torch.tensor([r + [random.choice([0, 5, IMAGE])] * (width - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    features = [torch.full((n, 2), -10.0 - k) for k, n in enumerate(sizes)]
    want, used = [], 0
    for row in rows:
        line = []
        for token in row:
            if token == IMAGE:
                feature = features[min(used, len(features) - 1)]
                used += 1
                line += [float(v) for v in feature[:, 0]]
            else:
                line.append(float(token) + 1)
        want.append(line[:limit])
    done = splice(ids, mask, features, embed, side=side, limit=limit)
    length = max(map(len, want))
    assert done.embeds.shape == (len(rows), length, 2)
    for got, real, marks, line in zip(done.embeds, done.mask, done.ids, want, strict=True):
        pad = length - len(line)
        expected = [0.0] * pad + line if side == "left" else line + [0.0] * pad
        assert got[:, 0].tolist() == expected
        assert real.sum() == len(line)
        assert (marks == NOTHING).equal(~real)
    assert ((done.visual >= 0) == (done.ids == IMAGE)).all()


def test_places_need_pictures():
    with pytest.raises(ProbeError, match="no picture is given"):
        splice(torch.tensor([[1, IMAGE]]), None, [], embed)
    with pytest.raises(ProbeError, match="known: left, right"):
        splice(torch.tensor([[1]]), None, [], embed, side="both")
