"""Our CPU runtime compared with others, in one run on one machine: decode, prefill, batches, memory, bytes per token, energy.

    python bench/peers.py [--shapes 0.6B 1.7B 4B] [--rounds 5] [--threads N] [--llama_bench PATH ...] [--json FILE]
    python bench/peers.py --profile           where a step of our runtime spends its time

The others are transformers in bf16 and fp32; llama.cpp as F16, BF16, Q4_0, TQ2_0 and TQ1_0, through the `llama-bench` on
PATH or through llama-cpp-python; and every other `llama-bench` that is named, with a fork's own formats made by the
`llama-quantize` beside it. All of them hold the same random ternary-valued weights (random_models.py). Those with few bits
have a head of 4 bits, as ours has in its "int4" rows. Measurements alternate: a round runs each program once, and only then
comes the next round; the machine's read bandwidth is measured in each. Compilation, loading and warm-up are excluded. A
program that cannot run is named with the reason, and nothing fails.

Every peer runs with its best flags: the warm-up of a column tries all that its usage names among WAYS, and the fastest are
kept for that column. A batch is decoded by the `llama-batched-bench` beside a `llama-bench`. **Figures of a busy machine are
refused**: peers that wait for each other at barriers collapse there. What other programs use is measured with every
figure, and where they need more than the cores that the threads leave free, it is measured again, and left out in the end.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bitdistill.distributed import openmp
from measure import Bandwidth, Energy, Neighbors, cores, machine, resident_bytes, summary, table, write_json
from random_models import SHAPES, Shape, write_gguf, write_packed_model

OURS = (("base3", "int4"), ("2bit", "int4"), ("2bit", "int8"), ("base3", "ternary"))
GGUF = (("F16", "F16"), ("BF16", "BF16"), ("Q4_0", "Q4_0"), ("TQ2_0", "Q4_0"), ("TQ1_0", "Q4_0"))
FORK_TYPES = {"IQ2_BN": "q4_K", "I2_S": "q6_K"}  # ternary formats of forks, with the head that they are given
WAYS = {"--flash-attn": ("-fa", "0", "1"), "--run-time-repack": ("-rtr", "0", "1")}  # in a usage: flag and its values
PROMPT_ID = 11
PROMPT_OF_BATCH = 16  # tokens of each sequence of a batch, in front of those that are decoded
TRIES = 3  # of a measurement that other programs disturb
DISTURBED = 0.15  # cores that they may use beyond those that are free


class Skipped(Exception):
    """A peer that cannot run here, with the reason."""


# --- one process a peer -----------------------------------------------------------------------------------------------


def serve(kind: str, argument: str, threads: int) -> None:
    """A worker: reads {"decode": [context, tokens]}, {"prefill": tokens} or {"batch": [sequences, tokens]} a line, answers
    {"seconds", "anonymous", ...}."""
    runner = {"ours": _Ours, "transformers": _Transformers, "llama_cpp": _LlamaCpp}[kind](argument, threads)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        energy = Energy()
        if "decode" in request:
            seconds = runner.decode(*request["decode"])
        elif "prefill" in request:
            seconds = runner.prefill(request["prefill"])
        elif "batch" in request:
            seconds = runner.batch(*request["batch"])
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

    def batch(self, sequences: int, tokens: int) -> float:
        cache, slots = self.runtime._keys_values(sequences, PROMPT_OF_BATCH + tokens), list(range(sequences))
        decoder, last = self.runtime._decoder, [PROMPT_ID + slot for slot in slots]
        for position in range(PROMPT_OF_BATCH):
            decoder.forward(last, slots, [position] * sequences, cache, [])
        started = time.perf_counter()
        for position in range(PROMPT_OF_BATCH, PROMPT_OF_BATCH + tokens):
            last = decoder.forward(last, slots, [position] * sequences, cache).argmax(axis=1).tolist()
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
        ids = self.torch.tensor(ids if isinstance(ids[0], list) else [ids])
        return self.model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)

    def batch(self, sequences: int, tokens: int) -> float:
        with self.torch.inference_mode():
            output = self._forward([[PROMPT_ID + one] * PROMPT_OF_BATCH for one in range(sequences)])
            started = time.perf_counter()
            for _ in range(tokens):
                last = output.logits[:, -1:].argmax(dim=-1).tolist()
                output = self._forward(last, output.past_key_values)
            return time.perf_counter() - started

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

    def batch(self, sequences: int, tokens: int) -> float:
        raise SystemExit("llama-cpp-python: batches need a llama-batched-bench")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# --- peers ------------------------------------------------------------------------------------------------------------


class Worker:
    """A peer in a process of its own that stays loaded between rounds and sleeps while others are measured."""

    ways = ((),)

    def __init__(
        self, name: str, weights: str, kind: str, argument: str, threads: int, file_bytes: int, features: str = ""
    ):
        self.name, self.weights, self.file_bytes = name, weights, file_bytes
        self.version = {"transformers": f"transformers {_version('transformers')}, torch {_version('torch')}"}.get(kind)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if features:
            self.weights += f", {features}"
            environment["BITDISTILL_CPU_FEATURES"] = features
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

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the processes that stay alive between measurements."""
        return (self.process.pid,)

    def ask(self, way: tuple = (), **request) -> dict:
        """One measurement."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class LlamaBench:
    """A `llama-bench` and a GGUF file: a process for each measurement, which loads the file from the page cache."""

    pids = ()

    def __init__(self, name: str, weights: str, binary: str, path: Path, threads: int):
        self.name, self.weights, self.binary, self.path, self.threads = name, weights, binary, path, threads
        self.file_bytes, self.version = path.stat().st_size, None
        usage = subprocess.run([binary, "--help"], capture_output=True, text=True, check=False).stdout
        self.deep = "--n-depth" in usage
        flags = [[(flag, value) for value in values] for word, (flag, *values) in WAYS.items() if word in usage]
        self.ways = [tuple(itertools.chain(*way)) for way in itertools.product(*flags)]
        self.ask(decode=[0, 1])

    def ask(self, way: tuple = (), decode=None, prefill=None, batch=None) -> dict:
        """One measurement."""
        if batch is not None:
            return self._batch(way, *batch)
        command = [self.binary, "-m", str(self.path), "-t", str(self.threads), "-r", "1", "-o", "json", *way]
        if prefill is not None:
            command += ["-p", str(prefill), "-n", "0"]
        elif decode[0] <= 64:
            command += ["-p", "0", "-n", str(decode[1])]
        elif self.deep:
            command += ["-p", "0", "-n", str(decode[1]), "-d", str(decode[0])]
        else:
            command += ["-p", "0", "-n", "0", "-gp", f"{decode[0]},{decode[1]}"]
        energy = Energy()
        output = self._output(command)
        try:
            result = json.loads(output[output.index("[\n") :])[-1]
        except (ValueError, IndexError) as error:
            raise Skipped(f"{self.name}, {self.weights}: an answer without figures") from error
        self.version = f"build {result.get('build_number')}, commit {result.get('build_commit')}"
        return {"seconds": result["avg_ns"] / 1e9, "joules": energy.joules()}

    def _batch(self, way: tuple, sequences: int, tokens: int) -> dict:
        """By the `llama-batched-bench` beside it, where -rtr is a switch."""
        binary = Path(self.binary).with_name("llama-batched-bench")
        if not binary.is_file():
            raise Skipped(f"{self.name}, {self.weights}: no llama-batched-bench beside {Path(self.binary).name}")
        flags = dict(zip(way[::2], way[1::2], strict=True))
        switches = ["-rtr"] if flags.pop("-rtr", "0") == "1" else []
        positions = -(-sequences * (PROMPT_OF_BATCH + tokens) // 256) * 256
        command = [
            str(binary),
            "-m",
            str(self.path),
            "-t",
            str(self.threads),
            *switches,
            *itertools.chain(*flags.items()),
        ]
        command += ["-c", str(positions), "-npp", str(PROMPT_OF_BATCH), "-ntg", str(tokens), "-npl", str(sequences)]
        energy = Energy()
        lines = [line.split("|") for line in self._output(command).splitlines() if "|" in line]
        names = [name.strip() for name in next((line for line in lines if "T_TG s" in map(str.strip, line)), [])]
        if not names or lines[-1][names.index("B")].strip() != str(sequences):
            raise Skipped(f"{self.name}, {self.weights}: llama-batched-bench answered without figures")
        return {"seconds": float(lines[-1][names.index("T_TG s")]), "joules": energy.joules()}

    def _output(self, command: list[str]) -> str:
        """What a program prints.

        Raises:
            Skipped: it failed, with its last words.
        """
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            words = (done.stderr.strip().splitlines() or ["no words"])[-1]
            raise Skipped(f"{self.name}, {self.weights}: ended with status {done.returncode}: {words}")
        return done.stdout

    def close(self) -> None:
        """Nothing stays open."""


def make_peers(
    name: str, folder: Path, threads: int, benches: list[str], ours_only: bool, leave_out: list[str], features=()
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
        for instructions in ("", *features):
            attempt(
                lambda p=path, s=size, w=f"{packing}, {embedding} head", f=instructions: Worker(
                    "bitdistill", w, "ours", str(p), threads, s, f
                )
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


def undisturbed(peer, way: tuple, request: dict, threads: int) -> tuple[dict | None, float]:
    """A measurement, or None where other programs disturbed all TRIES of it, and the cores that they used."""
    least = float("inf")
    for _ in range(TRIES):
        neighbors = Neighbors(*peer.pids)
        answer = peer.ask(way, **request)
        used = neighbors.cores()
        if used <= cores() - threads + DISTURBED:
            return answer, used
        least = min(least, used)
    return None, least


def best_way(peer, request: dict) -> tuple:
    """The flags with which a peer answers fastest; caches are warm and code is compiled afterwards."""
    seconds = {way: peer.ask(way, **request)["seconds"] for way in peer.ways}
    return min(seconds, key=seconds.get)


def requests_of(arguments) -> list[tuple[str, dict, int]]:
    """Of each column: its name, what a peer is asked, and how many tokens that is."""
    tokens = arguments.tokens
    found = [(f"decode {context}", {"decode": [context, tokens]}, tokens) for context in arguments.contexts]
    found += [(f"prefill {length}", {"prefill": length}, length) for length in arguments.prefill]
    return found + [(f"batch {size}", {"batch": [size, tokens]}, size * tokens) for size in arguments.batch]


def measure(name: str, arguments, folder: Path, bandwidth: Bandwidth) -> dict:
    """All peers at one shape."""
    threads = arguments.threads
    peers, skipped = make_peers(
        name, folder, threads, arguments.llama_bench, arguments.ours_only, arguments.leave_out, arguments.features
    )
    requests = requests_of(arguments)
    rates = {(peer, label): [] for peer in peers for label, _, _ in requests}
    streams, joules, resident, ways, loads, refused = [], {}, {}, {}, [], {}
    for label, request, tokens in requests:
        for peer in list(peers):
            try:
                ways[peer, label] = best_way(peer, request)
            except Skipped as reason:
                skipped.append(f"{label}: {reason}")
        for turn in range(arguments.rounds):
            streams.append(bandwidth.gigabytes_per_second())
            for peer in peers:
                if (peer, label) not in ways:
                    continue
                try:
                    answer, used = undisturbed(peer, ways[peer, label], request, threads)
                except Skipped as reason:
                    skipped.append(f"{label}: {reason}")
                    continue
                if answer is None:
                    refused.setdefault((peer, label), []).append(used)
                    continue
                loads.append(used)
                rates[peer, label].append(tokens / answer["seconds"])
                if "anonymous" in answer:
                    resident[peer] = answer["anonymous"] + answer["file"]
                if answer["joules"] is not None:
                    joules.setdefault((peer, label), []).append(answer["joules"] / tokens)
            print(f"  {name} {label}: round {turn + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    for peer in peers:
        peer.close()
    for (peer, label), used in refused.items():
        skipped.append(
            f"{label}: {peer.name}, {peer.weights}: {len(used)} of {arguments.rounds} rounds refused, other programs used "
            f"{min(used):.2f} cores and more"
        )
    rows = []
    for peer in peers:
        row = {
            "name": peer.name,
            "weights": peer.weights,
            "version": peer.version,
            "file_bytes": peer.file_bytes,
            "resident_bytes": resident.get(peer),
        }
        for label, request, _ in requests:
            if not rates[peer, label]:
                continue
            row[label] = summary(rates[peer, label]) | {"flags": " ".join(ways[peer, label])}
            if (peer, label) in joules:
                row[f"{label} joules"] = summary(joules[peer, label])
            if "decode" in request:
                context = request["decode"][0] + arguments.tokens / 2
                shape = SHAPES[name]
                cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * 2 * context  # K and V, 2 bytes per number
                row[f"{label} bytes"] = int(peer.file_bytes + cache)
        rows.append(row)
    return {
        "shape": name,
        "threads": threads,
        "stream": summary(streams),
        "others": summary(loads or [float("nan")]),
        "rows": rows,
        "skipped": skipped,
    }


def show(result: dict, labels: list[str]) -> str:
    """The table of one shape; ratios are against llama.cpp F16 or, without it, the fastest transformers."""
    stream, first = result["stream"], labels[0]
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
        if f"{first} bytes" in row:
            used = row[f"{first} bytes"] * row[first]["median"] / 1e9
            ratio = f"{row[first]['median'] / baseline[first]['median']:.2f}" if baseline else "-"
            ends = [f"{used:.1f}", f"{100 * used / stream['median']:.0f} %", ratio]
        else:
            ends = ["-", "-", "-"]
        cells.append([row["name"], row["weights"], f"{row['file_bytes'] / 1e6:,.0f}", resident, *speeds, *ends])
    lines = [
        f"Qwen3-{result['shape']} shape, {result['threads']} threads, tokens/s: median [min, max]; decode at a context, "
        f"prefill of a prompt, a batch's sequences together. Read bandwidth in the same run: {stream['median']:.1f} GB/s "
        f"[{stream['min']:.1f}, {stream['max']:.1f}]. GB/s, share and ratio are those of {first}. Other programs used "
        f"{result['others']['median']:.2f} cores [{result['others']['min']:.2f}, {result['others']['max']:.2f}].",
        table(cells, "<<" + ">" * (len(cells[0]) - 2)),
    ]
    for row in result["rows"]:
        flags = [f"{label} {row[label]['flags']}" for label in labels if row.get(label, {}).get("flags")]
        lines += [f"flags of {row['name']}, {row['weights']}: {'; '.join(flags)}"] if flags else []
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
    parser.add_argument("--contexts", type=int, nargs="*", default=[16, 2048])
    parser.add_argument("--prefill", type=int, nargs="*", default=[128, 512])
    parser.add_argument("--batch", type=int, nargs="*", default=[16], help="sequences that are decoded together")
    parser.add_argument(
        "--features", nargs="*", default=[], metavar="SET", help="ours once more with BITDISTILL_CPU_FEATURES=SET"
    )
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
            print(show(report["results"][-1], [label for label, _, _ in requests_of(arguments)]), flush=True)
    if arguments.json:
        write_json(arguments.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
