"""The model card beside an export, an Ollama Modelfile beside a GGUF file, and the upload of both to the Hugging Face hub.

A card says what a user needs to know: what the model was made from and on, under which license, how good it is (with
intervals), how large, what was proved of this file, and how to run it in each tool that
opens it. What is not known is said, never guessed.
"""

import json
import os
from pathlib import Path
from typing import Any

from bitdistill.errors import UserError
from bitdistill.files import write_whole
from bitdistill.names import DISTILLED, TASK_CORPUS
from bitdistill.text_files import user_path

UNKNOWN_LICENSE = "not stated by the base model's folder: look it up before you share this model"
RUN = {
    "packed": """`pip install bitdistill`, then `bitdistill generate {file} "..."`: on a CPU, without torch.""",
    "gguf": """llama.cpp: `llama-cli -m {file} -p "..."`, or `llama-server -m {file}`.

Ollama (types Q4_0 and Q2_K only): `ollama create my-student -f {file}.Modelfile`, then `ollama run my-student`.

LM Studio and llamafile open the file itself.""",
    "transformers": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{file}", device_map="cpu")
tokenizer = AutoTokenizer.from_pretrained("{file}")
```""",
    "compressed-tensors": """transformers, with `pip install compressed-tensors`:
`AutoModelForCausalLM.from_pretrained("{file}")`.

vLLM: `vllm serve {file}` (not tried by this project's tests).""",
    "mlx": """`pip install mlx-lm`, then `mlx_lm.generate --model {file} --prompt "..."`.""",
}


def write_card(
    path: Path,
    *,
    format: str,
    file: str,
    written: dict[str, Any],
    base: str | None,
    task: str | None,
    corpus: str | None,
    surgery: dict[str, Any],
    scores: dict[str, Any],
    proof: str,
) -> None:
    """Writes README.md: metadata that the hub reads, and the text.

    Args:
        path: of README.md. format: a format of `bitdistill export`. file: how the text names the export.
        written: sizes as the writer gave them: file_bytes, bits_per_weight, types of a GGUF file.
        base: the base model, a folder or hub id; None for the embedded demo's own.
        task, corpus: what it was trained on. surgery: the settings of stage 1. scores: evaluate/scores.json, or empty.
        proof: a paragraph of `proof_of_packed` or `proof_of_tool`.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    license = base_license(base)
    # os.path, because Path.exists fails for a text that is too long for a name.
    hub_id = base if base is not None and not os.path.exists(base) else None
    row = next((row for row in scores.get("rows", ()) if row["setting"] == DISTILLED), None)
    results = None
    if row is not None:
        metric, what = scores["metric"], scores["task"]
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=what,
                dataset_name=what,
                metric_type=metric,
                metric_value=row["score"],
            )
        ]
    data = ModelCardData(
        license=license,
        base_model=hub_id,
        library_name={"gguf": "gguf", "mlx": "mlx"}.get(format, "transformers"),
        tags=["bitdistill", "ternary", "1.58-bit"],
        pipeline_tag="text-generation",
        model_name=file,
        eval_results=results,
    )
    parts = [
        _about(base, license, surgery),
        _trained_on(task, corpus),
        _measured(scores),
        _sizes(format, written),
        f"## Proof\n\n{proof}",
        "## How to run it\n\n" + RUN[format].format(file=file),
    ]
    content = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join([f"# {file}", *parts]) + "\n"
    write_whole(path, str(ModelCard(content)))


def base_license(base: str | None) -> str | None:
    """The license that a base model's local README.md or LICENSE names; None when nothing there says it.

    Args:
        base: a folder; a hub id has no local card, and nothing is fetched.
    """
    import yaml
    from huggingface_hub import ModelCard

    folder = user_path(base, "model") if base else None
    if folder is None or not os.path.isfile(folder / "README.md"):
        return None
    try:
        license = ModelCard.load(folder / "README.md").data.get("license")
    except (ValueError, RecursionError, yaml.YAMLError):  # no metadata that can be read
        return None
    return license if isinstance(license, str) else None


def _shared_name(source: str) -> str:
    """A source as a card for others names it: of a file or folder of this machine the name alone."""
    return Path(source).resolve().name if os.path.exists(source) else source


def _about(base: str | None, license: str | None, surgery: dict[str, Any]) -> str:
    name = "the embedded demo's own model" if base is None else _shared_name(base)
    settings = ", ".join(f"{key} {value}" for key, value in surgery.items())
    return f"""A ternary (1.58-bit) student, made by BitNet Distillation
([arXiv 2510.13998](https://arxiv.org/abs/2510.13998)) with BitDistill: its linear layers hold only -1, 0 and 1 times a scale.

* Base model: {name}
* License of the base model: {license or UNKNOWN_LICENSE}
* Method: surgery, continued pre-training of the ternary model, distillation fine-tuning ({settings})"""


def _trained_on(task: str | None, corpus: str | None) -> str:
    rows_too = corpus == TASK_CORPUS
    task, corpus = (_shared_name(source) if source else "none" for source in (task, corpus))
    corpus = f"the training rows of {task}" if rows_too else corpus
    lines = [f"* Task: {task}", f"* Text of the continued pre-training: {corpus}"]
    return "## Data\n\n" + "\n".join(lines)


def _measured(scores: dict[str, Any]) -> str:
    if not scores:
        return "## Metrics\n\nIt was not evaluated."
    table = [f"| setting | {scores['metric']} | 95 % interval | rows |", "|---|---|---|---|"]
    for row in scores["rows"]:
        low, high = row["interval"]
        table.append(f"| {row['setting']} | {row['score']:.2f} | {low:.2f} to {high:.2f} | {row['examples']:,} |")
    text = f"On the validation rows of {scores['task']}; this model is {DISTILLED}, the first is its full-precision teacher."
    return f"## Metrics\n\n{text} It is made for this task and is no general assistant.\n\n" + "\n".join(table)


def _sizes(format: str, written: dict[str, Any]) -> str:
    lines = [f"* Format: {format}", f"* {written['file_bytes']:,} bytes"]
    lines.append(f"* {written['bits_per_weight']:.2f} bits per ternary weight, scales included")
    if "types" in written:
        types = ", ".join(f"{count} matrices {kind}" for kind, count in written["types"].items())
        lines.append(f"* {types}; embedding {written['embedding_type']}")
    return "## Size\n\n" + "\n".join(lines)


def proof_of_packed(proof: dict[str, Any]) -> str:
    """What `parity.prove_parity` found, in words.

    Args:
        proof: its result.
    """
    same, noise = 100 * proof["same_top1"], proof["noise_mean_kl"]
    return f"""Codes and scales of all {proof["linears"]} ternary matrices are bit for bit what training multiplied by, and every
product on the student's own activations is equal. On {proof["tokens"]} tokens the runtime and the trained student differ by a
mean KL divergence of {proof["mean_kl"]:.2g} nats (the student differs from itself by {noise:.2g} when its attention is computed
in another order); the same likeliest token: {same:.1f} %."""


def proof_of_tool(format: str, proof: dict[str, Any] | None, unproven: str = "") -> str:
    """What `agreement.prove_agreement` found, in words.

    Args:
        format: a format of `bitdistill export`. proof: the figures, or None.
        unproven: then why there are none.
    """
    exact = "Every ternary matrix was read back from the file and holds the trained codes and scales, bit for bit"
    exact += " (scales in fp16)." if format == "gguf" else "."
    if proof is None:
        return f"{exact} Whether the tool computes the same with it is unproven: {unproven}."
    return f"""{exact} {proof["tool"]} opened it and was compared with the trained student on {proof["tokens"]} tokens:

* mean KL divergence of the next token: {proof["mean_kl"]:.3g} nats (at most {proof["max_mean_kl"]} is accepted)
* same likeliest token: {100 * proof["same_top1"]:.1f} % (at least {100 * proof["min_same_top1"]:.0f} % is accepted)
* perplexity, tool over student: {proof["perplexity_ratio"]:.4f}
* greedy continuations: {100 * proof["same_greedy"]:.1f} % of {proof["greedy_tokens"]} tokens before the first difference

Tools round activations in other groups than training did, or not at all, so small differences are expected."""


def write_modelfile(path: Path, file: str, tokenizer) -> None:
    """An Ollama Modelfile beside a GGUF file; the chat template, if any, travels inside the GGUF file.

    Args:
        path: of Modelfile. file: name of the GGUF file in the same folder. tokenizer: for the token that ends an answer.
    """
    lines = [f"FROM ./{file}", "PARAMETER temperature 0"]
    if tokenizer.eos_token:
        lines.append(f"PARAMETER stop {json.dumps(tokenizer.eos_token, ensure_ascii=False)}")
    if not tokenizer.chat_template:
        lines.append('TEMPLATE "{{ .Prompt }}"')
    write_whole(path, "\n".join(lines) + "\n")


def upload(repo: str, files: dict[str, Path], private: bool = True) -> str:
    """Uploads an export with its card, in one commit.

    The token is huggingface_hub's own (`hf auth login`, or HF_TOKEN): it is neither read nor shown here.

    Args:
        repo: USER/NAME. files: name in the repository -> file. private: whether a repository that is made is private.

    Returns: the address of the commit.

    Raises:
        UserError: a name that is none, no token, no right, or no network.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # What the library's HTTP client raises without a network has that client's base class, and no name of its own.
    clients = tuple(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.create_commit(repo, operations, commit_message="Add a student made by BitDistill")
    except HFValidationError as error:
        do = "Give it as USER/NAME: letters, digits, - and _."
        raise UserError("push_to_hub", expected="the name of a repository", got=repo, do=do) from error
    except (*clients, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        got = f"status {status}" if status else type(error).__name__
        do = "Log in with `hf auth login` (a token that may write), check name and network; the files are written already."
        raise UserError(
            "push_to_hub", expected=f"an upload to {repo}", got=got, do=do
        ) from None  # which names no token
    return str(done.commit_url)
