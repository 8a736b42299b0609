"""The server with many clients beside the runtime's own batch: tokens per second in all, and the time to the first token.

    python bench/serving.py FILE [--clients 16] [--requests 48] [--new_tokens 64] [--threads 2] [--json FILE]
    python bench/serving.py --shape 0.6B           the same with random weights in Qwen3-0.6B's shape
    python bench/serving.py FILE --soak 7200      memory every minute under whole answers, streams and clients that leave

Clients stream from prompts that differ from their first token on. The runtime's own batch answers the same prompts with
`generate_batch` and as many slots, in a process of its own as the server is, before each round of the server and after it.
"""

import argparse
import asyncio
import contextlib
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

from measure import machine, resident_bytes, table, write_json
from random_models import SHAPES, byte_tokenizer, write_packed_model

PROMPT = "{0} and {1} are two numbers that somebody wrote on a wall, long before anybody could read them."


def prompts(count: int) -> list[str]:
    """So many different prompts of about 25 tokens."""
    return [PROMPT.format(7919 * (i + 1) % 1000, i) for i in range(count)]


@contextlib.contextmanager
def server(file: str, threads: int, slots: int):
    """(address, process id) of `bitdistill serve`."""
    command = [sys.executable, "-m", "bitdistill.cli", "serve", file, "--port", "0", "--threads", str(threads)]
    command += ["--slots", str(slots), "--max_queue", "1000", "--model_name", "student"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if found := re.search(r"http://[\d.]+:\d+", line):
            break
    else:
        raise SystemExit("the server did not start")
    # A pipe that nobody reads would stop the server as soon as it is full.
    threading.Thread(target=shutil.copyfileobj, args=(process.stderr, sys.stderr), daemon=True).start()
    try:
        yield found[0], process.pid
    finally:
        process.terminate()
        process.wait()


def own_batch(file: str, options) -> float:
    """Tokens per second of `generate_batch`, in a process of its own, after a warm-up."""
    script = (
        "import json, sys, time, bitdistill; file, prompts, new, slots, threads = json.loads(sys.argv[1]);"
        "r = bitdistill.load(file, threads=threads); list(r.generate_batch(prompts[:slots], 4, slots=slots)); r.forget();"
        "t = time.perf_counter(); n = sum(len(a.token_ids) for a in r.generate_batch(prompts, new, slots=slots));"
        "print(n / (time.perf_counter() - t))"
    )
    given = json.dumps([file, prompts(options.requests), options.new_tokens, options.clients, options.threads])
    output = subprocess.run([sys.executable, "-c", script, given], capture_output=True, text=True, check=True).stdout
    return float(output)


class Client(asyncio.Protocol):
    """A connection that streams one answer after the other. No HTTP library: each takes about as much of the processor for a
    token as the server does, and clients elsewhere would not take it from the model's cores."""

    def connection_made(self, transport) -> None:
        self._transport = transport

    async def ask(self, prompt: str, new_tokens: int) -> tuple[int, float]:
        """How many tokens came, and after how many seconds the first."""
        body = {"model": "student", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        content = json.dumps(body)
        lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        self._answer, self._first, self._ended = bytearray(), 0.0, asyncio.get_running_loop().create_future()
        started = time.perf_counter()
        self._transport.write("\r\n".join([*lines, f"Content-Length: {len(content)}", "", content]).encode())
        await self._ended
        if b"data: [DONE]" not in self._answer:
            raise SystemExit(f"an answer that is not complete: {bytes(self._answer[-300:])!r}")
        return int(re.search(rb'"completion_tokens":(\d+)', self._answer)[1]), self._first - started

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if not self._first and b"data: {" in data:
            self._first = time.perf_counter()
        if self._answer.endswith(b"\r\n0\r\n\r\n"):  # the last chunk
            self._ended.set_result(None)

    def connection_lost(self, exc) -> None:
        if not self._ended.done():
            self._ended.set_result(None)


async def many_clients(address: str, options) -> dict[str, float]:
    """So many clients, each with one request after the other."""
    waiting, first, tokens = prompts(options.requests), [], 0
    host, port = address.removeprefix("http://").split(":")
    loop = asyncio.get_running_loop()
    clients = [(await loop.create_connection(Client, host, int(port)))[1] for _ in range(options.clients)]

    async def work(client: Client) -> None:
        nonlocal tokens
        while waiting:
            count, seconds = await client.ask(waiting.pop(), options.new_tokens)
            tokens += count
            first.append(seconds)

    await clients[0].ask("x", 4)
    started = time.perf_counter()
    await asyncio.gather(*map(work, clients))
    seconds = time.perf_counter() - started
    quantiles = statistics.quantiles(first, n=20)
    return {"tokens_per_second": tokens / seconds, "first_token_p50": quantiles[9], "first_token_p95": quantiles[18]}


def soak(address: str, pid: int, seconds: float, rest: float) -> list[dict[str, float]]:
    """Resident memory of the server, every minute (at least ten times), under a mixture of requests with a rest after three."""
    started, lines, i = time.monotonic(), [], 0
    pause = min(60.0, seconds / 10)
    with httpx.Client(base_url=address, timeout=600) as client:
        while (now := time.monotonic() - started) < seconds:
            body = {"model": "student", "prompt": f"{i % 13} again " * (1 + i % 11), "max_tokens": 8 + i % 9}
            client.post("/v1/completions", json=body)
            with client.stream("POST", "/v1/completions", json=body | {"stream": True, "max_tokens": 60}) as answer:
                next(answer.iter_lines())
            client.post("/v1/completions", content=b"{" * (i % 300))
            i += 1
            time.sleep(rest)
            if now >= pause * len(lines):
                lines.append(
                    {"seconds": round(now), "resident_bytes": sum(resident_bytes(pid).values()), "requests": 3 * i}
                )
                print(f"{now:>7.0f} s  {lines[-1]['resident_bytes'] / 1e6:>8.1f} MB  {3 * i:,} requests", flush=True)
    return lines


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", nargs="?", help="a packed file")
    parser.add_argument("--shape", choices=list(SHAPES), help="random weights in this shape, in place of a file")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument(
        "--rounds", type=int, default=2, help="the server this often, between the runtime's own batches"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--soak", type=float, help="so many seconds")
    parser.add_argument("--rest", type=float, default=0.0, help="seconds between the soak's requests")
    parser.add_argument("--json")
    options = parser.parse_args()
    if bool(options.file) == bool(options.shape):
        parser.error("give a packed file or --shape")
    with tempfile.TemporaryDirectory() as folder:
        if options.shape:
            shape = SHAPES[options.shape]
            options.file = f"{folder}/{options.shape}.safetensors"
            write_packed_model(Path(options.file), shape, "2bit", "int8", byte_tokenizer(shape.vocabulary))
        measure_server(options)


def measure_server(options) -> None:
    """One soak, or one comparison, of a packed file."""
    result = {"machine": machine()}
    if options.soak:
        with server(options.file, options.threads, options.clients) as (address, pid):
            result["soak"] = soak(address, pid, options.soak, options.rest)
    else:
        own, served = [own_batch(options.file, options)], []
        for _ in range(options.rounds):
            with server(options.file, options.threads, options.clients) as (address, _):
                served.append(asyncio.run(many_clients(address, options)))
            own.append(own_batch(options.file, options))
        result |= {"own_batch": own, "server": served, **{k: v for k, v in vars(options).items() if k != "file"}}
        mean = {name: statistics.mean(one[name] for one in served) for name in served[0]}
        share = mean["tokens_per_second"] / statistics.mean(own)
        print(table([
            ["", "tokens/s", "first token p50", "p95"],
            ["the runtime's own batch", ", ".join(f"{one:.1f}" for one in own), "", ""],
            [f"server, {options.clients} clients: {share:.0%}", ", ".join(f"{one['tokens_per_second']:.1f}" for one in served),
             f"{mean['first_token_p50']:.2f} s", f"{mean['first_token_p95']:.2f} s"],
        ], "<>>>"))  # fmt: skip
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
