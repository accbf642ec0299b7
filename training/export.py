"""Writes the folder that AutoModelForCausalLM and AutoTokenizer load, from weights alone.

`python -m training.export --weights FOLDER --to models/needle` adds config, tokenizer and index to
the shards that training returned.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.config import BOS, EOS, PAD, ModelShape

SHARD_BYTES = 15_000_000
_SPECIAL = {"<bos>": BOS, "<eos>": EOS, "<pad>": PAD}


def save_weights(weights: dict[str, Tensor], folder: Path) -> None:
    """Writes bf16 shards of at most 15 MB and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    room = SHARD_BYTES - 20_000
    for name, value in weights.items():
        tensor = value.detach().to("cpu", torch.bfloat16).contiguous()
        if tensor.nbytes > room:
            shards.append({})
            room = SHARD_BYTES - 20_000
        room -= tensor.nbytes
        shards[-1][name] = tensor
    places = {}
    for at, shard in enumerate(shards, 1):
        file = f"model-{at:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    _write(folder / "model.safetensors.index.json", index)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's shards, in bf16."""
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        weights |= load_file(file)
    if not weights:
        raise FileNotFoundError(
            f"no weights in {folder}: expected model-*.safetensors, as training writes them"
        )
    return weights


def write_config(shape: ModelShape, folder: Path) -> None:
    """Writes config.json and generation_config.json; an answer ends with its line."""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.width,
        "initializer_range": 0.02,
        "intermediate_size": shape.mlp,
        "max_position_embeddings": shape.max_positions,
        "max_window_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "rope_theta": shape.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab,
    }
    _write(folder / "config.json", config)
    stops = [EOS, ord("\n")]
    generation = {"bos_token_id": BOS, "eos_token_id": stops, "pad_token_id": PAD}
    _write(folder / "generation_config.json", generation | {"do_sample": False})


def write_tokenizer(folder: Path) -> None:
    """Writes a tokenizer whose ids are the bytes of the text, behind one `<bos>`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: byte for byte, symbol in byte_symbols().items()} | _SPECIAL
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    split = pre_tokenizers.Split("\n", behavior="merged_with_previous")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in _SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=ModelShape().max_positions,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    ).save_pretrained(folder)


def byte_symbols() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {
        byte: chr(256 + at) for at, byte in enumerate(others)
    }


def export(weights: Path, folder: Path, shape: ModelShape | None = None) -> None:
    """Makes a complete model folder from a folder of weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in weights.glob("model*.safetensors*"):
        if file.parent != folder:
            shutil.copy(file, folder / file.name)
    if not (folder / "model.safetensors.index.json").exists():
        save_weights(load_weights(weights), folder)
    write_config(shape or ModelShape(), folder)
    write_tokenizer(folder)


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Make a model folder from trained weights.")
    parser.add_argument("--weights", type=Path, required=True, help="folder with the shards")
    parser.add_argument("--to", type=Path, required=True, help="model folder to write")
    options = parser.parse_args()
    export(options.weights, options.to)


if __name__ == "__main__":
    main()
