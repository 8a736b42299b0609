"""A base model without its pre-training: the control that shows what pre-training is worth on a task.

    python bench/without_pretraining.py MODEL OUTPUT [--keep_embedding] [--seed 0]

Writes MODEL with untrained weights, as its architecture draws them, and with its tokenizer. With --keep_embedding, the
embedding (and a tied head) stays as pre-trained, so that only what the layers know is lost. If fine-tuning such a model
scores as well as fine-tuning the base, a ternary student has nothing to lose on that task, and no method can show that it
keeps it.
"""

import argparse
import sys
from pathlib import Path

import torch

from bitdistill.errors import UserError
from bitdistill.student.loading import load_language_model, load_tokenizer


def forget(model: torch.nn.Module, seed: int, keep_embedding: bool) -> torch.nn.Module:
    """A model of the same configuration with weights drawn from `seed`."""
    torch.manual_seed(seed)
    fresh = type(model)(model.config).to(torch.float32)
    if keep_embedding:
        with torch.no_grad():
            fresh.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight)
            fresh.get_output_embeddings().weight.copy_(model.get_output_embeddings().weight)
    return fresh


def main() -> int:
    """Reads, forgets, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--keep_embedding", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        model, tokenizer = load_language_model(arguments.model), load_tokenizer(arguments.model)
    except UserError as error:
        print(f"without_pretraining: {error}", file=sys.stderr)
        return 2
    forget(model, arguments.seed, arguments.keep_embedding).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
