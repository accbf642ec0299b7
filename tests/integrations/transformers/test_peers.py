"""FlexPrefill and XAttention serve a model by name, through `attach` and the published call."""

import pytest
import torch

import minference
from minference.integrations.transformers import MInference, attn_types
from minference.methods import FlexPrefill, XAttention
from minference.testing import tiny_model

LENGTH = 700


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 320, (2, LENGTH))


@pytest.mark.parametrize("name", ["flexprefill", "xattention"])
def test_names_serve_both_calls(name: str, ids: torch.Tensor) -> None:
    model = tiny_model()
    assert name in attn_types()
    with torch.no_grad(), minference.attach(model, name, min_seq_len=0, record=True) as handle:
        model(ids)
        assert all(0 < layer["density"] <= 1 for layer in handle.records)
    patched = MInference(name, attn_kwargs={"min_seq_len": 0})(model)
    assert patched.minference.method.name == name


@pytest.mark.parametrize(
    "method", [XAttention(threshold=1.0), FlexPrefill(gamma=1.0, tau=2.0), FlexPrefill(gamma=1.0)]
)
def test_the_whole_share_is_dense_attention(method, ids: torch.Tensor) -> None:  # noqa: ANN001
    model = tiny_model()
    keep = torch.ones_like(ids)
    keep[1, :50] = 0
    with torch.no_grad():
        plain = model(ids, attention_mask=keep).logits
        with minference.attach(model, method, min_seq_len=0, dense_from=2.0):
            ours = model(ids, attention_mask=keep).logits
            first = model(ids[:1, :400], use_cache=True)
            second = model(ids[:1, 400:], past_key_values=first.past_key_values).logits
    assert torch.allclose(ours[0], plain[0], atol=1e-3)
    assert torch.allclose(ours[1, 50:], plain[1, 50:], atol=1e-3)
    assert torch.allclose(second[0], plain[0, 400:], atol=1e-3)
