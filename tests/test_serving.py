"""The server: OpenAI's own client, many clients at once, clients that leave, requests that are refused, its end."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import httpx
import pytest
from serving_students import PAIRS, talking_student

import bitdistill
from bitdistill.runtime.conversation import conversation_ids
from bitdistill.runtime.sampling import Sampling

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytestmark = pytest.mark.slow


@contextlib.contextmanager
def serving(file, *options, key=None):
    """(address, process) of a server in a process of its own."""
    command = [sys.executable, "-m", "bitdistill.cli", "serve", str(file), "--port", "0", "--threads", "1", *options]
    environment = dict(os.environ) | ({"BITDISTILL_API_KEY": key} if key else {})
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"http://[\d.]+:\d+", line):
                break
        else:
            raise AssertionError("".join(lines))
        threading.Thread(target=lambda: [lines.append(line) for line in process.stderr], daemon=True).start()
        for _ in range(100):
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{found[0]}/health", timeout=5)
                break
            time.sleep(0.05)
        process.log = lines
        yield found[0], process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(30)
        assert "socket.send() raised" not in "".join(lines), "a client that leaves must cost no line of the log"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return talking_student(tmp_path_factory.mktemp("serving") / "student.safetensors")


@pytest.fixture(scope="module")
def runtime(file):
    return bitdistill.load(file, threads=1)


@pytest.fixture(scope="module")
def server(file):
    with serving(file, "--slots", "4", "--max_queue", "40", "--max_rows", "30", "--max_body_bytes", "20000") as found:
        yield found[0]


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


NAME = "student-reviews"


def test_text_completions(client, runtime):
    """Each is what the runtime gives, alone and in pieces."""
    for sampling in ({}, {"temperature": 1.2, "top_p": 0.9, "seed": 5}):
        want = "".join(runtime.generate("a film", 12, Sampling(**sampling)))
        got = client.completions.create(model=NAME, prompt="a film", max_tokens=12, **sampling)
        assert got.choices[0].text == want
        assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (6, 12)
        assert got.choices[0].finish_reason == "length"
        options = {"stream": True, "stream_options": {"include_usage": True}}
        pieces = list(client.completions.create(model=NAME, prompt="a film", max_tokens=12, **sampling, **options))
        assert "".join(choice.text for piece in pieces for choice in piece.choices) == want
        assert pieces[-1].usage.total_tokens == 18


def test_several_prompts_and_answers(client, runtime):
    ids = runtime.encode("bc")
    got = client.completions.create(model=NAME, prompt=[[*ids], ids], n=2, max_tokens=5, temperature=1.0, seed=7)
    wants = ["".join(runtime.generate(ids, 5, Sampling(temperature=1.0, seed=7 + number))) for number in range(4)]
    assert [choice.text for choice in got.choices] == wants
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    assert got.usage.prompt_tokens == 4


def test_chat(client, runtime):
    messages = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "<|end|> hello"}]
    ids = conversation_ids(runtime, messages)
    want = "".join(runtime.generate(ids, 10))
    got = client.chat.completions.create(model=NAME, messages=messages, max_completion_tokens=10)
    assert got.choices[0].message.content == want
    assert got.choices[0].message.role == "assistant"
    assert got.usage.prompt_tokens == len(ids)
    parts = [
        {"role": "developer", "content": "Be kind"},
        {"role": "user", "content": [{"type": "text", "text": "<|end|> hello"}]},
    ]
    stream = client.chat.completions.create(model=NAME, messages=parts, max_tokens=10, stream=True)
    pieces = [piece.choices[0] for piece in stream]
    assert "".join(piece.delta.content or "" for piece in pieces) == want
    assert pieces[0].delta.role == "assistant"
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["length"]


def test_stop(client, runtime):
    want = "".join(runtime.generate("a film", 30))
    stop = want[7:9]
    for stream in (False, True):
        got = client.completions.create(model=NAME, prompt="a film", max_tokens=30, stop=[stop, "zzz"], stream=stream)
        choices = [choice for piece in got for choice in piece.choices] if stream else got.choices
        assert "".join(choice.text for choice in choices) == want[: want.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_logprobs(client, runtime):
    got = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "x"}], max_tokens=3, logprobs=True, top_logprobs=4
    )
    entries = got.choices[0].logprobs.content
    assert len(entries) == 3
    # this student's likeliest tokens may be control tokens, which are listed and are no part of the text
    said = [entry.token for entry in entries if not entry.token.startswith("<|")]
    assert "".join(said) == got.choices[0].message.content
    ids = conversation_ids(runtime, [{"role": "user", "content": "x"}])
    [likelihoods] = runtime.classify([ids], [[token] for token in range(97)])
    assert entries[0].logprob == pytest.approx(likelihoods.max(), abs=1e-9)
    assert [top.logprob for top in entries[0].top_logprobs] == pytest.approx(sorted(likelihoods)[:-5:-1], abs=1e-9)
    text = client.completions.create(model=NAME, prompt="x", max_tokens=3, logprobs=2)
    found = text.choices[0].logprobs
    stream = client.completions.create(model=NAME, prompt="x", max_tokens=3, logprobs=2, stream=True)
    parts = [part.choices[0].logprobs for part in stream if part.choices[0].logprobs]
    assert [offset for part in parts for offset in part.text_offset] == found.text_offset
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == 3
    assert all(len(top) == 2 for top in found.top_logprobs)


def test_drafts_change_no_answer_and_no_logprob(client, file):
    """The same answers with --lookup, streamed or not, alone and beside others, with each token's own log-probabilities."""
    asked = {"model": NAME, "prompt": ["a film a film a film", "b b b b b b b"], "max_tokens": 40, "logprobs": 2}
    with (
        serving(file, "--lookup", "5") as (address, _),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as looking,
    ):
        for settings in ({}, {"temperature": 0.8, "seed": 3, "n": 2}):
            want, got = (one.completions.create(**asked, **settings) for one in (client, looking))
            assert got.choices == want.choices
        stream = looking.completions.create(**asked, stream=True)
        parts = [choice for piece in stream for choice in piece.choices]
        want = client.completions.create(**asked)
        for choice in want.choices:
            mine = [part for part in parts if part.index == choice.index]
            assert "".join(part.text for part in mine) == choice.text
            said = [number for part in mine if part.logprobs for number in part.logprobs.token_logprobs]
            assert said == choice.logprobs.token_logprobs


def test_models_and_facts(client, server):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    facts = httpx.get(f"{server}/info").json()
    assert facts["task"] == {
        "name": "reviews",
        "kind": "classification",
        "columns": ["text"],
        "labels": ["bad", "good", "fine"],
    }
    assert facts["chat"] is True
    page = httpx.get(f"{server}/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.findall(r"(?:src|href)=|https?://", page.text)  # nothing from elsewhere
    assert httpx.get(f"{server}/docs").status_code == 404


def test_predict_is_the_runtime_s(server, runtime):
    rows = ["a film", {"text": "bad", "id": 3}, "x" * 60]
    got = httpx.post(f"{server}/predict", json={"rows": rows}).json()
    assert got["predictions"] == json.loads(json.dumps([one.to_json() for one in runtime.predict(rows)]))


def test_labels_of_several_tokens(tmp_path):
    path = talking_student(tmp_path / "s", task=PAIRS)
    rows = [{"a": "abc"[: 1 + i % 3] * i, "b": "b" * (i % 5)} for i in range(20)]
    want = [one.to_json() for one in bitdistill.load(path, 1).predict(rows)]
    with serving(path, "--slots", "3") as (server, _):
        got = httpx.post(f"{server}/predict", json={"rows": rows}, timeout=60).json()
        assert got["predictions"] == json.loads(json.dumps(want))


CHAT_BODY = {"model": NAME, "messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/chat/completions", b"{", 400, ""),
        ("/v1/chat/completions", b"\xff\xfe", 400, ""),
        ("/v1/chat/completions", b"[" * 5000, 400, ""),
        ("/v1/chat/completions", {**CHAT_BODY, "messages": []}, 400, "messages"),
        ("/v1/chat/completions", {**CHAT_BODY, "messages": [{"role": "tool", "content": "x"}]}, 400, "role"),
        ("/v1/chat/completions", {**CHAT_BODY, "model": "gpt-4"}, 404, NAME),
        ("/v1/chat/completions", {**CHAT_BODY, "tools": [{"type": "function"}]}, 400, "tools: not supported here"),
        ("/v1/chat/completions", {**CHAT_BODY, "presence_penalty": 1}, 400, "presence_penalty"),
        ("/v1/chat/completions", {**CHAT_BODY, "frobnicate": 1}, 400, "frobnicate"),
        ("/v1/chat/completions", {**CHAT_BODY, "temperature": -1}, 400, "temperature"),
        ("/v1/chat/completions", {**CHAT_BODY, "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/chat/completions", {**CHAT_BODY, "max_tokens": 10**9}, 400, "2,048"),
        ("/v1/chat/completions", {**CHAT_BODY, "n": 17}, 400, "n"),
        ("/v1/completions", {"model": NAME, "prompt": "x" * 600}, 400, "context"),
        ("/v1/completions", {"model": NAME, "prompt": []}, 400, "prompt"),
        ("/v1/completions", {"model": NAME, "prompt": [5, 10**6]}, 400, "token ids below"),
        ("/v1/completions", {"model": NAME, "prompt": [[]]}, 400, "at least one token"),
        ("/v1/completions", {"model": NAME, "prompt": "\ud800"}, 400, ""),
        ("/predict", {"rows": []}, 400, "rows"),
        ("/predict", {"rows": ["x"] * 31}, 400, "30 rows"),
        ("/predict", {"rows": ["x", {"sentence": "x"}]}, 400, "row 2"),
        ("/predict", {"rows": ["x", {"text": None}]}, 400, "row 2"),
        ("/predict", {"rows": 3}, 400, "rows"),
        ("/predict", {"rows": ["x", 3]}, 400, "texts, or values by column; got a int in row 2"),
        ("/predict", b"no json", 400, "The body is no JSON: Expecting value at character 0"),
        ("/predict", [], 400, "body: expected an object in JSON"),
        (
            "/v1/completions",
            {"prompt": 3},
            400,
            "prompt: Input should be a valid string, or Input should be a valid list",
        ),
        ("/v1/completions", {}, 400, "prompt: Field required"),
        ("/v1/chat/completions", {**CHAT_BODY, "functions": []}, 400, "functions: not supported here"),
        ("/predict", b"x" * 30000, 413, "20,000"),
        ("/nowhere", {}, 404, ""),
    ],
)
def test_refusals(server, path, body, status, says):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    got = httpx.post(server + path, content=content, headers={"content-type": "application/json"})
    assert got.status_code == status, got.text
    assert says in got.json()["error"]["message"]
    assert httpx.get(f"{server}/health").json()["status"] == "ok"


def test_a_request_as_curl_sends_it(server):
    """`curl -d` names a form as the type; the model need not be named."""
    body = json.dumps({"prompt": "x", "max_tokens": 2})
    form = {"content-type": "application/x-www-form-urlencoded"}
    got = httpx.post(f"{server}/v1/completions", content=body, headers=form)
    assert got.status_code == 400
    assert "content-type: application/json; got" in got.json()["error"]["message"]
    got = httpx.post(f"{server}/v1/completions", content=body, headers={"content-type": "application/json"}).json()
    assert got["model"] == NAME
    assert got["usage"]["completion_tokens"] == 2


def test_a_body_that_does_not_say_its_length(server):
    def endless():
        while True:
            yield b"x" * 4096

    with contextlib.suppress(httpx.TransportError):  # the server hangs up as soon as it has seen enough
        assert httpx.post(f"{server}/predict", content=endless()).status_code == 413
    assert httpx.get(f"{server}/health").status_code == 200


def test_other_names_of_this_machine_are_refused(server):
    assert httpx.get(f"{server}/info", headers={"host": "evil.example"}).status_code == 400


def test_thirty_two_clients_at_once(server, runtime):
    """More than slots; each gets what it would get alone."""
    wants = ["".join(runtime.generate(f"film {i}", 8 + i % 5, Sampling(temperature=0.8, seed=i))) for i in range(32)]

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:

            async def one(i):
                options = {"max_tokens": 8 + i % 5, "temperature": 0.8, "seed": i, "stream": i % 2 == 0}
                got = await client.completions.create(model=NAME, prompt=f"film {i}", **options)
                if i % 2:
                    return got.choices[0].text
                return "".join([piece.choices[0].text async for piece in got])

            return await asyncio.gather(*map(one, range(32)))

    assert asyncio.run(all_of_them()) == wants


def test_a_full_queue_is_said(server):
    async def all_of_them():
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=server, timeout=60, limits=limits) as client:
            body = {"model": NAME, "prompt": "x", "max_tokens": 250}
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(80)))

    answers = asyncio.run(all_of_them())
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 40
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)


def metric(server, name):
    text = httpx.get(f"{server}/metrics").text
    return sum(
        float(line.split()[-1]) for line in text.splitlines() if line.startswith(name) and line[len(name)] in " {"
    )


def test_clients_that_leave(server):
    """Their sequences end, and their slots are free at once."""
    names = ("bitdistill_cancelled_total", "bitdistill_new_tokens_total", "bitdistill_prompt_tokens_total")
    before = [metric(server, name) for name in names]
    body = {"model": NAME, "prompt": "x", "max_tokens": 500}
    with httpx.Client(base_url=server) as client:
        for _ in range(6):
            with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
                next(answer.iter_lines())
        with contextlib.suppress(httpx.ReadTimeout):
            client.post("/v1/completions", json=body | {"n": 8}, timeout=0.05)
    for _ in range(100):
        if metric(server, "bitdistill_running") == metric(server, "bitdistill_waiting") == 0:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("sequences of clients that have left go on")
    cancelled, new, prompt = (metric(server, name) - old for name, old in zip(names, before, strict=True))
    assert cancelled >= 6
    assert new >= 6  # what was computed for them counts, although nobody waits for it
    assert prompt >= 6
    assert metric(server, "bitdistill_requests_total") > 0


def test_a_client_that_leaves_before_the_first_event(runtime):
    """The response is never begun, and yet the sequences end."""
    from bitdistill.serving.app import create_app
    from bitdistill.serving.limits import Limits
    from bitdistill.serving.service import Service

    service = Service(runtime, NAME, Limits(slots=2))
    app = create_app(service, None, loopback=True)
    body = json.dumps({"model": NAME, "prompt": "x", "max_tokens": 500, "stream": True, "n": 2}).encode()
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {"type": "http", "asgi": {"spec_version": "2.4"}, "method": "POST", "path": "/v1/completions"}
    scope |= {"headers": headers, "query_string": b"", "root_path": "", "scheme": "http", "http_version": "1.1"}
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(_message):
        raise OSError("the client has left")

    async def leave():
        service.engine.start(asyncio.get_running_loop())
        try:
            with contextlib.suppress(Exception):
                await app(scope, receive, send)
            for _ in range(200):
                if not service.engine.running and not service.engine.waiting:
                    break
                await asyncio.sleep(0.02)
            assert not service.engine.running
            assert not service.engine.waiting
            assert service.metrics.registry.get_sample_value("bitdistill_cancelled_total") == 1
        finally:
            await asyncio.to_thread(service.engine.stop)

    asyncio.run(leave())


@pytest.mark.parametrize(("streamed", "seconds", "counts"), [(True, 0, [1] * 11), (True, 3600, [1]), (False, 0, [])])
def test_what_is_passed_on_together(runtime, monkeypatch, streamed, seconds, counts):
    """A stream: its first token at once, the others when it is time; the last, the rest, or all of it, with the end."""
    from bitdistill.serving import engine
    from bitdistill.serving.limits import Limits
    from bitdistill.serving.protocol import TextRequest
    from bitdistill.serving.service import Service

    monkeypatch.setattr(engine, "STREAM_SECONDS", seconds)

    async def events():
        service = Service(runtime, NAME, Limits(slots=2))
        service.engine.start(asyncio.get_running_loop())
        try:
            asked = {"model": NAME, "prompt": "a film", "max_tokens": 12, "stream": streamed, "logprobs": 2}
            [job] = service.text_jobs(TextRequest(**asked))
            service.begin([job])
            return [event async for event in service.events(job)]
        finally:
            await asyncio.to_thread(service.engine.stop)

    *passed, end = asyncio.run(events())
    assert [len(pieces) for pieces in passed] == counts
    pieces = [piece for some in (*passed, end.pieces) for piece in some]
    assert "".join(piece.text for piece in pieces) == "".join(runtime.generate("a film", 12))
    assert sum(piece.logprobs is not None for piece in pieces) == 12


def test_memory_is_flat(server, client):
    """A short soak: whole answers, streams, clients that leave, errors. `bench/serving.py --soak` is the long one."""

    def round_of(count):
        for i in range(count):
            client.completions.create(model=NAME, prompt=f"p{i % 7}" * (1 + i % 9), max_tokens=4)
            with client.completions.create(model=NAME, prompt=f"q{i}", max_tokens=40, stream=True) as stream:
                next(iter(stream))
            with contextlib.suppress(openai.APIStatusError):
                client.completions.create(model="no", prompt="x")

    round_of(60)
    first = metric(server, "process_resident_memory_bytes")
    round_of(120)
    assert metric(server, "process_resident_memory_bytes") - first < 8e6


def test_key_time_and_end(file):
    """An API key; a limit of time; SIGTERM lets a stream finish, refuses new ones, and ends with status 0."""
    with serving(file, "--request_seconds", "1", key="secret") as (server, process):
        body = {"model": NAME, "prompt": "x", "max_tokens": 3}
        assert httpx.get(f"{server}/health").status_code == 200
        assert httpx.get(f"{server}/info").status_code == 401
        assert httpx.post(f"{server}/v1/completions", json=body).status_code == 401
        headers = {"authorization": "Bearer secret"}
        assert httpx.post(f"{server}/v1/completions", json=body, headers=headers).status_code == 200
        long = body | {"n": 16, "max_tokens": 505}
        started = time.monotonic()
        got = httpx.post(f"{server}/v1/completions", json=long, headers=headers, timeout=60).json()
        assert time.monotonic() - started < 20
        assert {choice["finish_reason"] for choice in got["choices"]} == {"length"}
        stream = body | {"stream": True, "max_tokens": 200}
        with httpx.stream("POST", f"{server}/v1/completions", json=stream, headers=headers) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(20) == 0


@pytest.mark.parametrize("signals", [1, 2])
def test_an_end_that_does_not_wait(file, signals):
    """After --shutdown_seconds, or at a second signal, answers end where they are, without a traceback."""
    seconds = "1" if signals == 1 else "60"
    with serving(file, "--shutdown_seconds", seconds, "--slots", "1") as (server, process):
        body = {"prompt": "x", "max_tokens": 500, "stream": True, "n": 16, "logprobs": 20}
        with httpx.stream("POST", f"{server}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            started = time.monotonic()
            process.send_signal(signal.SIGINT)
            if signals == 2:
                time.sleep(0.5)
                process.send_signal(signal.SIGTERM)
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert '"length"' in events[-2]
        assert process.wait(30) == 0
        assert time.monotonic() - started < 50
        assert "Traceback" not in "".join(process.log)


def test_a_port_that_is_taken(file):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-m", "bitdistill.cli", "serve", str(file), "--port", str(taken.getsockname()[1])]
        got = subprocess.run(command, capture_output=True, text=True, check=False)
    assert got.returncode == 2
    assert got.stderr.startswith("bitdistill: port: expected an address that is free")


def test_a_client_that_resets_its_connection_costs_no_line_of_the_log(file):
    """asyncio and uvloop warn about each write to a connection that is gone. A log that nobody reads would stop the server."""
    with serving(file, "--slots", "16") as (server, _process):
        host, port = server.removeprefix("http://").split(":")
        body = json.dumps({"model": NAME, "prompt": "x", "max_tokens": 300, "stream": True, "n": 16})
        request = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        for _ in range(4):
            with socket.create_connection((host, int(port)), timeout=60) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.sendall(f"{request}content-length: {len(body)}\r\n\r\n{body}".encode())
                connection.recv(100)
        assert httpx.get(f"{server}/health", timeout=60).status_code == 200
