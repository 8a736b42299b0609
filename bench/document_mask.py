"""What it costs to keep the documents of a block apart: one forward and backward pass of a model with and without, in turn.

    python bench/document_mask.py --model DIR [--block_size 512 --batch 2 --documents 4 --rounds 3]

The model trains in full precision, the cheapest products around the same attention, so the share of the mask is an upper
bound. Seconds are the shortest of the rounds.
"""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM

from bitdistill.training.pretrain import model_inputs
from bitdistill.training.trainer import collate_blocks


def main() -> None:
    """Prints seconds per step and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    for name, value in (("block_size", 512), ("batch", 2), ("documents", 4), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    ids = torch.randint(0, model.config.vocab_size, (given.block_size,), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(given.block_size) % -(-given.block_size // given.documents)
    whole = {"input_ids": ids, "labels": ids, "block": 0}
    batches = {
        "together": collate_blocks([whole] * given.batch),
        "apart": collate_blocks([whole | {"position_ids": positions}] * given.batch),
    }
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for _ in range(given.rounds + 1):
        for name, batch in batches.items():
            started = time.perf_counter()
            model(**model_inputs(batch)).logits.float().logsumexp(-1).sum().backward()
            seconds[name].append(time.perf_counter() - started)
            model.zero_grad()
    best = {name: min(values[1:]) for name, values in seconds.items()}
    print(f"{given.batch} x {given.block_size} tokens, {given.documents} documents in a block, one pass each way:")
    print(
        f"together {best['together']:.2f} s, apart {best['apart']:.2f} s, ratio {best['apart'] / best['together']:.3f}"
    )


if __name__ == "__main__":
    main()
