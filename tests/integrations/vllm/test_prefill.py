"""One layer's long rows: against dense attention, and what an error leads to."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from minference import methods
from minference.head_patterns import HeadPatterns, default_patterns
from minference.index import SparseIndex
from minference.integrations.vllm.metrics import Recorder
from minference.integrations.vllm.options import Options
from minference.integrations.vllm.pages import Request
from minference.integrations.vllm.prefill import LayerPrefill, Runtime, serve_rows
from minference.integrations.vllm.rows import Row, batch_rows
from minference.methods import Context, Method
from minference.methods.thresholds import work
from minference.patterns import AShape, Dense, VerticalSlash
from minference.testing import random_qkv


class Whole(Request):
    """A context that is not in pages."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.both = key, value
        self.copied: list[slice] = []

    @property
    def kv_heads(self) -> int:
        return self.both[0].shape[1]

    @property
    def head_bytes(self) -> int:
        return self.both[0][:, :1].nbytes * 2

    def keys(self, heads: slice) -> Tensor:
        self.copied.append(heads)
        return self.both[0][:, heads]

    def values(self, heads: slice) -> Tensor:
        return self.both[1][:, heads]


class Broken(Method):
    """Fails in every call."""

    name: ClassVar[str] = "broken"

    def build_index(self, q: Tensor, k: Tensor, context: Context) -> SparseIndex | None:
        raise RuntimeError("broken on purpose")


def layer_of(
    method: Method, *, isolate: bool = False, heads: int = 4, **options: int
) -> LayerPrefill:
    recorder = Recorder(lambda line: None, publish=False)
    runtime = Runtime(Options(**options), method, 0, 0, isolate, recorder)
    return LayerPrefill(runtime, 0, tuple(range(heads)), 32, 32**-0.5)


def run(layer: LayerPrefill, queries: int, context: int) -> tuple[Tensor, Tensor, bool]:
    q, k, v = random_qkv(4, 2, queries, context)
    out = torch.full((queries, 4, 32), 7.0)
    layer.runtime.start_step()
    served = layer.attend(
        Row(0, 0, queries, context), q[0].transpose(0, 1), lambda: Whole(k, v), out
    )
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    mask = torch.ones(queries, context, dtype=torch.bool).tril(context - queries)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out, dense[0].transpose(0, 1), served


def test_chunks_of_little_work_stay_dense() -> None:
    layer = layer_of(methods.AShape(sink=4, local=64))
    rows = batch_rows([0, 130, 430], [130, 900])
    assert layer.candidates(rows) == rows
    layer.runtime.min_work = int(work(300, 900, 4, 32))
    assert layer.candidates(rows) == rows[1:]
    layer.runtime.min_work += 1
    assert layer.candidates(rows) == ()


@pytest.mark.parametrize(("queries", "context"), [(300, 300), (130, 333), (2, 65)])
def test_full_density_is_dense_attention(queries: int, context: int) -> None:
    layer = layer_of(methods.AShape(sink=4, local=1000))
    out, dense, served = run(layer, queries, context)
    assert served
    torch.testing.assert_close(out, dense, atol=2e-5, rtol=2e-5)
    assert layer.runtime.recorder.summary()["density"] == 1.0


def test_a_sparse_method_is_sparse_and_counted() -> None:
    layer = layer_of(methods.AShape(sink=4, local=64))
    out, dense, served = run(layer, 300, 900)
    assert served
    assert not torch.allclose(out, dense, atol=1e-3)
    totals = layer.runtime.recorder.summary()
    assert totals["chunks"] == 1
    assert totals["tokens"] == 300
    assert totals["causal_pairs"] == sum(range(601, 901))
    assert 0.1 < totals["density"] < 0.4


def test_heads_have_their_global_patterns() -> None:
    rows = ((Dense(),) * 3 + (AShape(4, 64),) * 5,)
    first = layer_of(methods.MInference(patterns=HeadPatterns(rows)))
    out, dense, _ = run(first, 300, 900)
    torch.testing.assert_close(out[:, :3], dense[:, :3], atol=2e-5, rtol=2e-5)
    assert not torch.allclose(out[:, 3], dense[:, 3], atol=1e-3)
    second = LayerPrefill(first.runtime, 0, (4, 5, 6, 7), 32, 32**-0.5)
    out, dense, _ = run(second, 300, 900)
    assert not torch.allclose(out[:, 0], dense[:, 0], atol=1e-3)


def test_copies_stay_in_the_workspace_and_heads_keep_their_patterns() -> None:
    # one MiB holds one head's context; the second part is dense beside a sparse one
    rows = ((AShape(4, 64),) * 2 + (Dense(),) * 2,)
    layer = layer_of(methods.MInference(patterns=HeadPatterns(rows)), workspace_mib=1)
    layer = replace(layer, sinks=torch.randn(4))
    q, k, v = random_qkv(4, 2, 200, 3000)
    whole, wide = Whole(k, v), layer_of(layer.runtime.method)
    outs = [torch.full((200, 4, 32), 7.0) for _ in range(2)]
    row, query = Row(0, 0, 200, 3000), q[0].transpose(0, 1)
    assert layer.attend(row, query, lambda: whole, outs[0])
    assert whole.copied == [slice(0, 1), slice(1, 2), slice(1, 2)]
    assert replace(wide, sinks=layer.sinks).attend(row, query, lambda: Whole(k, v), outs[1])
    torch.testing.assert_close(*outs, atol=2e-5, rtol=2e-5)


def test_a_gpu_measures_the_first_of_some_steps_that_serve_long_rows() -> None:
    runtime, measured = layer_of(methods.AShape()).runtime, []
    for number in range(100):
        runtime.start_step()
        if number >= 30:  # captures and decodes before the first prompt
            runtime.serve()
            runtime.serve()
            measured.append(runtime.measures(torch.device("cuda")))
    assert [n for n, yes in enumerate(measured) if yes] == [0, 16, 32, 48, 64]


def test_each_row_has_its_own_index_from_the_last_queries_of_its_chunk() -> None:
    method = methods.MInference(patterns=default_patterns(1, 4, VerticalSlash(32, 64)))
    layer = layer_of(method)
    rows = (Row(0, 0, 300, 700), Row(1, 300, 500, 600))
    q, k, v = random_qkv(4, 2, 500, 700)
    contexts = [Whole(x, y) for x, y in ((k, v), (k[:, :, :600].flip(2), v[:, :, :600].flip(2)))]
    query = q[0].transpose(0, 1)

    def served(query: Tensor, rows: tuple[Row, ...]) -> Tensor:
        output = torch.full_like(query, 7.0)
        layer.runtime.start_step()

        def dense(rest: tuple[Row, ...], query: Tensor, part: Tensor) -> None:
            raise AssertionError("no row is left for the host")

        assert serve_rows(
            layer, rows, query, output, read=lambda row: contexts[row.number], dense=dense
        )
        return output

    both = served(query, rows)
    for row in rows:
        part = slice(row.begin, row.stop)
        alone = served(query[part], (replace(row, begin=0, stop=row.queries),))
        assert torch.equal(both[part], alone)
    # only the last 64 queries of a chunk choose what all of its rows read
    earlier, later = query.clone(), query.clone()
    earlier[: 300 - 64] += 1.0
    later[300 - 64 : 300] += 1.0
    assert torch.equal(served(earlier, rows)[300 - 64 :], both[300 - 64 :])
    assert not torch.equal(served(later, rows)[: 300 - 64], both[: 300 - 64])


def test_dense_layers_are_left_to_the_host() -> None:
    method = methods.MInference(patterns=default_patterns(1, 4, Dense()))
    out, _, served = run(layer_of(method), 300, 300)
    assert not served
    assert torch.equal(out, torch.full_like(out, 7.0))


def test_an_error_goes_up_or_is_turned_into_nan(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError, match="on purpose"):
        run(layer_of(Broken()), 130, 200)
    layer = layer_of(Broken(), isolate=True)
    out, _, served = run(layer, 130, 200)
    assert served
    assert bool(out.isnan().all())
    assert "on purpose" in caplog.text
    assert layer.runtime.recorder.totals.failures == 1


def test_pages_never_hold_the_nan_of_a_failed_row() -> None:
    layer = layer_of(Broken(), isolate=True)
    poisoned = torch.tensor([1.0, float("nan")])
    assert bool(layer.runtime.clean(poisoned).isnan().any())
    run(layer, 130, 200)
    assert layer.runtime.clean(poisoned).tolist() == [1.0, 0.0]
    layer.runtime.start_step()
    assert layer.runtime.clean(poisoned) is poisoned
    layer.runtime.alone = False
    assert layer.runtime.clean(poisoned).tolist() == [1.0, 0.0]
    layer.runtime.isolate = False
    assert layer.runtime.clean(poisoned) is poisoned


def test_short_rows_early_layers_and_disable_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (Row(0, 0, 1, 999), Row(1, 1, 200, 999))
    assert layer_of(methods.AShape()).candidates(rows) == rows[1:]
    assert layer_of(methods.AShape(), starting_layer=1).candidates(rows) == ()
    monkeypatch.setenv("MINFERENCE_DISABLE", "1")
    assert layer_of(methods.AShape()).candidates(rows) == ()


def test_each_row_is_computed_once_by_the_method_or_by_the_host() -> None:
    rows = (Row(0, 0, 1, 40), Row(1, 1, 131, 200), Row(2, 131, 140, 9))
    q, k, v = random_qkv(4, 2, 140, 200)
    query, output = q[0].transpose(0, 1), torch.full((140, 4, 32), 7.0)
    seen = []

    def read(row: Row) -> Request:
        return Whole(k[:, :, : row.context], v[:, :, : row.context])

    def dense(rest: tuple[Row, ...], part_query: Tensor, part: Tensor) -> None:
        seen.append(rest)
        assert torch.equal(part_query, torch.cat([query[:1], query[131:]]))
        part.fill_(1.0)

    layer = layer_of(methods.AShape(sink=4, local=1000))
    assert serve_rows(layer, rows, query, output, read=read, dense=dense)
    assert seen == [(rows[0], rows[2])]
    expected = torch.full_like(output, 7.0)
    layer.attend(rows[1], query[1:131], lambda: Whole(k, v), expected[1:131])
    assert torch.equal(output[1:131], expected[1:131])
    assert bool((output[:1] == 1).all() & (output[131:] == 1).all())
    untouched = torch.full_like(output, 7.0)
    assert not serve_rows(layer, rows[::2], query, untouched, read=read, dense=dense)
    assert len(seen) == 1
    assert bool((untouched == 7).all())
