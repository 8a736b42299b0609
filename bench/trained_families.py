"""Tiny trained students of four architectures, which the main job trains in minutes: students to open in other tools.

    python bench/trained_families.py OUTPUT [--families llama qwen2 qwen3 gemma3] [--target transformers] [--steps 1]
    python bench/foreign_tools.py --student OUTPUT/qwen2/distill --rows OUTPUT/qwen2/data/validation.jsonl ...

Corpus, task and tokenizer are those of the embedded demo. The base models begin with random weights, at widths that every GGUF
type can hold: Llama with an untied head, Qwen2 with the biases of Qwen2.5, Qwen3 with norms of heads, Gemma3 with sliding windows
and two RoPEs. --target is `--deploy_target`; with "transformers" a student has a scale for each row, no SubLN, and activations in
blocks of 32, and opens in every tool. --steps multiplies the steps of the stages.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from bitdistill import surroundings

surroundings.prepare()

import torch
import transformers

from bitdistill.data import demo

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 256, "initializer_range": 0.06}
WINDOWS = {
    "num_hidden_layers": 6,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"],
    "sliding_window": 16,
    "query_pre_attn_scalar": 64,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    },
}
STEPS = {"teacher": 60, "pretrain": 80, "distill": 40}


def configuration(family: str, tokenizer) -> transformers.PretrainedConfig:
    """A tiny model of a family.

    Args:
        family: llama, qwen2, qwen3 or gemma3. tokenizer: the demo's.
    """
    words = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    words |= {"pad_token_id": tokenizer.pad_token_id}
    if family == "gemma3":
        return transformers.Gemma3TextConfig(**(SHAPE | WINDOWS), **words)
    kinds = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}
    return kinds[family](**SHAPE, **words, tie_word_embeddings=family != "llama")


def train(family: str, folder: Path, target: str, steps: float) -> None:
    """The data, a random base model, and the four stages that make a student of it.

    Args:
        family: as in `configuration`. folder: of the run, which may have been begun. target: see the top. steps: their factor.
    """
    if not (folder / "data").exists():
        folder.mkdir(parents=True, exist_ok=True)
        demo.make_demo(folder / "data")
    base = folder / "data" / family
    if not base.exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "data" / "base")
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(configuration(family, tokenizer), dtype=torch.float32)
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
    job = [sys.executable, str(ROOT / "bitdistill" / "train.py"), "--recipe=demo", f"--model={base}", "--report=false"]
    job += [f"--task={folder}/data/task.yaml", f"--corpus={folder}/data/corpus.txt", f"--deploy_target={target}"]
    job += [f"--train_file={folder}/data/train.jsonl", f"--validation_file={folder}/data/validation.jsonl"]
    job += [
        f"--output_dir={folder}",
        *(f"--{name}.max_steps={max(1, int(count * steps))}" for name, count in STEPS.items()),
    ]
    for stage in ("teacher", "refine", "pretrain", "distill"):
        subprocess.run([*job, f"--stage={stage}"], check=True)


def main() -> int:
    """Trains one family after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--families", nargs="+", default=["llama", "qwen2", "qwen3", "gemma3"])
    parser.add_argument("--target", default="transformers")
    parser.add_argument("--steps", type=float, default=1.0)
    arguments = parser.parse_args()
    for family in arguments.families:
        train(family, arguments.output / family, arguments.target, arguments.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
