"""The same students in llama.cpp and in our runtime: size, speed of decoding and of reading a prompt, distance from the student.

    python bench/beside_llama_cpp.py --llama_cpp PYTHON [--student FOLDER ...] [--shapes 0.6B] [--threads 1] [--json FILE]

PYTHON is the interpreter of an environment with llama-cpp-python (bench/foreign_tools.py says how to make one). FOLDER is a
student as a stage leaves it, or a base model's, which is made ternary without training; --shapes are Qwen3 students of real
size with random weights. A student that is made here has scales of groups of 64 columns and activations in blocks of 32
("group 64"), or, as in the paper, one scale of the tensor and activations per token ("tensor"). Every kind is measured once
in each round; the medians are printed with their range. Decoding: one token at a time after 64 tokens; prompt: 256 tokens at
once. The divergence is that of llama.cpp's plain kernels, as in `bitdistill export`; speed is measured as
llama.cpp runs by default, with weights repacked for the processor. BITDISTILL_CPU_FEATURES=avx512_vbmi masks AMX for our
runtime; for llama.cpp it takes a build without it.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONTEXT, DECODED, PROMPT = 64, 32, 256
KINDS = (
    ("packed", "base3"),
    ("packed", "2bit"),
    ("gguf", "q4_0"),
    ("gguf", "tq2_0"),
    ("gguf", "auto"),
    ("gguf", "q2_k"),
    ("gguf", "tq1_0"),
)


def serve(kind: str, path: str, threads: int) -> None:
    """A worker: says that it is ready, then answers each line with the seconds of decoding and of a prompt."""
    run = {"packed": _ours, "gguf": _llama_cpp, "gguf plain": _llama_cpp_plain}[kind](path, threads)
    prompt = [(7 * i + 11) % 500 for i in range(PROMPT)]
    run(prompt[:CONTEXT], DECODED // 4)  # compiles, warms the caches
    print("ready", flush=True)
    for _ in sys.stdin:
        _, decode = run(prompt[:CONTEXT], DECODED)
        read, _ = run(prompt, 0)
        print(json.dumps({"decode": decode / DECODED, "prompt": read / PROMPT}), flush=True)


def _ours(path: str, threads: int):
    from bitdistill.runtime.cpu import Runtime

    runtime = Runtime(path, threads=threads)

    def run(prompt: list[int], new_tokens: int) -> tuple[float, float]:
        cache, started = runtime.new_cache(PROMPT + DECODED), time.perf_counter()
        token = int(runtime.logits(prompt, last_only=True, cache=cache)[-1].argmax())
        read, started = time.perf_counter() - started, time.perf_counter()
        for _ in range(new_tokens):
            token = int(runtime.logits([token], cache=cache)[-1].argmax())
        return read, time.perf_counter() - started

    return run


def _llama_cpp(path: str, threads: int):
    from llama_cpp import Llama

    context = PROMPT + DECODED + 8
    model = Llama(path, n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run(prompt: list[int], new_tokens: int) -> tuple[float, float]:
        model.reset()
        started = time.perf_counter()
        model.eval(prompt)
        read, started = time.perf_counter() - started, time.perf_counter()
        for _ in range(new_tokens):
            model.eval([11])
        return read, time.perf_counter() - started

    return run


def _llama_cpp_plain(path: str, threads: int):
    """Weights stay as the file has them, so that AMX is not used: llama.cpp 0.3.36's products with it end on some processors
    with an illegal instruction (ggml-org/llama.cpp pull request 26954)."""
    import llama_cpp

    original = llama_cpp.llama_model_default_params

    def plain():
        parameters = original()
        parameters.use_extra_bufts = False
        return parameters

    llama_cpp.llama_model_default_params = llama_cpp.llama_cpp.llama_model_default_params = plain
    return _llama_cpp(path, threads)


class Worker:
    """A runtime with a file, in a process of its own."""

    def __init__(self, python: str, kind: str, path: Path, threads: int):
        self.kind, self.threads = kind, threads
        try:
            self._start(python, path)
        except RuntimeError:
            if kind != "gguf" or self.process.wait() != -signal.SIGILL:
                raise
            print("llama.cpp ended with an illegal instruction: once more without repacked weights", file=sys.stderr)
            self.kind = "gguf plain"
            self._start(python, path)

    def _start(self, python: str, path: Path) -> None:
        command = [python, "-P", __file__, "--serve", self.kind, str(path), str(self.threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._line()

    def _line(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the worker ended: see its error above")
        return line

    def ask(self) -> dict[str, float]:
        """Seconds per token of decoding and of a prompt."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def make_students(arguments):
    """(name, scales, model, tokenizer) of every student, one after the other."""
    import torch
    import transformers
    from foreign_tools import TEXTS

    from bitdistill.data import demo
    from bitdistill.student.loading import load_language_model, load_tokenizer
    from bitdistill.student.refine import load_student, refine
    from random_models import SHAPES

    scales = {"group 64": {"weight_scale": "group", "group_size": 64, "act_scale": "block"}, "tensor": {}}
    for folder in arguments.student:
        if "bitdistill" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
            yield folder.name, "as trained", load_student(folder).eval(), load_tokenizer(folder)
            continue
        for name, settings in scales.items():
            model = load_language_model(folder)
            refine(model, norms="none", **settings)
            yield folder.name, name, model.eval(), load_tokenizer(folder)
    for wanted in arguments.shapes:
        shape, tokenizer = SHAPES[wanted], demo.train_tokenizer(TEXTS * 20)
        config = transformers.Qwen3Config(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim, tie_word_embeddings=True, max_position_embeddings=512,
        )  # fmt: skip
        for name, settings in scales.items():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            refine(model, norms="none", **settings)
            yield f"Qwen3 {wanted}, random", name, model.eval(), tokenizer


def write_files(folder: Path, name: str, scales: str, model, tokenizer, python: str) -> list[dict]:
    """Every kind of file of a student that fits it, with its size and its distance from the student."""
    from foreign_tools import TEXTS

    from bitdistill.errors import UserError
    from bitdistill.export.agreement import compare_answers, tool_elsewhere
    from bitdistill.export.gguf_file import write_gguf
    from bitdistill.export.tools import torch_answers
    from bitdistill.export.write import write_packed
    from bitdistill.runtime.cpu import Runtime

    prompts = [tokenizer(text)["input_ids"][:24] for text in TEXTS]
    ours, found = torch_answers(model, prompts), []
    for format, kind in KINDS:
        path = folder / f"{name}, {scales}, {kind}.{'safetensors' if format == 'packed' else 'gguf'}"
        try:
            if format == "packed":
                sizes = write_packed(path, model, packing=kind, embedding="int8")
                runtime = Runtime(path, threads=1)
                theirs = [runtime.logits(prompt) for prompt in prompts], [[]] * len(prompts)
            else:
                sizes = write_gguf(path, model, tokenizer, linear_type=kind)
                if kind == "auto" and len(sizes["types"]) == 1:  # the table has this type already
                    path.unlink()
                    continue
                theirs, _ = tool_elsewhere(python, "gguf", path, prompts, 0, 1)
        except UserError as error:
            print(f"{name}, {scales}, {kind}: {error}"[:150], file=sys.stderr)
            continue
        kl = compare_answers(ours, theirs, prompts)["mean_kl"]
        row = {
            "student": name,
            "scales": scales,
            "runtime": "ours" if format == "packed" else "llama.cpp",
            "type": kind if kind != "auto" else " and ".join(sizes["types"]),
        }
        found.append(
            row | {"path": str(path), "bytes": sizes["file_bytes"], "bits": sizes["bits_per_weight"], "kl": kl}
        )
    return found


def main() -> None:
    """Writes the files, measures in rounds, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--llama_cpp", metavar="PYTHON", default=sys.executable)
    parser.add_argument("--student", type=Path, nargs="*", default=[], metavar="FOLDER")
    parser.add_argument("--shapes", nargs="*", default=["0.6B"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, help="where the files are written and kept; a temporary folder by default"
    )
    parser.add_argument("--only_write", action="store_true", help="write and compare, measure no speed")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures there, too; what it holds is gone on with"
    )
    parser.add_argument("--serve", nargs=3, metavar=("KIND", "PATH", "THREADS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*arguments.serve[:2], int(arguments.serve[2]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        if arguments.json and arguments.json.is_file():
            rows = json.loads(arguments.json.read_text(encoding="utf-8"))
        else:
            rows = []
            for name, scales, model, tokenizer in make_students(arguments):
                rows += write_files(folder, name, scales, model, tokenizer, arguments.llama_cpp)
                del model
        if not arguments.only_write:
            measure(rows, arguments)
    save(rows, arguments.json)
    print(
        "| student, scales | runtime, type | bits/weight | file, MB | decode, tokens/s | prompt, tokens/s | mean KL |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        speeds = " | ".join(_rate(row.get(part)) for part in ("decode", "prompt"))
        label = f"| {row['student']}, {row['scales']} | {row['runtime']}, {row['type']}"
        print(f"{label} | {row['bits']:.2f} | {row['bytes'] / 1e6:.0f} | {speeds} | {row['kl']:.1e} |")


def _rate(seconds: list[float] | None) -> str:
    """Median and range of tokens per second."""
    if not seconds:
        return ""
    slowest, fastest = 1 / max(seconds), 1 / min(seconds)
    return f"{1 / statistics.median(seconds):.0f} [{slowest:.0f}, {fastest:.0f}]"


def measure(rows: list[dict], arguments) -> None:
    """Adds the seconds per token of decoding and of a prompt to every row, round after round, to those of an earlier run."""
    workers = []
    for row in rows:
        ours = row["runtime"] == "ours"
        python, kind = (sys.executable, "packed") if ours else (arguments.llama_cpp, "gguf")
        workers.append(Worker(python, kind, Path(row["path"]), arguments.threads))
        if workers[-1].kind == "gguf plain":
            row["runtime"] = "llama.cpp, weights not repacked"
    for _ in range(arguments.rounds):
        for row, worker in zip(rows, workers, strict=True):
            for part, seconds in worker.ask().items():
                row.setdefault(part, []).append(seconds)
        save(rows, arguments.json)
    for worker in workers:
        worker.close()


def save(rows: list[dict], file: Path | None) -> None:
    """Writes the figures, if they are wanted as JSON."""
    if file:
        file.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
