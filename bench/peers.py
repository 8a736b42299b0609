"""Our CPU runtime compared with others, in one run on one machine: decode, prefill, batches, memory, bytes per token, energy.

    python bench/peers.py [--shapes 0.6B 1.7B 4B] [--rounds 5] [--threads N] [--llama_bench PATH ...] [--json FILE]
    python bench/peers.py --json FILE --only "decode 16" --seconds 90      one column, as far as it comes in that time
    python bench/peers.py --profile           where a step of our runtime spends its time

The others are transformers in bf16 and fp32; llama.cpp as F16, BF16, Q4_0, TQ2_0 and TQ1_0, through the `llama-bench` on
PATH or through llama-cpp-python; and every other `llama-bench` that is named, with a fork's own formats made by the
`llama-quantize` beside it. All of them hold weights of the same shape and kind (random_models.py). Those with few bits
have a head of 4 bits, as ours has in its "int4" rows. Measurements alternate: a round runs each program once, and only then
comes the next round; the machine's read bandwidth is measured in each. Compilation, loading and warm-up are excluded. A
program that cannot run is named with the reason, and nothing fails.

Every peer runs with its best flags: the first round of a column tries all that its usage names among WAYS, and the later
rounds keep the fastest. A batch is decoded by the `llama-batched-bench` beside a `llama-bench`. **Figures of a shared core
are refused**: with fewer threads than cores everything is pinned to the cores that are used least, and what other programs
use there is measured with every figure; where they need a part of these cores, the figure is taken again, and left out in the
end. What runs on the other cores at the same time shares caches and memory, so it is recorded, too.

--json is written after every measurement, and what is there already with the same settings is not measured again. So a run
that was broken off, or that --seconds ended, is gone on with by the same command.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bitdistill.distributed import openmp
from cpu_training import MASKS, NATIVE
from measure import (
    Bandwidth,
    Energy,
    Neighbors,
    cores,
    machine,
    pin,
    resident_bytes,
    summary,
    table,
    write_json,
)
from random_models import SHAPES, Shape, write_gguf, write_packed_model

OURS = (("base3", "int4"), ("2bit", "int4"), ("2bit", "int8"), ("base3", "ternary"))
GGUF = (("F16", "F16"), ("BF16", "BF16"), ("Q4_0", "Q4_0"), ("TQ2_0", "Q4_0"), ("TQ1_0", "Q4_0"))
FORK_TYPES = {"IQ2_BN": "q4_K", "I2_S": "q6_K"}  # ternary formats of forks, with the head that they are given
WAYS = {"--flash-attn": ("-fa", "0", "1"), "--run-time-repack": ("-rtr", "0", "1")}  # in a usage: flag and its values
PROMPT_ID = 11
PROMPT_OF_BATCH = 16  # tokens of each sequence of a batch, in front of those that are decoded
TRIES = 3  # of a measurement that other programs disturb
DISTURBED = 0.15  # cores that they may use of those that are measured on


def available_memory() -> int:
    """Bytes that programs can have without swapping: free ones, and those of caches."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])


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
        block = torch.empty(2**20).uniform_(-0.03, 0.03)
        with torch.no_grad():
            for parameter in self.model.parameters():
                numbers = block.repeat(-(-parameter.numel() // len(block)))[: parameter.numel()]
                parameter.copy_(numbers.view_as(parameter)) if parameter.dim() > 1 else parameter.fill_(1)

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
        self, name: str, weights: str, kind: str, argument: str, threads: int, file_bytes: int, isa: str = NATIVE
    ):
        self.name, self.weights, self.file_bytes = name, weights, file_bytes
        self.version = {"transformers": f"transformers {_version('transformers')}, torch {_version('torch')}"}.get(kind)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **MASKS[isa]}
        if isa != NATIVE:
            self.weights += f", {isa}"
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

    def warm(self, **request) -> None:
        """Compiles and fills the caches."""
        self.ask(**request)

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
        self.name, self.weights, self.threads = name, weights, threads
        self.binary, self.path = str(Path(shutil.which(binary) or binary).absolute()), path.absolute()
        self.file_bytes, self.version = path.stat().st_size, None
        usage = subprocess.run([binary, "--help"], capture_output=True, text=True, check=False).stdout
        self.deep = "--n-depth" in usage
        flags = [[(flag, value) for value in values] for word, (flag, *values) in WAYS.items() if word in usage]
        self.ways = [tuple(itertools.chain(*way)) for way in itertools.product(*flags)]

    def warm(self, **request) -> None:
        """Each of its processes does that itself."""

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
        answer = self._output(
            command, with_log=True
        )  # of llama.cpp it is the answer, of ik_llama.cpp a part of the log
        lines = [line.split("|") for line in answer.splitlines() if "|" in line]
        names = [name.strip() for name in next((line for line in lines if "T_TG s" in map(str.strip, line)), [])]
        if not names or lines[-1][names.index("B")].strip() != str(sequences):
            raise Skipped(f"{self.name}, {self.weights}: llama-batched-bench answered without figures")
        return {"seconds": float(lines[-1][names.index("T_TG s")]), "joules": energy.joules()}

    def _output(self, command: list[str], with_log: bool = False) -> str:
        """What a program prints, and its log as well where `with_log`.

        Raises:
            Skipped: it failed, with its last words.
        """
        # Some write a llama.log where they are: beside the model, not into the user's folder.
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=self.path.parent)
        if done.returncode:
            words = (done.stderr.strip().splitlines() or ["no words"])[-1].replace(f"{Path(command[0]).parent}/", "")
            raise Skipped(f"{self.name}, {self.weights}: ended with status {done.returncode}: {words}")
        return done.stdout + done.stderr if with_log else done.stdout

    def close(self) -> None:
        """Nothing stays open."""


def make_peers(
    name: str, folder: Path, threads: int, benches: list[str], ours_only: bool, leave_out: list[str], isa: list[str]
) -> tuple[list, list[str]]:
    """All peers that run here at a shape, and why the others do not."""
    shape, peers, skipped = SHAPES[name], [], [f"{word}: left out by --leave_out" for word in leave_out]

    def attempt(make, runner: str, weights: str) -> None:
        kind = weights.split(",")[0]
        if {runner, kind, f"{runner} {kind}"} & set(leave_out):
            return
        try:
            peers.append(make(runner, weights))
        except Skipped as reason:
            skipped.append(str(reason))

    sets = [NATIVE, *(one for one in isa if one != NATIVE)]
    for (packing, embedding), one in itertools.product(OURS, sets):
        path = folder / f"{name}-{packing}-{embedding}.safetensors"
        if packing in leave_out or f"{packing}-{embedding}" in leave_out:
            continue
        if not path.is_file():
            write_packed_model(path, shape, packing, embedding)
        size = path.stat().st_size
        attempt(
            lambda n, w, p=path, s=size, i=one: Worker(n, w, "ours", str(p), threads, s, i),
            "bitdistill",
            f"{packing}, {embedding} head",
        )
    if ours_only:
        return peers, skipped

    parameters = shape.linear_weights() + shape.vocabulary * shape.hidden
    available = available_memory()
    kinds = [] if "transformers" in leave_out else [("bfloat16", 2, one) for one in sets] + [("float32", 4, NATIVE)]
    for dtype, width, one in kinds:
        if f"transformers {dtype}" in leave_out:
            continue
        if parameters * width > 0.8 * available:
            skipped.append(
                f"transformers {dtype}: needs {parameters * width / 1e9:.1f} GB, {available / 1e9:.1f} are free"
            )
            continue
        available -= parameters * width
        size, argument = parameters * width, f"{name},{dtype}"
        attempt(
            lambda n, w, a=argument, s=size, i=one: Worker(n, w, "transformers", a, threads, s, i),
            "transformers",
            dtype,
        )

    wanted = [one for one in GGUF if one[0] not in leave_out]
    for linear, head in wanted if benches or importlib.util.find_spec("llama_cpp") else ():
        path = folder / f"{name}-{linear}-{head}.gguf"
        if not path.is_file():
            write_gguf(path, shape, linear, head)
        weights, size = f"{linear}, {head} head", path.stat().st_size
        for binary in benches:
            attempt(lambda n, w, b=binary, p=path: LlamaBench(n, w, b, p, threads), bench_name(binary), weights)
        if not benches:
            attempt(
                lambda n, w, p=path, s=size: Worker(n, w, "llama_cpp", str(p), threads, s), "llama-cpp-python", weights
            )
    if not benches:
        skipped.append("llama.cpp: no llama-bench on PATH or given by --llama_bench")
    for binary in benches:
        for path, weights in fork_files(binary, name, shape, folder):
            attempt(lambda n, w, b=binary, p=path: LlamaBench(n, w, b, p, threads), bench_name(binary), weights)
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


def undisturbed(peer, way: tuple, request: dict, cpus: list[int]) -> tuple[dict | None, float, float]:
    """A measurement, or None where other programs used a part of its cores in all TRIES of it; then how much of these
    they used, and what ran on the other cores."""
    found = []
    for _ in range(TRIES):
        neighbors = Neighbors(*peer.pids, cpus=cpus)
        answer = peer.ask(way, **request)
        found.append(neighbors.cores())
        if found[-1][0] <= DISTURBED:
            return answer, *found[-1]
    return None, *min(found)


def requests_of(arguments) -> list[tuple[str, dict, int]]:
    """Of each column: its name, what a peer is asked, and how many tokens that is."""
    tokens = arguments.tokens
    found = [(f"decode {context}", {"decode": [context, tokens]}, tokens) for context in arguments.contexts]
    found += [(f"prefill {length}", {"prefill": length}, length) for length in arguments.prefill]
    found += [(f"batch {size}", {"batch": [size, tokens]}, size * tokens) for size in arguments.batch]
    return [one for one in found if not arguments.only or one[0] in arguments.only]


class Enough(Exception):
    """The time that --seconds gives is over."""


class Columns:
    """The figures of one shape, which grow by a measurement at a time.

    Args:
        result: what was measured before, from --json; {} at first. save: called after each measurement.
        peers: that take part. arguments: of the command. cpus: the cores that all of it is pinned to.
    """

    def __init__(self, result: dict, peers: list, arguments, cpus: list[int], save):
        self.result, self.peers, self.arguments, self.cpus, self.save = result, peers, arguments, cpus, save
        self.started = time.perf_counter()
        result.setdefault("columns", {})
        rows = {(row["name"], row["weights"]): row for row in result.setdefault("rows", [])}
        self.rows = {}
        for peer in peers:
            empty = {"name": peer.name, "weights": peer.weights, "version": None, "resident_bytes": None}
            self.rows[peer] = rows.get((peer.name, peer.weights), empty) | {"file_bytes": peer.file_bytes}
        others = [row for row in result["rows"] if not any(self._is_of(row, peer) for peer in peers)]
        result["rows"] = [*self.rows.values(), *others]

    @staticmethod
    def _is_of(row: dict, peer) -> bool:
        return (row["name"], row["weights"]) == (peer.name, peer.weights)

    def column(self, label: str, request: dict, tokens: int, bandwidth) -> None:
        """All rounds of a column, apart from what is there.

        Raises:
            Enough: there is no time for the next measurement.
        """
        arguments = self.arguments
        settings = {"threads": arguments.threads, "tokens": arguments.tokens}
        column = self.result["columns"].get(label)
        if column is None or column["settings"] != settings:
            for row in self.result["rows"]:
                row.pop(label, None)
            column = {"settings": settings, "runs": [], "stream": [], "others": [], "elsewhere": [], "skipped": []}
            self.result["columns"][label] = column
        if not any(self._missing(peer, label, arguments.rounds - 1) for peer in self.peers):
            return
        at = machine()
        column["runs"].append({"date": at["date"], "commit": at["commit"], "cores": self.cpus})
        failed, warm = set(), set()
        for turn in range(arguments.rounds):
            if any(self._missing(peer, label, turn) for peer in self.peers if peer not in failed):
                column["stream"].append(bandwidth.gigabytes_per_second())
            for peer in self.peers:
                for way in self._missing(peer, label, turn) if peer not in failed else ():
                    self._in_time(self.rows[peer].get(label, {}).get("took", 0.0))
                    try:
                        if peer not in warm:
                            peer.warm(**request)
                            warm.add(peer)
                        self._measure(peer, way, label, request, tokens, column)
                    except Skipped as reason:
                        column["skipped"] = list(dict.fromkeys([*column["skipped"], str(reason)]))
                        failed.add(peer)
                    self.save()
            print(
                f"  {self.result['shape']} {label}: round {turn + 1} of {arguments.rounds}", file=sys.stderr, flush=True
            )

    def _missing(self, peer, label: str, turn: int) -> list[tuple]:
        """The ways that a peer has to be asked in once more, up to a round: all of them in the first one."""
        rates = self.rows[peer].get(label, {}).get("ways", {})
        if turn == 0:
            return [way for way in peer.ways if not rates.get(" ".join(way))]
        best = max(peer.ways, key=lambda way: statistics.median(rates.get(" ".join(way)) or [0.0]))
        return [best] if len(rates.get(" ".join(best), [])) <= turn else []

    def _in_time(self, needed: float) -> None:
        if self.arguments.seconds and time.perf_counter() - self.started + needed > self.arguments.seconds:
            raise Enough

    def _measure(self, peer, way: tuple, label: str, request: dict, tokens: int, column: dict) -> None:
        """One measurement, into the row."""
        row, flags, started = self.rows[peer], " ".join(way), time.perf_counter()
        answer, used, elsewhere = undisturbed(peer, way, request, self.cpus)
        if answer is None:
            words = f"{peer.name}, {peer.weights} {flags}: refused, other programs used {used:.2f} of its cores"
            column["skipped"].append(words)
            return
        column["others"].append(used)
        column["elsewhere"].append(elsewhere)
        cell = row.setdefault(label, {"ways": {}, "took": 0.0})
        cell["took"] = max(cell["took"], time.perf_counter() - started)
        cell["ways"].setdefault(flags, []).append(tokens / answer["seconds"])
        best = max(cell["ways"], key=lambda one: statistics.median(cell["ways"][one]))
        cell |= summary(cell["ways"][best]) | {"flags": best}
        row["version"] = peer.version or row["version"]
        if "anonymous" in answer:
            row["resident_bytes"] = answer["anonymous"] + answer["file"]
        if answer["joules"] is not None:
            joules = row.setdefault(f"{label} joules", {"values": []})
            joules["values"].append(answer["joules"] / tokens)
            joules |= summary(joules["values"])
        if "decode" in request:
            context = request["decode"][0] + self.arguments.tokens / 2
            shape = SHAPES[self.result["shape"]]
            cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * 2 * context  # K and V, 2 bytes per number
            row[f"{label} bytes"] = int(peer.file_bytes + cache)


def summarize(result: dict) -> None:
    """The stream and the load over all columns, into the result."""
    for part in ("stream", "others", "elsewhere"):
        figures = [one for column in result["columns"].values() for one in column[part]]
        result[part] = summary(figures or [float("nan")])


def measure(name: str, arguments, folder: Path, bandwidth: Bandwidth, result: dict | None = None, save=None) -> dict:
    """All peers at one shape.

    Args:
        result: what was measured before, which is gone on with. save: called with the result after each measurement.
    """
    result = {"shape": name, "threads": arguments.threads} if result is None else result
    peers, skipped = make_peers(
        name, folder, arguments.threads, arguments.llama_bench, arguments.ours_only, arguments.leave_out, arguments.isa
    )
    result["skipped"] = skipped
    if arguments.wait:
        print("  loaded: waiting for a line", file=sys.stderr, flush=True)
        sys.stdin.readline()
    cpus = pin(arguments.threads, *(pid for peer in peers for pid in peer.pids))
    columns = Columns(result, peers, arguments, cpus, lambda: save(result) if save else None)
    try:
        for label, request, tokens in requests_of(arguments):
            columns.column(label, request, tokens, bandwidth)
    except Enough:
        print(f"  {name}: --seconds are over; the same command goes on", file=sys.stderr, flush=True)
    for peer in peers:
        peer.close()
    summarize(result)
    return result


def ranged(rate: dict, digits: int) -> str:
    """A median with its range."""
    median, least, most = (f"{rate[part]:,.{digits}f}" for part in ("median", "min", "max"))
    return f"{median} [{least}, {most}]"


def show(result: dict, labels: list[str]) -> str:
    """The table of one shape; ratios are against llama.cpp F16 or, without it, the fastest transformers."""
    threads, stream = result["threads"], result["stream"]
    first = next((one for one in labels if one.startswith("decode")), labels[0])
    baseline = next(
        (row for row in result["rows"] if row["weights"].startswith("F16") and first in row),
        max(
            (row for row in result["rows"] if row["name"] == "transformers" and first in row),
            key=lambda row: row[first]["median"],
            default=None,
        ),
    )
    cells = [["runner", "weights", "file MB", "resident MB", *labels, "GB/s", "of stream", "x F16"]]
    for row in (one for one in result["rows"] if set(labels) & set(one)):
        resident = f"{row['resident_bytes'] / 1e6:,.0f}" if row["resident_bytes"] else "-"
        speeds = []
        for label in labels:
            rate = row.get(label)
            speeds.append(ranged(rate, 1) if rate else "-")
        if f"{first} bytes" in row:
            used = row[f"{first} bytes"] * row[first]["median"] / 1e9
            ratio = f"{row[first]['median'] / baseline[first]['median']:.2f}" if baseline else "-"
            ends = [f"{used:.1f}", f"{100 * used / stream['median']:.0f} %", ratio]
        else:
            ends = ["-", "-", "-"]
        cells.append([row["name"], row["weights"], f"{row['file_bytes'] / 1e6:,.0f}", resident, *speeds, *ends])
    lines = [
        f"Qwen3-{result['shape']} shape, {threads} thread{'s' * (threads > 1)}, tokens/s: median [min, max]; decode at a "
        f"context, prefill of a prompt, a batch's sequences together. Read bandwidth: {stream['median']:.1f} GB/s "
        f"[{stream['min']:.1f}, {stream['max']:.1f}]. GB/s, share and ratio are those of {first}. Other programs used "
        f"{ranged(result['others'], 2)} of these cores, and {ranged(result['elsewhere'], 2)} of the others.",
        table(cells, "<<" + ">" * (len(cells[0]) - 2)),
    ]
    for row in result["rows"]:
        flags = [f"{label} {row[label]['flags']}" for label in labels if row.get(label, {}).get("flags")]
        lines += [f"flags of {row['name']}, {row['weights']}: {'; '.join(flags)}"] if flags else []
    reasons = [f"{label}: {why}" for label in labels for why in result["columns"].get(label, {}).get("skipped", [])]
    lines += [f"not measured: {reason}" for reason in [*result["skipped"], *reasons]]
    return "\n".join(lines)


def profile(arguments, folder: Path) -> None:
    """Where a step of ours spends its time, for each packing at the first shape."""
    name = arguments.shapes[0]
    peers, skipped = make_peers(
        name, folder, arguments.threads, [], ours_only=True, leave_out=arguments.leave_out, isa=[]
    )
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
        "--isa", nargs="*", default=[], choices=list(MASKS), help="ours and transformers once more with a set forced"
    )
    parser.add_argument("--llama_bench", action="append", default=[], metavar="PATH", help="repeatable")
    parser.add_argument("--ours_only", action="store_true")
    parser.add_argument(
        "--leave_out", nargs="+", default=[], metavar="PEER", help="a runner, a type, both, or a packing"
    )
    parser.add_argument("--only", nargs="+", metavar="COLUMN", help='some of the columns, like "decode 16"')
    parser.add_argument("--seconds", type=float, default=0.0, help="starts no measurement that would end later")
    parser.add_argument("--wait", action="store_true", help="measure when a line comes on standard input")
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
        at = machine()
        bandwidth = Bandwidth(arguments.threads)
        report = (
            json.loads(Path(arguments.json).read_text()) if arguments.json and Path(arguments.json).is_file() else {}
        )
        command = " ".join(Path(word).name if "/" in word else word for word in sys.argv)
        report = {"results": []} | report | {"machine": at, "command": command}
        earlier = {one["shape"]: one for one in report["results"] if "columns" in one}
        report["results"] = list(earlier.values())

        def save(result: dict) -> None:
            summarize(result)
            earlier[result["shape"]] = result
            report["results"] = list(earlier.values())
            if arguments.json:
                write_json(arguments.json, report)

        for name in arguments.shapes:
            result = measure(name, arguments, folder, bandwidth, earlier.get(name), save)
            save(result)
            print(show(result, list(result["columns"])), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
