"""Small models: a step of stage 2 with one thread and with all of them, for several widths.

    python bench/small_models.py --model DIR [--widths 64 128 256 512] [--rounds 2] [--steps 4]

DIR is a Hugging Face folder with a tokenizer, for instance the demo's RUN/demo/base; its configuration is widened. Below
some width threads wait for each other for as long as they help, and they lose much when another process keeps a core busy.
The project's limit, `process_group.SMALL_WIDTH`, is read off this table. One thread and all take turns; medians
of all steps, with the least and the most.
"""

from bitdistill.distributed import openmp

openmp.wait_briefly()  # before anything loads torch

import argparse
import statistics
import tempfile
from pathlib import Path

import transformers

from cpu_training import child
from measure import cores, table

HEAD_DIM = 32


def widen(source: Path, folder: Path, width: int) -> None:
    """A randomly initialized model of this width, with the tokenizer of `source`."""
    config = transformers.AutoConfig.from_pretrained(source)
    config.hidden_size, config.intermediate_size, config.head_dim = width, width * 5 // 2, HEAD_DIM
    config.num_attention_heads, config.num_key_value_heads = width // HEAD_DIM, width // HEAD_DIM // 2
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    rows = [["width", "one thread, s", f"{cores()} threads, s", "gain"]]
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus.txt"
        corpus.write_text("\n".join(path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))))
        for width in arguments.widths:
            model = Path(scratch) / f"model-{width}"
            widen(arguments.model, model, width)
            seconds: dict[int, list[float]] = {1: [], cores(): []}
            for number in range(arguments.rounds):
                for threads, found in seconds.items():
                    spec = {"model": str(model), "corpus": str(corpus), "steps": arguments.steps}
                    spec |= {"folder": f"{scratch}/{width}-{threads}-{number}"}
                    found += child("training_step.py", spec, {}, threads)["seconds"]
            one, several = (statistics.median(found) for found in seconds.values())
            shown = [
                f"{statistics.median(found):.3f} [{min(found):.3f}, {max(found):.3f}]" for found in seconds.values()
            ]
            rows.append([str(width), *shown, f"{one / several:.2f}"])
    print(table(rows, "<>>>"))


if __name__ == "__main__":
    main()
