"""`bitdistill info`: what a packed file is, how large its parts are, whether it was proved, and how to use it."""

import json
from pathlib import Path
from typing import Any

from bitdistill.commands.options import Parser


def info(run_or_file: str, json: bool = False) -> None:
    """Prints what a packed file says of itself.

    Args:
        run_or_file: a run directory, or a packed file.
        json: print it as JSON.

    Raises:
        UserError: there is no such file, or it is damaged or foreign.
    """
    from bitdistill.runtime.loading import find_packed
    from bitdistill.runtime.packed_file import read_packed

    path = find_packed(run_or_file)
    facts = _facts(read_packed(path))
    _print_json(facts) if json else _print_table(facts)


def _print_json(facts: dict[str, Any]) -> None:
    print(json.dumps(facts, indent=1, default=str))


def _facts(packed) -> dict[str, Any]:
    from bitdistill.runtime.header import read_header
    from bitdistill.runtime.packed_file import TOKENIZER

    config, header = packed.config, read_header(packed.metadata)
    sizes = {name: tensor.nbytes for name, tensor in packed.tensors.items()}
    linear = sum(sizes[f"{name}.{part}"] for name in config.linears for part in ("weight_packed", "weight_scale"))
    table = sum(size for name, size in sizes.items() if name.startswith(config.tables()))
    tokenizer = sizes.get(TOKENIZER, 0)
    weights = sum(one.out_features * one.in_features for one in config.linears.values())
    others = sum(t.size for n, t in packed.tensors.items() if n.endswith((".gain", ".bias", ".subln")))
    parameters = weights + config.vocab_size * config.hidden_size * len(config.tables()) + others
    parts = {"ternary linears": linear, "embedding and LM head": table, "tokenizer": tokenizer}
    parts["norms, biases, header"] = packed.file_bytes - sum(parts.values())
    return {
        "file": str(packed.path),
        "setting": header.setting,
        "base": header.base,
        "architecture": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "parameters": parameters,
        "file_bytes": packed.file_bytes,
        "parts_bytes": parts,
        "packing": config.packing,
        "embedding": config.embedding,
        "bits_per_weight": 8 * linear / weights,
        "model_bits_per_parameter": 8 * packed.file_bytes / parameters,
        "task": None if header.task is None else header.task.to_json(),
        "max_length": header.max_length,
        "generation": header.generation,
        "chat": bool(header.tokenizer.get("chat_template")),
        "scores": header.scores,
        "proof": _proof(packed.path),
    }


SHOWN = ("tokens", "mean_kl", "same_top1")  # of a proof


def _proof(path: Path) -> dict[str, Any] | None:
    """The run's proof of parity beside a file, if it is of these weights."""
    from bitdistill.runtime.packed_file import sealed_as

    found = path.with_name("proof.json")
    if not found.is_file():
        return None
    try:
        proof = json.loads(found.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    same = isinstance(proof, dict) and proof.get("data_sha256") == sealed_as(path)
    return proof if same and all(type(proof.get(name)) in (int, float) for name in SHOWN) else None


def _print_table(facts: dict[str, Any]) -> None:
    name = facts["file"]
    rows = [
        ("file", f"{name}, {facts['file_bytes']:,} bytes"),
        ("student", f"{facts['setting'] or 'a ternary student'} of {facts['base'] or 'an unnamed base'}"),
        (
            "model",
            f"{facts['architecture']}, {facts['parameters']:,} parameters, {facts['layers']} layers of "
            f"{facts['hidden_size']}, vocabulary {facts['vocabulary']:,}, context {facts['context']:,}",
        ),
        (
            "bits",
            f"{facts['bits_per_weight']:.2f} per ternary weight ({facts['packing']}), "
            f"{facts['model_bits_per_parameter']:.2f} per parameter of the whole file (embedding {facts['embedding']})",
        ),
    ]
    rows += [
        ("" if i else "sizes", f"{size:>13,} bytes  {part}")
        for i, (part, size) in enumerate(facts["parts_bytes"].items())
    ]
    rows += _task_rows(facts)
    proof = facts["proof"]
    rows.append(("proof", "no proof.json of these weights beside the file" if proof is None else
                 f"equal to the trained student on {proof['tokens']} tokens: codes bit for bit, mean KL {proof['mean_kl']:.1e}, "
                 f"same likeliest token {proof['same_top1']:.1%}"))  # fmt: skip
    for field, text in rows:
        print(f"{field:<8} {text}")
    print("\nuse")
    for command in _uses(facts):
        print(f"  {command}")


def _task_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    task, scores = facts["task"], facts["scores"]
    if task is None:
        return [("task", "not known to this file")]
    chat = ", in the chat template" if task["chat"] and facts["chat"] else ""
    rows = [("task", f"{task['name']} ({task['kind']}): {task['prompt']!r}{chat}")]
    if task["kind"] == "classification":
        rows.append(("labels", ", ".join(f"{word} ({value})" for value, word in task["labels"])))
    if facts["max_length"]:
        rows.append(("length", f"{facts['max_length']} tokens of prompt and answer; longer texts are cut"))
    for setting, score in scores.items():
        if isinstance(score, dict) and "score" in score:
            low, high = score["interval"]
            text = f"{scores.get('metric')} {score['score']:.2f} [{low:.2f}, {high:.2f}] on {score['examples']:,} rows, {setting}"
            rows.append(("score", text))
    return rows


def _uses(facts: dict[str, Any]) -> list[str]:
    name, uses = facts["file"], []
    if facts["task"] is not None:
        texts = " ".join(f'"{column} ..."' for column in dict.fromkeys(_columns(facts["task"])))
        uses += [
            f"bitdistill predict {name} {texts}",
            f"bitdistill predict {name} --input rows.csv --output answers.csv",
        ]
    uses += [f"bitdistill chat {name}"] if facts["chat"] else []
    return [*uses, f'bitdistill generate {name} "..."', f"bitdistill serve {name}"]


def _columns(task: dict[str, Any]) -> list[str]:
    from bitdistill.prompts import Task

    return Task.from_json(task).columns


def info_options(arguments: list[str]) -> dict[str, Any]:
    """The options of `info`. Args: arguments: of the command line, after the command."""
    parser = Parser(prog="bitdistill info", description="What a packed file is, and how to use it.")
    parser.add_argument("run_or_file", help="a run directory, or a packed file")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    return vars(parser.parse_args(arguments))
