"""How much memory decoding takes: our CPU runtime compared with transformers in bf16, each in a process of its own.

    python bench/resident.py [--shape 0.6B] [--embeddings fp16 int8 int4 ternary] [--context 128] [--json FILE]

A process first runs a tiny model, so that libraries and compiled code are loaded, and records its resident memory. Then it
opens the model, takes a prompt and decodes up to --context positions, while its resident memory is sampled from outside
(anonymous pages and pages of mapped files). The figure is by how much it grew at most. That includes the weights, the KV
cache (its bytes are stated: 2 x layers x kv_heads x head_dim x 2 bytes per position, in both), activations and scratch
memory.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from bitdistill.distributed import openmp
from measure import machine, peak_resident, resident_bytes, table, write_json
from random_models import SHAPES, Shape, write_packed_model

CONTEXT = 128


def growth(kind: str, shape: Shape, path: Path | str = "", context: int = CONTEXT) -> dict[str, int]:
    """Runs a process that decodes. kind: "ours" (the packed file at `path`) or "transformers" (bf16, random weights).

    Returns: {"growth": peak resident bytes beyond the libraries, "weights": of it the file's pages or the parameters,
        "kv_cache": bytes for `context` positions}.
    """
    command = [sys.executable, __file__, "--child", kind, json.dumps(asdict(shape)), str(path), str(context)]
    output, peak = peak_resident(command, poll_seconds=0.005)
    noted = json.loads(output.splitlines()[-1])
    kv_cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * 2 * context
    return {"growth": peak - noted["before"], "weights": noted["weights"], "kv_cache": kv_cache}


def child(kind: str, shape: Shape, path: str, context: int) -> None:
    """Decodes, and prints what it noted. One thread."""
    decode = {"ours": _ours, "transformers": _transformers}[kind]
    with tempfile.TemporaryDirectory() as folder:
        tiny = Path(folder) / "tiny"
        if kind == "ours":
            write_packed_model(tiny, SHAPES["tiny"], "base3", "int4")
        decode(SHAPES["tiny"], str(tiny), 16)
    before = sum(resident_bytes().values())
    print(json.dumps({"before": before, "weights": decode(shape, path, context)}))


def _ours(_shape: Shape, path: str, context: int) -> int:
    from bitdistill.runtime.cpu import Runtime

    runtime = Runtime(path, threads=1)
    cache = runtime.new_cache(context)
    runtime.logits([11] * (context // 2), last_only=True, cache=cache)
    while cache.length < context:
        runtime.logits([11], cache=cache)
    weights = mapped_bytes(path)
    runtime.close()
    return weights


def mapped_bytes(path: str) -> int:
    """Resident bytes of a file that this process has mapped, Linux only."""
    total, inside, name = 0, False, str(Path(path).resolve())
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:  # the heading of a mapping: its range of addresses comes first
            inside = line.endswith(name)
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def _transformers(shape: Shape, _path: str, context: int) -> int:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.set_num_threads(1)
    config = Qwen3Config(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, tie_word_embeddings=True, max_position_embeddings=40_960,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = model.to_empty(device="cpu").eval()
    model.tie_weights()
    with torch.inference_mode():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(0.01)
        output = model(torch.full((1, context // 2), 11), logits_to_keep=1)
        for _ in range(context - context // 2):
            output = model(torch.tensor([[11]]), past_key_values=output.past_key_values, logits_to_keep=1)
    return sum(parameter.nbytes for parameter in model.parameters())


def measure(shape: Shape, embeddings: list[str], folder: Path, context: int = CONTEXT) -> dict[str, dict[str, int]]:
    """`growth` of transformers, of each embedding format, and of the linears alone (a vocabulary of 256 words) of both."""
    bare = replace(shape, vocabulary=256)
    found = {"transformers": growth("transformers", shape, context=context)}
    for embedding in embeddings:
        path = folder / f"resident-{embedding}.safetensors"
        write_packed_model(path, shape, "base3", embedding)
        found[embedding] = growth("ours", shape, path, context)
        path.unlink()
    path = folder / "resident-linears.safetensors"
    write_packed_model(path, bare, "base3", "int8")
    found["transformers, linears"] = growth("transformers", bare, context=context)
    found["linears"] = growth("ours", bare, path, context)
    path.unlink()
    return found


def main() -> int:
    """Measures, prints, writes JSON."""
    openmp.wait_briefly()
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Shape(**json.loads(sys.argv[3])), sys.argv[4], int(sys.argv[5]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.6B")
    parser.add_argument("--embeddings", nargs="+", default=["fp16", "int8", "int4", "ternary"])
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(SHAPES[arguments.shape], arguments.embeddings, Path(folder), arguments.context)
    cells = [["Qwen3-" + arguments.shape, "MB resident", "weights MB", "KV cache MB", "x less than transformers bf16"]]
    for name, one in found.items():
        base = found["transformers, linears" if name.endswith("linears") else "transformers"]
        sizes = [f"{one[key] / 1e6:,.1f}" for key in ("growth", "weights", "kv_cache")]
        cells.append([name, *sizes, f"{base['growth'] / one['growth']:.2f}"])
    print(table(cells, "<>>>>"))
    if arguments.json:
        report = {"machine": machine(), "shape": arguments.shape, "context": arguments.context, "resident": found}
        write_json(arguments.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
