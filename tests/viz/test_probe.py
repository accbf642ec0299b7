"""A probe keeps its head of a served prompt and changes nothing; its picture needs something."""

from pathlib import Path

import pytest
import torch

import minference
from minference.methods import AShape
from minference.ops.build import dense_index
from minference.testing import context_for, layout_of, random_qkv, tiny_model
from minference.viz.probe import Probe, watch

IDS = torch.randint(3, 320, (1, 700), generator=torch.Generator().manual_seed(0))


def test_a_probe_keeps_its_head_and_no_other_layer() -> None:
    q, k, v = random_qkv(4, 2, 300)
    probe = Probe(layer=1, head=3)
    probe(context_for(layout_of(q, k), 4, layer=2), q, k, v)
    assert probe.seen is None
    probe(context_for(layout_of(q, k), 4, layer=1), q, k, v)
    assert probe.seen is not None
    assert torch.equal(probe.seen.q, q[0, 3])
    assert torch.equal(probe.seen.k, k[0, 1])


def test_watching_tells_what_every_head_kept() -> None:
    probe, method = Probe(2, 3), AShape(sink=64, local=64)
    model = tiny_model()
    before = model.config._attn_implementation
    handle = watch(model, IDS, method, probe, rows=20)
    assert model.config._attn_implementation == before
    assert probe.seen is not None
    assert len(handle.head_records) == 16
    index = dict(handle.indices)[2]
    # the mass kept, from the whole matrices of the head that the probe kept
    scores = probe.seen.q @ probe.seen.k.T * probe.seen.context.scale
    every = dense_index(probe.seen.context.layout, 1).to_dense_mask()[0, 0]
    weights = scores.masked_fill(~every, -torch.inf).softmax(-1)
    kept = (weights * index.to_dense_mask()[0, 3]).sum(-1)
    rows = minference.integrations.transformers.records.sample_rows(700, 20)
    (told,) = (r for r in handle.head_records if (r["layer"], r["head"]) == (2, 3))
    assert told["recall"] == pytest.approx(float(kept[rows].mean()), rel=1e-4)
    assert told["recall_min"] == pytest.approx(float(kept[rows].min()), rel=1e-4)


def test_dense_layers_are_drawn_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    probe = Probe(0, 0)
    handle = watch(tiny_model(), IDS, minference.methods.Dense(), probe, rows=4)
    assert handle.head_records == []
    probe.save(handle, tmp_path / "new" / "head.svg")
    assert "density 1.000" in (tmp_path / "new" / "head.svg").read_text()


def test_nothing_seen_is_nothing_to_draw(tmp_path: Path) -> None:
    with minference.attach(tiny_model(), AShape(sink=4, local=4), record=True) as handle:
        handle.detach()
    with pytest.raises(ValueError, match=r"nothing to draw of layer 0: .*min_seq_len=0"):
        Probe(0, 0).save(handle, tmp_path / "head.png")


@pytest.mark.parametrize(("layer", "head", "name"), [(4, 0, "layer"), (0, -1, "head")])
def test_a_probe_wants_a_head_that_there_is(layer: int, head: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be 0 to 3 for this model, got"):
        Probe.of(tiny_model().config, layer, head)
