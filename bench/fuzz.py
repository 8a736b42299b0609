"""Gives damaged copies of real files to each reader of the project, which must give a right result or one clear line.

    python bench/fuzz.py                                1,000 mutations, as in the tests
    python bench/fuzz.py --mutations 100000             the long run: about a quarter of an hour on an idle core
    python bench/fuzz.py --mutations 100000 --only task.yaml rows.csv    the part of it that falls to these kinds
    python bench/fuzz.py --only "packed file" --case 17 one mutation again, with its error

Mutations are flipped bits; pieces that are cut, doubled, moved or inserted; absurd numbers, lengths and headers; deep
nesting; and values of other types in JSON. Each is drawn from a seed of its own. Outcomes:

    same      what was read equals what the valid file gives
    other     something else was read, which the format cannot tell from a valid file (a changed letter of a text)
    refused   a UserError: one line that names the field and says what to do
    FAULT     anything else: another exception, more than SECONDS of the processor, or more than MEGABYTES of further memory

A packed file has checksums, so for it `other` is a fault, too. What is read of our exports in the formats of other tools is
that their weights are codes: to take these for weights is a fault.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitdistill import surroundings

surroundings.prepare()

import numpy as np
import psutil
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

import bitdistill
from bitdistill.command_line import parse_config
from bitdistill.commands.export import about_run
from bitdistill.commands.info import info
from bitdistill.data import demo
from bitdistill.data.corpus import token_blocks
from bitdistill.data.tasks import load_rows, load_task
from bitdistill.errors import UserError
from bitdistill.export.card import write_card
from bitdistill.export.deliver import proof_texts
from bitdistill.export.gguf_file import write_gguf
from bitdistill.export.hugging_face import FORMATS, write_hugging_face
from bitdistill.export.write import write_packed
from bitdistill.runtime.cpu import Runtime
from bitdistill.runtime.packed_file import config_checksum, read_packed, sealed_as
from bitdistill.student.gguf_base import convert_gguf
from bitdistill.student.loading import load_tokenizer, tokenizer_settings
from bitdistill.student.model_folder import open_model
from bitdistill.student.refine import load_student, refine, save_student

SECONDS, MEGABYTES = 20.0, 1000
TASK = """kind: classification
prompt: "{text}\\nIt was"
truncate_column: text
label_column: label
labels: {0: bad, 1: good}
"""
CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ROWS = [
    {"text": text, "label": i % 2} for i, text in enumerate(("a dull film", "warm, “funny” — and\nlong", "007", "null"))
]


class NoFile(Exception):
    """A mutation of which nobody could make a file: nothing was read."""


@dataclass
class Target:
    """A kind of file: where a valid one lies, and what reads it. `exact`: damage must never be read as something else."""

    path: Path
    read: Callable[[], Any]
    kind: str  # json | text | binary
    exact: bool = False
    share: int = 4  # of the mutations
    valid: bytes = b""
    right: str = ""


@dataclass
class Result:
    """What became of a target's mutations."""

    outcomes: Counter = field(default_factory=Counter)
    seconds: float = 0.0
    slowest: float = 0.0
    faults: list[str] = field(default_factory=list)


def make_targets(folder: Path) -> dict[str, Target]:
    """Tiny valid files of every kind, and their readers."""
    base, student = folder / "base", folder / "student"
    texts = ["the cat sat on the mat. ", "a dull film", "one of the best films of the year", "It was bad good"] * 20
    tokenizer = demo.train_tokenizer(texts)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "tie_word_embeddings": True}
    config = transformers.Qwen3Config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **shape)
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    refine(model)
    save_student(student, model, tokenizer, model.state_dict())
    packed, sealed = folder / "student.safetensors", folder / "sealed.safetensors"
    for file in (packed, sealed):
        write_packed(file, model, tokenizer_json=(base / "tokenizer.json").read_bytes())
    grouped = folder / "grouped.safetensors"  # file version 4: scales of groups of columns, activations in blocks
    wide = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**(config.to_dict() | {"intermediate_size": 80})))
    refine(wide, norms="none", weight_scale="group", group_size=64, act_scale="block")
    write_packed(grouped, wide, tokenizer_json=(base / "tokenizer.json").read_bytes())
    gguf = folder / "base.gguf"
    stock = transformers.Qwen3ForCausalLM(config)
    refine(stock, norms="none")
    write_gguf(gguf, stock, tokenizer, linear_type="f16", embedding_type="f16")
    ternary = folder / "ternary.gguf"
    write_gguf(ternary, _plain_student(config), tokenizer, linear_type="q4_0", embedding_type="q8_0")
    (folder / "config.txt").write_bytes(_header(packed)["config"].encode())
    (folder / "task.yaml").write_text(TASK, encoding="utf-8")
    task = load_task(str(folder / "task.yaml"))
    used = folder / "used.safetensors"  # knows its task, a chat template, and how its base is sampled
    knows = {
        "tokenizer": tokenizer_settings(tokenizer) | {"chat_template": CHAT},
        "generation": {"temperature": 0.7, "top_p": 0.9},
    }
    knows |= {"setting": "BitDistill", "base": "base", "scores": {"metric": "accuracy"}}
    asked = dataclasses.replace(task, chat=True)
    bitdistill.write(used, model, tokenizer, task=asked, max_length=40, metadata=knows)
    (folder / "metadata.txt").write_bytes(_header(used)["metadata"].encode())
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "rows.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    cells = ['"' + row["text"].replace('"', '""') + f'",{row["label"]}' for row in ROWS]
    (folder / "rows.csv").write_text("text,label\n" + "\n".join(cells), encoding="utf-8")
    (folder / "run.yaml").write_text("seed: 3\nmax_length: 64\ndistill:\n  learning_rate: 0.001\n", encoding="utf-8")
    (folder / "corpus.txt").write_text("\n".join(texts), encoding="utf-8")
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")

    def rows(name):
        path = folder / name
        return Target(path, lambda: load_rows(task, file=str(path)).to_list(), "json" if "json" in name else "text")

    def corpus(name):
        path = folder / name
        return Target(path, lambda: token_blocks(str(path), tokenizer, 8, 4).tolist(), "text", share=2)

    def state(folder):
        return {name: _digest(tensor.numpy()) for name, tensor in load_student(folder).state_dict().items()}

    def converted(file):
        found = convert_gguf(file, folder / "converted")
        return str(found), _digest(np.fromfile(folder / "converted" / "model.safetensors", np.uint8))

    def predicted():
        return Runtime(_sealed(folder, used, "metadata"), threads=1).predict({"text": "a dull film"})

    text = "the cat was good"
    return {
        "packed file": Target(packed, lambda: _packed(packed), "binary", exact=True, share=16),
        "packed file, groups and blocks": Target(grouped, lambda: _packed(grouped), "binary", exact=True, share=4),
        "packed config, sealed again": Target(
            folder / "config.txt", lambda: _packed(_sealed(folder, packed, "config")), "json", share=16
        ),
        "packed task and template, sealed again": Target(folder / "metadata.txt", predicted, "json"),
        "base: model.safetensors": Target(base / "model.safetensors", lambda: _names(open_model(base)), "binary"),
        "base: config.json": Target(base / "config.json", lambda: _names(open_model(base)), "json"),
        "base: GGUF file": Target(gguf, lambda: converted(gguf), "binary"),
        "base: GGUF file, Q4_0": Target(ternary, lambda: converted(ternary), "binary", share=2),
        "tokenizer.json": Target(base / "tokenizer.json", lambda: load_tokenizer(base)(text)["input_ids"], "json"),
        "student: model.safetensors": Target(student / "model.safetensors", lambda: state(student), "binary", share=2),
        "student: config.json": Target(student / "config.json", lambda: state(student), "json", share=2),
        "rows.jsonl": rows("rows.jsonl"),
        "rows.json": rows("rows.json"),
        "rows.csv": rows("rows.csv"),
        "task.yaml": Target(
            folder / "task.yaml", lambda: repr(load_task(str(folder / "task.yaml"))), "text", share=2
        ),
        "corpus.txt": corpus("corpus.txt"),
        "corpus.jsonl": corpus("corpus.jsonl"),
        "settings.yaml": Target(
            folder / "run.yaml", lambda: parse_config(["--config", str(folder / "run.yaml")])[1], "text", share=1
        ),
    } | exported_targets(folder, config, tokenizer) | run_targets(folder, used)  # fmt: skip


def _plain_student(config):
    """A student as other tools can hold it: no SubLN, a scale for each row, rows of 32 and 64 columns."""
    student = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**(config.to_dict() | {"intermediate_size": 64})))
    refine(student, norms="none", weight_scale="row")
    return student


def exported_targets(folder: Path, config, tokenizer) -> dict[str, Target]:
    """Our own exports for other tools, given as a base model: config.json says that their weights are codes; and where it does
    not, the weights themselves must show it."""
    student, found = _plain_student(config), {}
    for format in FORMATS:
        write_hugging_face(folder / format, student, tokenizer, format)
        silent = folder / f"{format} without its section"
        shutil.copytree(folder / format, silent)
        settings = json.loads((silent / "config.json").read_text(encoding="utf-8"))
        for key in ("quantization", "quantization_config"):
            settings.pop(key, None)
        (silent / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        for place, name, kind in ((folder / format, "config.json", "json"), (silent, "model.safetensors", "binary")):
            found[f"{format}: {name}"] = Target(place / name, lambda place=place: _quantized(place), kind, share=1)
    return found


def _quantized(path: Path) -> str:
    try:
        open_model(path)
    except UserError as error:
        if "full-precision weights" in error.expected:
            return "quantized"
        raise
    raise AssertionError("codes were taken for full-precision weights")


def run_targets(folder: Path, packed: Path) -> dict[str, Target]:
    """What `bitdistill export` and `info` read of a run besides its student: settings, scores, texts, the proof."""
    run = folder / "run"
    for name in ("evaluate", "export"):
        (run / name).mkdir(parents=True)
    shutil.copy(packed, run / "export" / "student.safetensors")
    (run / "config.yaml").write_text("model: base\ntask: task.yaml\ncorpus: corpus.txt\nseed: 3\n", encoding="utf-8")
    row = {"setting": "BitDistill", "score": 50.0, "interval": [40.0, 60.0], "examples": 4, "extra": {}}
    scores = {"task": "task", "metric": "accuracy", "majority": 50.0, "rows": [row], "paired": [], "notes": []}
    (run / "evaluate" / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    lines = [json.dumps(row | {"row": i, "predictions": {}}, ensure_ascii=False) for i, row in enumerate(ROWS)]
    (run / "evaluate" / "predictions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    sealed = sealed_as(packed)
    proof = {"data_sha256": sealed, "tokens": 90, "mean_kl": 1e-9, "same_top1": 1.0, "linears": 7, "noise_mean_kl": 0.0}
    (run / "export" / "proof.json").write_text(json.dumps(proof), encoding="utf-8")

    def card():
        sizes = {"file_bytes": 1, "bits_per_weight": 1.6}
        write_card(folder / "card.md", format="mlx", file="x", written=sizes, surgery={}, proof="", **about_run(run))
        return (folder / "card.md").read_text(encoding="utf-8")

    def printed():
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            info(str(run))
        return shown.getvalue()

    return {
        "run: config.yaml": Target(run / "config.yaml", card, "text", share=1),
        "run: scores.json": Target(run / "evaluate" / "scores.json", card, "json", share=1),
        "run: predictions.jsonl": Target(
            run / "evaluate" / "predictions.jsonl", lambda: proof_texts(run), "json", share=1
        ),
        "run: proof.json": Target(run / "export" / "proof.json", printed, "json", share=1),
    }


def _header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="np") as file:
        return dict(file.metadata())


def _digest(array) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def _packed(path: Path) -> Any:
    from bitdistill.runtime.compiled import decoder_model

    model = read_packed(path)
    decoder_model(model)
    tensors = {name: _digest(tensor) for name, tensor in model.tensors.items()}
    return model.config, model.metadata, tensors


def _sealed(folder: Path, source: Path, part: str) -> Path:
    """The file with the mutated config or metadata and a checksum that fits it: only the checks of its meaning are left."""
    header = _header(source)
    try:
        header[part] = (folder / f"{part}.txt").read_bytes().decode()
    except UnicodeDecodeError as error:
        raise NoFile from error  # no text, which cannot be in a header
    header["config_sha256"] = config_checksum(header)
    tensors = {name: tensor.copy() for name, tensor in read_packed(source).tensors.items()}
    try:
        save_file(tensors, folder / "sealed.safetensors", header)
    except SafetensorError as error:
        raise NoFile from error
    return folder / "sealed.safetensors"


def _names(found) -> Any:
    return sorted(found.tensors), found.config.to_dict()


# ------------------------------------------------------------------------------------------------ mutations

NUMBERS = (b"-1", b"0", b"1e999", b"NaN", b"-Infinity", b"99999999999999999999", b"2147483648", b"1.5", b"1e-320")
OTHERS = (None, True, -1, 0, 2**31, 10**30, 1.5, "", "x", [], {}, [[]], {"a": {}}, "9" * 5000, [1] * 1000)


def mutate(data: bytes, kind: str, draw: random.Random) -> bytes:
    """One to three mutations of a file."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        ways = [_flip, _cut, _double, _move, _insert, _number, _nest, _repeat]
        if kind == "binary":
            ways += [_absurd_header, _header_bytes, _header_bytes, _flip]
        if kind == "json":
            ways += [_other_value] * 6
        data = draw.choice(ways)(data, draw)
    return data


def _span(data: bytes, draw: random.Random) -> tuple[int, int]:
    start = draw.randrange(len(data) + 1)
    return start, min(len(data), start + draw.choice((1, 2, 7, 40, 400)))


def _flip(data, draw):
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8)) if data else 0):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def _cut(data, draw):
    start, end = _span(data, draw)
    return data[:start] if draw.random() < 0.5 else data[:start] + data[end:]


def _double(data, draw):
    start, end = _span(data, draw)
    return data[:end] + data[start:end] + data[end:]


def _move(data, draw):
    start, end = _span(data, draw)
    rest = data[:start] + data[end:]
    place = draw.randrange(len(rest) + 1)
    return rest[:place] + data[start:end] + rest[place:]


def _insert(data, draw):
    place = draw.randrange(len(data) + 1)
    pieces = (
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\r\n",
        b'"',
        b"{",
        b"}",
        b"&a *a",
        b"\xed\xa0\x80",
        draw.randbytes(16),
    )
    return data[:place] + draw.choice(pieces) + data[place:]


def _number(data, draw):
    digits = [i for i, byte in enumerate(data[:4000]) if 48 <= byte <= 57]
    if not digits:
        return data
    start = end = draw.choice(digits)
    while end < len(data) and 48 <= data[end] <= 57:
        end += 1
    return data[:start] + draw.choice(NUMBERS) + data[end:]


def _nest(data, draw):
    depth, place = draw.choice((50, 2000, 100_000)), draw.randrange(len(data) + 1)
    opening, closing = draw.choice(((b"[", b"]"), (b'{"a":', b"}"), (b"- ", b"")))
    return data[:place] + opening * depth + b"1" + closing * draw.choice((0, depth)) + data[place:]


def _repeat(data, draw):
    start, end = _span(data, draw)
    piece = data[start:end] or b"a"
    return data[:end] + piece * (draw.choice((1000, 300_000)) // len(piece)) + data[end:]


def _absurd_header(data, draw):
    length = draw.choice((0, 1, 7, len(data), len(data) - 8, 2**31, 2**63 - 1, 2**64 - 1, 100_000_001))
    return length.to_bytes(8, "little") + data[8:]


def _header_bytes(data, draw):
    """Something in the JSON at the beginning of a safetensors file."""
    if len(data) < 16:
        return data
    length = min(int.from_bytes(data[:8], "little"), len(data) - 8)
    header = mutate(data[8 : 8 + length], draw.choice(("json", "text")), draw)
    sizes = (len(header), len(header), length)
    return draw.choice(sizes).to_bytes(8, "little") + header + data[8 + length :]


def _other_value(data, draw):
    """A value of a JSON text by one of another type, or a key more, less or twice."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return _flip(data, draw)
    places, stack = [], [content]
    while stack:
        node = stack.pop()
        if isinstance(node, dict | list):
            for key in list(node) if isinstance(node, dict) else range(len(node)):
                places.append((node, key))
                stack.append(node[key])
    if not places:
        return data
    # Half of the time near the top, where a tokenizer's vocabulary is not.
    node, key = draw.choice(places[:60] if draw.random() < 0.5 else places)
    if isinstance(node, dict) and draw.random() < 0.2:
        del node[key]
    elif isinstance(node, dict) and draw.random() < 0.1:
        node["stranger"] = draw.choice(OTHERS)
    else:
        node[key] = draw.choice(OTHERS)
    return json.dumps(content).encode()


# ------------------------------------------------------------------------------------------------ running


def shares(targets: dict[str, Target], mutations: int) -> dict[str, int]:
    """{name: how many of the mutations fall to each target}."""
    whole = sum(target.share for target in targets.values())
    return {name: max(1, mutations * target.share // whole) for name, target in targets.items()}


def run(
    targets: dict[str, Target],
    counts: dict[str, int],
    seed: int,
    say: Callable[[str], None] = print,
    results: dict[str, Result] | None = None,
) -> dict[str, Result]:
    """Mutates each target as often as `counts` says. Returns name -> Result, which `results` becomes on the way."""
    results = {} if results is None else results
    for name, target in targets.items():
        target.valid = target.path.read_bytes()
        target.right = repr(target.read())
        result = results[name] = Result()
        for case in range(counts[name]):
            outcome, seconds, error = try_case(name, target, seed, case)
            result.outcomes[outcome] += 1
            result.seconds += seconds
            result.slowest = max(result.slowest, seconds)
            if outcome == "FAULT":
                result.faults.append(f"{name}, case {case}: {error.strip().splitlines()[-1][:200]}")
                say(result.faults[-1])
        target.path.write_bytes(target.valid)
        say(f"{name}: {dict(result.outcomes)}, {result.seconds:.1f} s, slowest {result.slowest:.2f} s")
    return results


def try_case(name: str, target: Target, seed: int, case: int) -> tuple[str, float, str]:
    """(outcome, seconds, traceback of a fault) of one mutation."""
    draw = random.Random(f"{name} {seed} {case}")
    target.path.write_bytes(mutate(target.valid, target.kind, draw))
    before, started, outcome, error = _peak(), time.process_time(), "FAULT", ""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            outcome = "same" if repr(target.read()) == target.right else "FAULT" if target.exact else "other"
        error = "a damaged file was read" if outcome == "FAULT" else ""
    except UserError as mistake:
        outcome = "refused" if str(mistake).strip() else "FAULT"
    except NoFile:
        outcome = "other"
    except BaseException as wrong:
        if isinstance(wrong, KeyboardInterrupt):
            raise
        error = traceback.format_exc()
    seconds, grown = time.process_time() - started, _peak() - before
    if seconds > SECONDS or grown > MEGABYTES:
        outcome, error = "FAULT", f"{error}\n{seconds:.1f} s and {grown:,.0f} MB"
    return outcome, seconds, error


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def table(results: dict[str, Result]) -> str:
    """A Markdown table of the outcomes."""
    rows = ["| file | mutations | same | other | refused | faults | slowest |", "|---|---|---|---|---|---|---|"]
    for name, result in results.items():
        counts = [result.outcomes[outcome] for outcome in ("same", "other", "refused", "FAULT")]
        cells = " | ".join(f"{count:,}" for count in (sum(counts), *counts))
        rows.append(f"| {name} | {cells} | {result.slowest:.2f} s |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="kinds of files, as the table names them")
    parser.add_argument("--case", type=int, help="one mutation of it, again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    # What a damaged file asks for beyond this is a fault, and not the end of other programs.
    most = psutil.Process().memory_info().vms + 4 * MEGABYTES * 10**6
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with tempfile.TemporaryDirectory() as folder:
        targets = make_targets(Path(folder))
        counts = shares(targets, arguments.mutations)
        if arguments.only:
            targets = {name: targets[name] for name in arguments.only}
        if arguments.case is not None:
            ((name, target),) = targets.items()
            target.valid, target.right = target.path.read_bytes(), repr(target.read())
            outcome, seconds, error = try_case(name, target, arguments.seed, arguments.case)
            print(f"{error}\n{outcome}, {seconds:.2f} s")
            return int(outcome == "FAULT")
        results: dict[str, Result] = {}
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):  # the table counts what was done until then
            run(targets, counts, arguments.seed, lambda text: print(text, file=sys.stderr, flush=True), results)
    print(table(results))
    return int(any(result.faults for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
