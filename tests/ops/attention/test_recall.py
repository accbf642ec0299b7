"""Recall against the softmax written out."""

import pytest
import torch

from minference.ops.attention.api import sparse_attention
from minference.ops.attention.recall import dense_rows, kept_mass, output_error, sample_rows
from minference.ops.build import dense_index
from minference.testing import layout_of, mixed_index, random_qkv


def test_rows_are_spread_and_hold_the_last() -> None:
    assert sample_rows(10, 5).tolist() == [1, 3, 5, 7, 9]
    assert sample_rows(3, 64).tolist() == [0, 1, 2]
    assert sample_rows(1000, 3).tolist() == [333, 666, 999]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        sample_rows(10, 0)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_kept_mass_is_the_softmax_on_computed_keys(softcap: float) -> None:
    q, k, v = random_qkv(6, 2, 300, 400, batch=2)
    layout = layout_of(q, k, left_padding=(0, 150), right_padding=(0, 0))
    index = mixed_index(layout, 6)
    rows = sample_rows(300, 40)
    sinks = torch.linspace(-1, 1, 6)
    out, lse = sparse_attention(
        q, k, v, index, softcap=softcap, sinks=sinks, return_lse=True, impl="torch"
    )
    options = {"softcap": softcap, "sinks": sinks}
    dense, dense_lse = dense_rows(q, k, v, layout, rows, **options)

    scores = q @ k.repeat_interleave(3, dim=1).transpose(-1, -2) * 32**-0.5
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    everything = dense_index(layout, 6).to_dense_mask()
    sink = sinks[None, :, None, None].expand(2, 6, 300, 1)
    weights = torch.cat([scores.masked_fill(~everything, -torch.inf), sink], -1).softmax(-1)
    kept = (weights[..., :-1] * index.to_dense_mask()).sum(-1) + weights[..., -1]
    real = everything.any(-1)[:, :, rows]
    got = kept_mass(lse[:, :, rows], dense_lse)
    torch.testing.assert_close(got[real], kept[:, :, rows][real], atol=1e-5, rtol=1e-4)
    assert bool((got[~real] == 1).all())
    full = (weights[..., :-1] @ v.repeat_interleave(3, dim=1))[:, :, rows]
    torch.testing.assert_close(dense[real], full[real], atol=1e-5, rtol=1e-4)
    expected = (out[0, :, rows] - full[0]).flatten(1).norm(dim=1) / full[0].flatten(1).norm(dim=1)
    torch.testing.assert_close(output_error(out[:, :, rows], dense)[0], expected)
