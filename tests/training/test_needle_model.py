"""The shipped folder: it loads offline, answers, and its card says what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from minference.eval.tasks import make_sample
from training.config import BOS, TINY_SHAPE
from training.export import export, load_weights, save_weights
from training.model import Needle
from training.table import markdown

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "needle"
SCORES = ROOT / "benchmarks" / "results" / "needle_dense.jsonl"
transformers = pytest.importorskip("transformers", reason="needs transformers")
shipped = pytest.mark.skipif(
    not list(MODEL.glob("*.safetensors")), reason="models/needle holds no weights here"
)


def test_exported_model_computes_what_was_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    needle = Needle(TINY_SHAPE)
    for value in needle.named().values():
        value.data.normal_(1.0 if value.dim() == 1 else 0.0, 0.1)
        value.data.copy_(value.data.bfloat16())
    save_weights(needle.named(), tmp_path)
    export(tmp_path, tmp_path, TINY_SHAPE)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens, targets = torch.randint(0, 256, (2, 2, 130))
    weights = torch.rand(2, 130)
    logits = model(tokens).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    found = needle(tokens, targets, weights, torch.zeros(2, 130))
    torch.testing.assert_close(found.text, (loss * weights.flatten()).sum())
    assert torch.equal(found.best, logits.argmax(-1).flatten())


def test_tokenizer_ids_are_the_bytes_behind_one_bos(tmp_path: Path) -> None:
    save_weights(Needle(TINY_SHAPE).named(), tmp_path)
    export(tmp_path, tmp_path, TINY_SHAPE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "Hello wörld\n\n x = 3\r\n\ttab 日本 ✓ <b>"
    ids = tokenizer(text).input_ids
    assert ids == [BOS, *text.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_loading_an_empty_folder_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected model-"):
        load_weights(tmp_path)


@shipped
@pytest.mark.slow
@pytest.mark.parametrize("task", ["single", "multikey", "key_value"])
def test_shipped_model_answers_at_4k(task: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    sample = make_sample(task, 4096, seed=0, split="dev")
    ids = tokenizer(sample.text(0), return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=48)
    assert sample.matches(0, tokenizer.decode(out[0, ids.input_ids.shape[1] :]))


@shipped
def test_shipped_weights_keep_to_their_size() -> None:
    sizes = [path.stat().st_size for path in MODEL.iterdir()]
    assert max(sizes) <= 15_000_000
    assert sum(sizes) <= 32_000_000


@shipped
def test_card_holds_the_table_of_the_committed_scores() -> None:
    assert markdown(SCORES) in (MODEL / "README.md").read_text()
