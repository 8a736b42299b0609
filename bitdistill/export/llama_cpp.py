"""The proof of a GGUF file: llama.cpp itself loads it, and its answers are compared with the student's on real prompts.

Uses llama-cpp-python (extra `gguf`), which compiles llama.cpp when it is installed. Without it a file is named unproven.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitdistill.errors import UserError

# llama.cpp rounds activations in other groups than training did; on a trained student that moves the distribution of the
# next token by a mean KL of about 0.02. A wrong file (a permutation, a norm, a scale) is off by whole nats.
MAX_MEAN_KL = 0.05
MIN_SAME_TOP1 = 0.85


def installed() -> bool:
    """Whether llama-cpp-python can be imported."""
    return importlib.util.find_spec("llama_cpp") is not None


def llama_cpp_logits(path: str | Path, prompts: list[list[int]], threads: int = 1) -> list[np.ndarray]:
    """float32 (T, V) logits of each prompt, by llama.cpp.

    Args:
        path: a GGUF file.
        prompts: token ids of each prompt.
        threads: CPU threads.
    """
    from llama_cpp import Llama

    model = Llama(
        str(path),
        n_ctx=max(len(prompt) for prompt in prompts) + 8,
        n_batch=512,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        verbose=False,
    )
    found = []
    for prompt in prompts:
        model.reset()
        model.eval(prompt)
        found.append(np.array(model.scores[: len(prompt)], np.float32))
    model.close()
    return found


def compare_logits(ours: list[np.ndarray], theirs: list[np.ndarray], prompts: list[list[int]]) -> dict[str, Any]:
    """How far two models' predictions of the next token lie apart.

    Args:
        ours, theirs: float32 (T, V) logits of each prompt.
        prompts: the token ids that the logits belong to, for the perplexities.

    Returns: tokens; mean_kl = mean over positions of KL(ours || theirs) in nats; same_top1, the share of positions whose
        likeliest token is the same; perplexity_ratio = exp of the difference of the mean losses, theirs to ours.
    """
    kls, same, losses = [], [], []
    for a, b, prompt in zip(ours, theirs, prompts, strict=True):
        log_p, log_q = (torch.from_numpy(x).double().log_softmax(-1) for x in (a, b))
        kls.append((log_p.exp() * (log_p - log_q)).sum(-1))
        same.append(log_p.argmax(-1) == log_q.argmax(-1))
        target = torch.tensor(prompt[1:])[:, None]
        losses.append(torch.cat([log_p[:-1].gather(1, target), log_q[:-1].gather(1, target)], 1))
    loss = torch.cat(losses)
    return {
        "tokens": sum(len(prompt) for prompt in prompts),
        "mean_kl": float(torch.cat(kls).mean()),
        "same_top1": float(torch.cat(same).double().mean()),
        "perplexity_ratio": float((-(loss[:, 1] - loss[:, 0]).mean()).exp()) if len(loss) else 1.0,
    }


@torch.no_grad()
def prove_gguf(path: str | Path, model, prompts: list[list[int]], threads: int = 1) -> dict[str, Any]:
    """Compares llama.cpp's answers with the student's, and removes the file when they lie apart.

    Args:
        path: a file of `write_gguf`.
        model: the student that it was written from, in eval mode.
        prompts: token ids of real prompts, two or more tokens each.
        threads: CPU threads of llama.cpp.

    Returns: `compare_logits` of the student against llama.cpp, with tool and version, and the bar.

    Raises:
        UserError: llama-cpp-python is not installed, or the file is below the bar (it is removed, the figures are shown).
    """
    if not installed():
        raise UserError(
            "llama-cpp-python",
            expected="the package, to prove the file",
            got="no such package",
            do="pip install 'bitdistill[gguf]' (compiles for some minutes), or --prove false for an unproven file.",
        )
    import llama_cpp

    ours = [model(torch.tensor([prompt], device=model.device)).logits[0].float().cpu().numpy() for prompt in prompts]
    proof = compare_logits(ours, llama_cpp_logits(path, prompts, threads), prompts)
    proof |= {
        "tool": f"llama-cpp-python {llama_cpp.__version__}",
        "max_mean_kl": MAX_MEAN_KL,
        "min_same_top1": MIN_SAME_TOP1,
    }
    if proof["mean_kl"] > MAX_MEAN_KL or proof["same_top1"] < MIN_SAME_TOP1:
        Path(path).unlink()
        raise UserError(
            "format",
            expected=f"a mean KL of at most {MAX_MEAN_KL} and the same likeliest token at {100 * MIN_SAME_TOP1:.0f} % of tokens",
            got=f"{proof['mean_kl']:.3g} and {100 * proof['same_top1']:.1f} % on {proof['tokens']} tokens; the file was removed",
            do="Use the packed format, or train with activations that llama.cpp can round alike.",
        )
    return proof
