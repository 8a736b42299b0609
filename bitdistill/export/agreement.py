"""The proof of a file for another tool: the tool itself loads the file, and its answers are compared with the student's.

A packed file can be proved exactly (parity.py). Other tools round activations in other groups than training did, or not at
all, so their answers cannot be equal; they must be as close as the bar below says. When a tool is not installed, the file
is called "unproven".
"""

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bitdistill.errors import UserError

# On a trained student rounding in other groups, or not at all, moves the distribution of the next token by a mean KL of
# about 0.02. A wrong file (a permutation, a norm, a scale) is off by whole nats.
MAX_MEAN_KL = 0.05
MIN_SAME_TOP1 = 0.85
# format -> (the package that opens it, its name on PyPI)
TOOLS = {
    "gguf": ("llama_cpp", "llama-cpp-python"),
    "transformers": ("transformers", "transformers"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "mlx": ("mlx_lm", "mlx-lm"),
}


def tool_version(format: str) -> str | None:
    """Name and version of the tool that opens a format, or None when it is not installed here."""
    module, package = TOOLS[format]
    if importlib.util.find_spec(module) is None:
        return None
    return f"{package} {importlib.metadata.version(package)}"


def compare_logits(ours: list[np.ndarray], theirs: list[np.ndarray], prompts: list[list[int]]) -> dict[str, Any]:
    """How far two models' predictions of the next token lie apart.

    Args:
        ours: float32 (T, V) logits of each prompt.
        theirs: the same of the other model.
        prompts: the token ids that the logits belong to.

    Returns: tokens; mean_kl = mean over positions of KL(ours || theirs) in nats; same_top1, the share of positions whose
        likeliest token is the same; perplexity_ratio = exp of the difference of the mean losses, theirs less ours.
    """
    kls, same, losses = [], [], []
    for a, b, prompt in zip(ours, theirs, prompts, strict=True):
        log_p, log_q = (torch.from_numpy(x).double().log_softmax(-1) for x in (a, b))
        kls.append((log_p.exp() * (log_p - log_q)).sum(-1))
        same.append(log_p.argmax(-1) == log_q.argmax(-1))
        target = torch.tensor(prompt[1:], dtype=torch.long)[:, None]
        losses.append(log_p[:-1].gather(1, target) - log_q[:-1].gather(1, target))
    return {
        "tokens": sum(len(prompt) for prompt in prompts),
        "mean_kl": float(torch.cat(kls).mean()),
        "same_top1": float(torch.cat(same).double().mean()),
        "perplexity_ratio": float(torch.cat(losses).mean().exp()) if max(map(len, prompts)) > 1 else 1.0,
    }


@torch.no_grad()
def student_logits(model: nn.Module, prompts: list[list[int]]) -> list[np.ndarray]:
    """float32 (T, V) logits of each prompt, by a torch model in eval mode."""
    return [model(torch.tensor([prompt], device=model.device)).logits[0].float().cpu().numpy() for prompt in prompts]


def tool_logits(format: str, path: str | Path, prompts: list[list[int]], threads: int = 1) -> list[np.ndarray]:
    """float32 (T, V) logits of each prompt, by the tool that opens the format.

    Args:
        format: a name of TOOLS.
        path: the GGUF file, or the folder.
        prompts: token ids of each prompt.
        threads: CPU threads of llama.cpp.
    """
    if format == "gguf":
        return _llama_cpp(path, prompts, threads)
    if format == "mlx":
        return _mlx(path, prompts)
    from transformers import AutoModelForCausalLM

    return student_logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), prompts)


def _llama_cpp(path: str | Path, prompts: list[list[int]], threads: int) -> list[np.ndarray]:
    from llama_cpp import Llama

    context = max(len(prompt) for prompt in prompts) + 8
    model = Llama(str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, logits_all=True, verbose=False)
    found = []
    for prompt in prompts:
        model.reset()
        model.eval(prompt)
        found.append(np.array(model.scores[: len(prompt)], np.float32))
    model.close()
    return found


def _mlx(path: str | Path, prompts: list[list[int]]) -> list[np.ndarray]:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(path))
    return [np.array(model(mx.array([prompt])).astype(mx.float32))[0] for prompt in prompts]


def prove_agreement(
    format: str, path: str | Path, model: nn.Module, prompts: list[list[int]], threads: int = 1
) -> dict[str, Any]:
    """Compares a tool's answers with the student's.

    Args:
        format: a name of TOOLS, whose tool is installed (`tool_version`).
        path: the file or folder that was written from the student.
        model: the student, in eval mode.
        prompts: token ids of real prompts.
        threads: CPU threads of llama.cpp.

    Returns: `compare_logits` of the student against the tool, with the tool's version and the bar.

    Raises:
        UserError: below the bar. The caller removes the file.
    """
    proof = compare_logits(student_logits(model, prompts), tool_logits(format, path, prompts, threads), prompts)
    proof |= {"tool": tool_version(format), "max_mean_kl": MAX_MEAN_KL, "min_same_top1": MIN_SAME_TOP1}
    if not (proof["mean_kl"] <= MAX_MEAN_KL and proof["same_top1"] >= MIN_SAME_TOP1):
        raise UserError(
            "format",
            expected=f"a mean KL of at most {MAX_MEAN_KL} and the same likeliest token at {100 * MIN_SAME_TOP1:.0f} % of tokens",
            got=f"{proof['mean_kl']:.3g} and {100 * proof['same_top1']:.1f} % on {proof['tokens']} tokens in {proof['tool']}",
            do="Use the packed format, which is proved exactly; this file was removed.",
        )
    return proof
