"""The server with many clients beside the runtime's own batch: tokens per second in all, the time to the first token, and
the processor time of each part.

    python bench/serving.py FILE [--clients 16] [--requests 64] [--new_tokens 64] [--threads 2] [--rounds 3] [--json FILE]
    python bench/serving.py --shape 0.6B           the same with random weights in Qwen3-0.6B's shape
    python bench/serving.py FILE --lookup 4 --texts TEXT.jsonl [--field article] [--suffix "Summary:"]    with and without lookup
    python bench/serving.py FILE --soak 7200      memory every minute under whole answers, streams and clients that leave

Clients stream from prompts that differ from their first token on. The runtime's own batch answers the same prompts with
`generate_batch` and as many slots, in a process of its own as the server is, before each round of the server and after the
last. A round's ratio is the server's tokens per second divided by the mean of the batches before and after it. The clients
run on the same machine as the server, on a core that the model needs where there are two: their processor time is given
apart. Linux only.
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

OWN = """
import json, sys, time, bitdistill
file, slots, threads = json.loads(sys.argv[1])
runtime = bitdistill.load(file, threads=threads)
for line in sys.stdin:
    prompts, new_tokens = json.loads(line)
    started, before = time.perf_counter(), time.process_time()
    tokens = sum(len(answer.token_ids) for answer in runtime.generate_batch(prompts, new_tokens, slots=slots))
    print(json.dumps([tokens, time.perf_counter() - started, time.process_time() - before]), flush=True)
"""
PROMPT = "{0} and {1} are two numbers that somebody wrote on a wall, long before anybody could read them."


def prompts(count: int, part: int = 0, texts: list[str] | None = None) -> list[str]:
    """So many different prompts, of about 25 tokens or from `texts`; each part has others."""
    if texts is not None:
        if (part + 1) * count > len(texts):
            raise SystemExit(f"--texts: {len(texts)} rows are too few for part {part + 1} of {count} requests")
        return texts[part * count : (part + 1) * count]
    return [PROMPT.format(7919 * (i + 1) % 1000, i) for i in range(part * count, (part + 1) * count)]


@contextlib.contextmanager
def server(file: str, threads: int, slots: int, lookup: int = 0):
    """(address, process id) of `bitdistill serve`."""
    command = [sys.executable, "-m", "bitdistill.cli", "serve", file, "--port", "0", "--threads", str(threads)]
    command += ["--slots", str(slots), "--max_queue", "1000", "--model_name", "student", "--lookup", str(lookup)]
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


@contextlib.contextmanager
def own_batch(file: str, threads: int, slots: int):
    """A function of prompts and new tokens: [tokens, seconds, processor seconds] of `generate_batch` in a process of its own."""
    command = [sys.executable, "-c", OWN, json.dumps([file, slots, threads])]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(texts: list[str], new_tokens: int) -> list[float]:
        process.stdin.write(json.dumps([texts, new_tokens]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    try:
        yield answer
    finally:
        process.stdin.close()
        process.wait()


def processor_seconds(pid: int) -> dict[str, float]:
    """What a process has used so far: its main thread, which is the server's event loop, and all others."""
    used = {"event_loop": 0.0, "engine": 0.0}
    for thread in Path(f"/proc/{pid}/task").iterdir():
        seconds = int((thread / "schedstat").read_text().split()[0]) / 1e9
        used["event_loop" if thread.name == str(pid) else "engine"] += seconds
    return used


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


async def many_clients(address: str, pid: int, texts: list[str], options) -> dict[str, float | list[float]]:
    """So many clients, each with one request after the other, until all texts are answered.

    Returns: tokens, seconds and processor seconds in all, and the seconds to each request's first token.
    """
    waiting, first, tokens = list(texts), [], 0
    host, port = address.removeprefix("http://").split(":")
    loop = asyncio.get_running_loop()
    clients = [(await loop.create_connection(Client, host, int(port)))[1] for _ in range(options.clients)]

    async def work(client: Client) -> None:
        nonlocal tokens
        while waiting:
            count, seconds = await client.ask(waiting.pop(), options.new_tokens)
            tokens += count
            first.append(seconds)

    started, before, own_before = time.perf_counter(), processor_seconds(pid), time.process_time()
    await asyncio.gather(*map(work, clients))
    seconds, used = time.perf_counter() - started, processor_seconds(pid)
    used = {name: used[name] - before[name] for name in used} | {"clients": time.process_time() - own_before}
    return {"tokens": tokens, "seconds": seconds, "first_token": first, **used}


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
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument(
        "--rounds", type=int, default=3, help="the server this often, between the runtime's own batches"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lookup", type=int, help="a server with this option beside one without it")
    parser.add_argument("--texts", help="its prompts: JSON lines")
    parser.add_argument("--field", default="article", help="of a row")
    parser.add_argument("--suffix", default="", help="what is asked behind a text, in a line of its own")
    parser.add_argument("--characters", type=int, default=1600, help="of a text, at most")
    parser.add_argument("--soak", type=float, help="so many seconds")
    parser.add_argument("--rest", type=float, default=0.0, help="seconds between the soak's requests")
    parser.add_argument("--json")
    options = parser.parse_args()
    if bool(options.file) == bool(options.shape):
        parser.error("give a packed file or --shape")
    if options.texts and not options.lookup:
        parser.error("--texts are prompts of the comparison with --lookup: give that, too")
    with tempfile.TemporaryDirectory() as folder:
        if options.shape:
            shape = SHAPES[options.shape]
            options.file = f"{folder}/{options.shape}.safetensors"
            write_packed_model(Path(options.file), shape, "2bit", "int8", byte_tokenizer(shape.vocabulary))
        measure_server(options)


def measure_server(options) -> None:
    """One soak, or one comparison, of a packed file."""
    result = {"machine": machine(), "options": {name: value for name, value in vars(options).items() if name != "file"}}
    if options.soak:
        with server(options.file, options.threads, options.clients) as (address, pid):
            result["soak"] = soak(address, pid, options.soak, options.rest)
    elif options.lookup:
        result |= compare_lookup(options)
    else:
        result |= compare(options)
    if options.json:
        write_json(options.json, result)


def compare_lookup(options) -> dict[str, list]:
    """A server without and one with lookup, in turn, on the same prompts; prints a table."""
    texts = None
    if options.texts:
        rows = [json.loads(line) for line in Path(options.texts).read_text(encoding="utf-8").splitlines()]
        texts = [f"{row[options.field][: options.characters]}\n{options.suffix}" for row in rows]
    results: dict[str, list] = {"plain": [], "lookup": []}
    common = options.file, options.threads, options.clients
    with server(*common) as plain, server(*common, options.lookup) as looking:
        for at in (plain, looking):
            asyncio.run(many_clients(*at, prompts(options.clients, 1000), options))  # warm
        for part in range(options.rounds):
            for name, at in (("plain", plain), ("lookup", looking)):
                asked = prompts(options.requests, part, texts)
                results[name].append(asyncio.run(many_clients(*at, asked, options)))
    speeds = {name: [one["tokens"] / one["seconds"] for one in found] for name, found in results.items()}
    ratios = [ours / plain for plain, ours in zip(speeds["plain"], speeds["lookup"], strict=True)]
    cells = [[f"server, {options.clients} clients", "tokens/s", "median"]]
    cells += [[name, _row(found), f"{statistics.median(found):.1f}"] for name, found in speeds.items()]
    cells.append(["ratio", ", ".join(f"{ratio:.2f}" for ratio in ratios), f"{statistics.median(ratios):.2f}"])
    print(table(cells, "<>>"))
    return results | {"ratios": ratios}


def compare(options) -> dict[str, list]:
    """The runtime's own batch and the server in turn; prints a table."""
    own, served = [], []
    with (
        own_batch(options.file, options.threads, options.clients) as batch,
        server(options.file, options.threads, options.clients) as (address, pid),
    ):
        batch(prompts(options.clients, 1000), 4)  # warm
        asyncio.run(many_clients(address, pid, prompts(options.clients, 1000), options))
        for part in range(options.rounds + 1):
            own.append(batch(prompts(options.requests, part), options.new_tokens))
            if part < options.rounds:
                texts = prompts(options.requests, part)
                served.append(asyncio.run(many_clients(address, pid, texts, options)))
    speed = [tokens / seconds for tokens, seconds, _ in own]
    server_speed = [one["tokens"] / one["seconds"] for one in served]
    ratios = [one / statistics.mean(speed[i : i + 2]) for i, one in enumerate(server_speed)]
    first = statistics.quantiles([seconds for one in served for seconds in one["first_token"]], n=20)

    def per_token(values: list[float], tokens: list[int]) -> str:
        return f"{1e3 * sum(values) / sum(tokens):.3f}"

    parts = [per_token([one[name] for one in served], [one["tokens"] for one in served]) for name in
             ("engine", "event_loop", "clients")]  # fmt: skip
    own_part = per_token([used for _, _, used in own], [tokens for tokens, _, _ in own])
    print(table([
        ["", "tokens/s", "median", "first token p50", "p95"],
        ["the runtime's own batch", _row(speed), f"{statistics.median(speed):.1f}", "", ""],
        [f"server, {options.clients} clients", _row(server_speed), f"{statistics.median(server_speed):.1f}",
         f"{first[9]:.2f} s", f"{first[18]:.2f} s"],
        ["server / own batch", ", ".join(f"{ratio:.1%}" for ratio in ratios), f"{statistics.median(ratios):.1%}", "", ""],
    ], "<>>>>"))  # fmt: skip
    print(f"\nprocessor time, ms a token: the runtime's own batch {own_part}; server: engine {parts[0]}, "
          f"event loop {parts[1]}; clients {parts[2]}")  # fmt: skip
    return {
        "own_batch": own,
        "server": served,
        "ratios": ratios,
        "first_token_p50": first[9],
        "first_token_p95": first[18],
    }


def _row(values: list[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


if __name__ == "__main__":
    main()
