"""Our CPU runtime compared with others, in one run on one machine: decode, prefill, memory, bytes per token, energy.

    python bench/peers.py [--shapes 0.6B 1.7B 4B] [--rounds 5] [--threads N] [--llama_bench PATH ...] [--json FILE]
    python bench/peers.py --profile           where a step of our runtime spends its time

The others are transformers in bf16 and fp32; llama.cpp as F16, BF16, Q4_0, TQ2_0 and TQ1_0, through the `llama-bench` on
PATH or through llama-cpp-python; and every other `llama-bench` that is named, with a fork's own formats made by the
`llama-quantize` beside it. All of them hold the same random ternary-valued weights (random_models.py). Those with few bits
have a head of 4 bits, as ours has in its "int4" rows. Measurements alternate: a round runs each program once, and only then
comes the next round; the machine's read bandwidth is measured in each. Compilation, loading and warm-up are excluded. A
program that cannot run is named with the reason, and nothing fails.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bitdistill.distributed import openmp
from measure import Bandwidth, Energy, cores, machine, resident_bytes, summary, table, write_json
from random_models import SHAPES, Shape, write_gguf, write_packed_model

OURS = (("base3", "int4"), ("2bit", "int4"), ("2bit", "int8"), ("base3", "ternary"))
GGUF = (("F16", "F16"), ("BF16", "BF16"), ("Q4_0", "Q4_0"), ("TQ2_0", "Q4_0"), ("TQ1_0", "Q4_0"))
FORK_TYPES = {"IQ2_BN": "q4_K", "I2_S": "q6_K"}  # ternary formats of forks, with the head that they are given
PROMPT_ID = 11


class Skipped(Exception):
    """A peer that cannot run here, with the reason."""


# --- one process a peer -----------------------------------------------------------------------------------------------


def serve(kind: str, argument: str, threads: int) -> None:
    """A worker: reads {"decode": [context, tokens]} or {"prefill": tokens} a line, answers {"seconds", "anonymous", ...}."""
    runner = {"ours": _Ours, "transformers": _Transformers, "llama_cpp": _LlamaCpp}[kind](argument, threads)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        energy = Energy()
        if "decode" in request:
            seconds = runner.decode(*request["decode"])
        elif "prefill" in request:
            seconds = runner.prefill(request["prefill"])
        else:
            print(json.dumps(runner.profile(request["profile"])), flush=True)
            continue
        print(json.dumps({"seconds": seconds, "joules": energy.joules(), **resident_bytes()}), flush=True)


class _Ours:
    def __init__(self, path: str, threads: int):
        from bitdistill.runtime.cpu import Runtime

        self.runtime = Runtime(path, threads=threads)

    def decode(self, context: int, tokens: int) -> float:
        cache = self.runtime.new_cache(context + tokens)
        token = int(self.runtime.logits([PROMPT_ID] * max(context, 1), last_only=True, cache=cache)[-1].argmax())
        started = time.perf_counter()
        for _ in range(tokens):
            token = int(self.runtime.logits([token], cache=cache)[-1].argmax())
        return time.perf_counter() - started

    def prefill(self, tokens: int) -> float:
        ids = [(7 * i + PROMPT_ID) % 1000 for i in range(tokens)]
        cache = self.runtime.new_cache(tokens)
        started = time.perf_counter()
        self.runtime.logits(ids, last_only=True, cache=cache)
        return time.perf_counter() - started

    def profile(self, context: int) -> dict[str, float]:
        return self.runtime.profile(context)


class _Transformers:
    def __init__(self, argument: str, threads: int):
        import torch
        from transformers import AutoModelForCausalLM, Qwen3Config

        torch.set_num_threads(threads)
        name, dtype = argument.split(",")
        shape = SHAPES[name]
        config = Qwen3Config(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            tie_word_embeddings=True,
            max_position_embeddings=40_960,
        )
        self.torch = torch
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        self.model = model.to_empty(device="cpu").eval()
        self.model.tie_weights()
        rotary = self.model.model.rotary_emb
        half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        rotary.inv_freq = 1 / config.rope_parameters["rope_theta"] ** half
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.uniform_(-0.03, 0.03) if parameter.dim() > 1 else parameter.fill_(1)

    def _forward(self, ids, past=None):
        return self.model(self.torch.tensor([ids]), past_key_values=past, use_cache=True, logits_to_keep=1)

    def decode(self, context: int, tokens: int) -> float:
        with self.torch.inference_mode():
            output = self._forward([PROMPT_ID] * max(context, 1))
            started = time.perf_counter()
            for _ in range(tokens):
                output = self._forward([int(output.logits[0, -1].argmax())], output.past_key_values)
            return time.perf_counter() - started

    def prefill(self, tokens: int) -> float:
        with self.torch.inference_mode():
            started = time.perf_counter()
            self._forward([(7 * i + PROMPT_ID) % 1000 for i in range(tokens)])
            return time.perf_counter() - started


class _LlamaCpp:
    """llama-cpp-python, where no llama-bench is at hand."""

    def __init__(self, path: str, threads: int):
        from llama_cpp import Llama

        self.model = Llama(path, n_ctx=4096, n_threads=threads, n_threads_batch=threads, verbose=False)

    def decode(self, context: int, tokens: int) -> float:
        self.model.reset()
        self.model.eval([PROMPT_ID] * max(context, 1))
        started = time.perf_counter()
        for _ in range(tokens):
            self.model.eval([PROMPT_ID])
        return time.perf_counter() - started

    def prefill(self, tokens: int) -> float:
        self.model.reset()
        started = time.perf_counter()
        self.model.eval([(7 * i + PROMPT_ID) % 1000 for i in range(tokens)])
        return time.perf_counter() - started


# --- peers ------------------------------------------------------------------------------------------------------------


class Worker:
    """A peer in a process of its own that stays loaded between rounds and sleeps while others are measured."""

    def __init__(self, name: str, weights: str, kind: str, argument: str, threads: int, file_bytes: int):
        self.name, self.weights, self.file_bytes = name, weights, file_bytes
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", kind, argument, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._answer()

    def _answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise Skipped(f"{self.name}: {self.process.stderr.read().strip().splitlines()[-1:]}")

    def ask(self, **request) -> dict:
        """One measurement."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class LlamaBench:
    """A `llama-bench` and a GGUF file: a process for each measurement, which loads the file from the page cache."""

    def __init__(self, name: str, weights: str, binary: str, path: Path, threads: int):
        self.name, self.weights, self.binary, self.path, self.threads = name, weights, binary, path, threads
        self.file_bytes = path.stat().st_size
        usage = subprocess.run([binary, "--help"], capture_output=True, text=True, check=False).stdout
        self.deep = "--n-depth" in usage
        self.ask(decode=[0, 1])

    def ask(self, decode=None, prefill=None) -> dict:
        """One measurement."""
        command = [self.binary, "-m", str(self.path), "-t", str(self.threads), "-r", "1", "-o", "json"]
        if prefill is not None:
            command += ["-p", str(prefill), "-n", "0"]
        elif decode[0] <= 64:
            command += ["-p", "0", "-n", str(decode[1])]
        elif self.deep:
            command += ["-p", "0", "-n", str(decode[1]), "-d", str(decode[0])]
        else:
            command += ["-p", "0", "-n", "0", "-gp", f"{decode[0]},{decode[1]}"]
        energy = Energy()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        output, errors = process.communicate()
        try:
            result = json.loads(output[output.index("[\n") :])[-1]
        except (ValueError, IndexError) as error:
            raise Skipped(
                f"{self.name}, {self.weights}: {(errors.strip().splitlines() or ['no output'])[-1]}"
            ) from error
        return {"seconds": result["avg_ns"] / 1e9, "joules": energy.joules()}

    def close(self) -> None:
        """Nothing stays open."""


def make_peers(
    name: str, folder: Path, threads: int, benches: list[str], ours_only: bool, leave_out: list[str]
) -> tuple[list, list[str]]:
    """All peers that run here at a shape, and why the others do not."""
    shape, peers, skipped = SHAPES[name], [], [f"{word}: left out by --leave_out" for word in leave_out]

    def attempt(make) -> None:
        try:
            peers.append(make())
        except Skipped as reason:
            skipped.append(str(reason))

    for packing, embedding in OURS:
        path = folder / f"{name}-{packing}-{embedding}.safetensors"
        if not path.is_file():
            write_packed_model(path, shape, packing, embedding)
        size = path.stat().st_size
        attempt(
            lambda p=path, s=size, w=f"{packing}, {embedding} head": Worker("bitdistill", w, "ours", str(p), threads, s)
        )
    if ours_only:
        return peers, skipped

    parameters = shape.linear_weights() + shape.vocabulary * shape.hidden
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for dtype, width in (("bfloat16", 2), ("float32", 4)) if "transformers" not in leave_out else ():
        if parameters * width > 0.8 * available:
            skipped.append(
                f"transformers {dtype}: needs {parameters * width / 1e9:.1f} GB, {available / 1e9:.1f} are free"
            )
            continue
        available -= parameters * width
        size, argument = parameters * width, f"{name},{dtype}"
        attempt(lambda d=dtype, a=argument, s=size: Worker("transformers", d, "transformers", a, threads, s))

    wanted = [one for one in GGUF if one[0] not in leave_out]
    for linear, head in wanted if benches or importlib.util.find_spec("llama_cpp") else ():
        path = folder / f"{name}-{linear}-{head}.gguf"
        if not path.is_file():
            write_gguf(path, shape, linear, head)
        for binary in benches:
            label = bench_name(binary)
            attempt(lambda b=binary, p=path, n=label, w=f"{linear}, {head} head": LlamaBench(n, w, b, p, threads))
        if not benches:
            size = path.stat().st_size
            attempt(
                lambda p=path, s=size, w=f"{linear}, {head} head": Worker(
                    "llama-cpp-python", w, "llama_cpp", str(p), threads, s
                )
            )
    if not benches:
        skipped.append("llama.cpp: no llama-bench on PATH or given by --llama_bench")
    for binary in benches:
        for path, weights in fork_files(binary, name, shape, folder):
            attempt(lambda b=binary, p=path, w=weights: LlamaBench(bench_name(b), w, b, p, threads))
    return peers, skipped


def bench_name(binary: str) -> str:
    """What a llama-bench is called in the table: the folder that it was built in, where that says more."""
    parts = [part for part in Path(binary).resolve().parts if part not in ("build", "bin", "llama-bench")]
    return parts[-1] if parts and parts[-1] not in ("/", "usr", "local") else "llama.cpp"


def fork_files(binary: str, name: str, shape: Shape, folder: Path):
    """GGUF files in a fork's own ternary formats, where the llama-quantize beside its llama-bench can make them."""
    quantize = Path(binary).with_name("llama-quantize")
    if not quantize.is_file():
        return
    usage = subprocess.run([quantize], capture_output=True, text=True, check=False)
    for kind, head in FORK_TYPES.items():
        if f" {kind} " not in usage.stdout + usage.stderr:
            continue
        path = folder.resolve() / f"{name}-{bench_name(binary)}-{kind}-{head}.gguf"
        if not path.is_file():
            source = folder.resolve() / f"{name}-F32-F32.gguf"
            if not source.is_file():
                write_gguf(source, shape, "F32", "F32")
            # absolute paths: llama-quantize takes a bare name that begins with a digit for a type
            subprocess.run(
                [quantize, "--token-embedding-type", head, source, path, kind], capture_output=True, check=True
            )
            source.unlink()
        yield path, f"{kind}, {head} head"


# --- the run ----------------------------------------------------------------------------------------------------------


def measure(name: str, arguments, folder: Path, bandwidth: Bandwidth) -> dict:
    """All peers at one shape."""
    peers, skipped = make_peers(
        name, folder, arguments.threads, arguments.llama_bench, arguments.ours_only, arguments.leave_out
    )
    requests = [(f"decode {context}", {"decode": [context, arguments.tokens]}) for context in arguments.contexts]
    requests += [(f"prefill {tokens}", {"prefill": tokens}) for tokens in arguments.prefill]
    rates = {(peer, label): [] for peer in peers for label, _ in requests}
    streams, joules, resident = [], {}, {}
    dead = set()
    for label, request in requests:
        tokens = request["prefill"] if "prefill" in request else request["decode"][1]
        for turn in range(-1, arguments.rounds):  # round -1 warms caches and compiles
            if turn >= 0:
                streams.append(bandwidth.gigabytes_per_second())
            for peer in peers:
                if peer in dead:
                    continue
                try:
                    answer = peer.ask(**request)
                except Skipped as reason:
                    dead.add(peer)
                    skipped.append(f"{label}: {reason}")
                    continue
                if turn >= 0:
                    rates[peer, label].append(tokens / answer["seconds"])
                    if "anonymous" in answer:
                        resident[peer] = answer["anonymous"] + answer["file"]
                    if answer["joules"] is not None:
                        joules.setdefault((peer, label), []).append(answer["joules"] / tokens)
            print(f"  {name} {label}: round {turn + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    for peer in peers:
        peer.close()
    rows = []
    for peer in peers:
        row = {
            "name": peer.name,
            "weights": peer.weights,
            "file_bytes": peer.file_bytes,
            "resident_bytes": resident.get(peer),
        }
        for label, request in requests:
            if not rates[peer, label]:
                continue
            row[label] = summary(rates[peer, label])
            if (peer, label) in joules:
                row[f"{label} joules"] = summary(joules[peer, label])
            if "decode" in request:
                context = request["decode"][0] + arguments.tokens / 2
                shape = SHAPES[name]
                cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * 2 * context  # K and V, 2 bytes per number
                row[f"{label} bytes"] = int(peer.file_bytes + cache)
        rows.append(row)
    return {"shape": name, "threads": arguments.threads, "stream": summary(streams), "rows": rows, "skipped": skipped}


def show(result: dict, contexts: list[int], prefill: list[int]) -> str:
    """The table of one shape; ratios are against llama.cpp F16 or, without it, the fastest transformers."""
    stream = result["stream"]
    labels = [f"decode {context}" for context in contexts] + [f"prefill {tokens}" for tokens in prefill]
    first = labels[0]
    baseline = next(
        (row for row in result["rows"] if row["weights"].startswith("F16") and first in row),
        max(
            (row for row in result["rows"] if row["name"] == "transformers" and first in row),
            key=lambda row: row[first]["median"],
            default=None,
        ),
    )
    cells = [["runner", "weights", "file MB", "resident MB", *labels, "GB/s", "of stream", "x F16"]]
    for row in result["rows"]:
        resident = f"{row['resident_bytes'] / 1e6:,.0f}" if row["resident_bytes"] else "-"
        speeds = []
        for label in labels:
            rate = row.get(label)
            speeds.append(f"{rate['median']:,.1f} [{rate['min']:,.1f}, {rate['max']:,.1f}]" if rate else "-")
        if first in row:
            used = row[f"{first} bytes"] * row[first]["median"] / 1e9
            ratio = f"{row[first]['median'] / baseline[first]['median']:.2f}" if baseline else "-"
            ends = [f"{used:.1f}", f"{100 * used / stream['median']:.0f} %", ratio]
        else:
            ends = ["-", "-", "-"]
        cells.append([row["name"], row["weights"], f"{row['file_bytes'] / 1e6:,.0f}", resident, *speeds, *ends])
    lines = [
        f"Qwen3-{result['shape']} shape, {result['threads']} threads, tokens/s: median [min, max]; decode at a context, "
        f"prefill of a prompt. Read bandwidth in the same run: {stream['median']:.1f} GB/s "
        f"[{stream['min']:.1f}, {stream['max']:.1f}]. GB/s, share and ratio are those of {first}.",
        table(cells, "<<" + ">" * (len(cells[0]) - 2)),
    ]
    lines += [f"not measured: {reason}" for reason in result["skipped"]]
    return "\n".join(lines)


def profile(arguments, folder: Path) -> None:
    """Where a step of ours spends its time, for each packing at the first shape."""
    name = arguments.shapes[0]
    peers, skipped = make_peers(name, folder, arguments.threads, [], ours_only=True, leave_out=[])
    for peer in peers:
        for context in arguments.contexts:
            peer.ask(decode=[context, 8])
            parts = peer.ask(profile=context)
            total = sum(parts.values())
            print(
                f"{name}, {peer.weights}, context {context}, {arguments.threads} threads: {1e3 * total:.2f} ms a token"
            )
            for part, seconds in sorted(parts.items(), key=lambda item: -item[1]):
                print(f"  {part:<12}{1e3 * seconds:8.3f} ms  {100 * seconds / total:5.1f} %")
        peer.close()
    for reason in skipped:
        print(reason)


def add_llama_bench_on_path(arguments) -> None:
    """Puts the `llama-bench` on PATH, if there is one, before those that were named."""
    found = shutil.which("llama-bench")
    arguments.llama_bench = [*([found] if found else []), *arguments.llama_bench]


def main() -> int:
    """Measures, prints one table a shape, writes JSON."""
    openmp.wait_briefly()
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.6B"])
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="decoded in a measurement")
    parser.add_argument("--contexts", type=int, nargs="+", default=[16, 2048])
    parser.add_argument("--prefill", type=int, nargs="*", default=[128, 512])
    parser.add_argument("--llama_bench", action="append", default=[], metavar="PATH", help="repeatable")
    parser.add_argument("--ours_only", action="store_true")
    parser.add_argument("--leave_out", nargs="+", default=[], metavar="PEER", help="transformers, or GGUF types")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--folder", type=Path, help="keeps the model files here; by default they are temporary")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    add_llama_bench_on_path(arguments)
    for binary in arguments.llama_bench:
        if not os.access(binary, os.X_OK):
            parser.error(f"--llama_bench: expected an executable; got {binary}")

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.profile:
            profile(arguments, folder)
            return 0
        bandwidth = Bandwidth(arguments.threads)
        report = {
            "machine": machine(),
            "command": " ".join(Path(word).name if "/" in word else word for word in sys.argv),
            "results": [],
        }
        for name in arguments.shapes:
            report["results"].append(measure(name, arguments, folder, bandwidth))
            print(show(report["results"][-1], arguments.contexts, arguments.prefill), flush=True)
    if arguments.json:
        write_json(arguments.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
