"""The proof of a file for another tool: the tool itself loads the file, and its answers are compared with the student's.

A packed file can be proved exactly (parity.py). Other tools round activations in other groups than training did, or not at
all, so their answers cannot be equal; they must be as close as the bar below says. When a tool is not installed, the file
is called "unproven". The tool may be installed in another environment: then it is asked there (tools.py).
"""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from bitdistill.errors import UserError
from bitdistill.export import tools
from bitdistill.export.tools import Answers, tool_answers, tool_version, torch_answers

# On a trained student rounding in other groups, or not at all, moves the distribution of the next token by a mean KL of
# about 0.02. A wrong file (a permutation, a norm, a scale) is off by whole nats.
MAX_MEAN_KL = 0.05
MIN_SAME_TOP1 = 0.85
NEW_TOKENS = 16  # of each prompt's greedy continuation, which is compared, too


def compare_answers(ours: Answers, theirs: Answers, prompts: list[list[int]]) -> dict[str, Any]:
    """How far two models' predictions of the next token lie apart.

    Args:
        ours: float32 (T, V) logits of each prompt, and each greedy continuation.
        theirs: the same of the other model.
        prompts: the token ids that the logits belong to.

    Returns: tokens; mean_kl = mean over positions of KL(ours || theirs) in nats; same_top1, the share of positions whose
        likeliest token is the same; perplexity_ratio = exp of the difference of the mean losses, theirs less ours;
        greedy_tokens, and same_greedy, the share of them that is equal up to the first difference of each continuation.
    """
    kls, same, losses = [], [], []
    for a, b, prompt in zip(ours[0], theirs[0], prompts, strict=True):
        log_p, log_q = (_log_softmax(x.astype(np.float64)) for x in (a, b))
        kls.append((np.exp(log_p) * (log_p - log_q)).sum(-1))
        same.append(log_p.argmax(-1) == log_q.argmax(-1))
        positions = np.arange(len(prompt) - 1)
        losses.append(log_p[positions, prompt[1:]] - log_q[positions, prompt[1:]])
    agreed = [_agreed(a, b) for a, b in zip(ours[1], theirs[1], strict=True)]
    greedy_tokens = sum(len(one) for one in ours[1])
    return {
        "tokens": sum(len(prompt) for prompt in prompts),
        "mean_kl": float(np.concatenate(kls).mean()),
        "same_top1": float(np.concatenate(same).mean()),
        "perplexity_ratio": float(np.exp(np.concatenate(losses).mean())) if max(map(len, prompts)) > 1 else 1.0,
        "greedy_tokens": greedy_tokens,
        "same_greedy": sum(agreed) / greedy_tokens if greedy_tokens else 1.0,
    }


def _agreed(a: list[int], b: list[int]) -> int:
    """Tokens at the beginning of both that are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def tool_elsewhere(
    python: str, format: str, path: str | Path, prompts: list[list[int]], new_tokens: int, threads: int
) -> tuple[Answers, str]:
    """`tools.tool_answers` in another environment.

    Args:
        python: its interpreter. format, path, prompts, new_tokens, threads: as there.

    Returns: (the answers, name and version of the tool).

    Raises:
        UserError: the interpreter does not start, the tool is not installed there, or it cannot load the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        questions, target = Path(folder) / "questions.json", Path(folder) / "answers.npz"
        asked = {"prompts": prompts, "new_tokens": new_tokens, "threads": threads}
        questions.write_text(json.dumps(asked), encoding="utf-8")
        command = [python, "-P", tools.__file__, format, str(path), str(questions), str(target)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            do = "Give the python of an environment in which the tool is installed."
            raise UserError("tool_python", expected="an interpreter", got=f"{python} ({error})", do=do) from error
        if done.returncode != 0:
            said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            expected = f"answers of {tools.TOOLS[format][1]} to the file that was written for it"
            do = "Check the environment; if the tool cannot open the file, choose another type or format."
            raise UserError("tool_python", expected=expected, got=said[:300], do=do)
        with np.load(target) as found:
            logits = [found[f"arr_{i}"] for i in range(len(prompts))]
            return (logits, found["continuations"].tolist()), str(found["version"])


def meets_bar(found: dict[str, Any]) -> bool:
    """Whether a tool's answers are near enough to the student's. Args: found: from `compare_answers`."""
    return found["mean_kl"] <= MAX_MEAN_KL and found["same_top1"] >= MIN_SAME_TOP1


def prove_agreement(
    format: str,
    path: str | Path,
    model: nn.Module,
    prompts: list[list[int]],
    threads: int = 1,
    python: str | None = None,
) -> dict[str, Any]:
    """Compares a tool's answers with the student's.

    Args:
        format: a name of TOOLS, whose tool is installed (`tool_version`), or installed for `python`.
        path: the file or folder that was written from the student.
        model: the student, in eval mode.
        prompts: token ids of real prompts.
        threads: CPU threads of llama.cpp.
        python: the interpreter of the environment that has the tool; this one by default.

    Returns: `compare_answers` of the student against the tool, with the tool's version and the bar.

    Raises:
        UserError: below the bar, or no answers. The caller removes the file.
    """
    if python is None:
        theirs, version = tool_answers(format, path, prompts, NEW_TOKENS, threads), tool_version(format)
    else:
        theirs, version = tool_elsewhere(python, format, path, prompts, NEW_TOKENS, threads)
    proof = compare_answers(torch_answers(model, prompts, NEW_TOKENS), theirs, prompts)
    proof |= {"tool": version, "max_mean_kl": MAX_MEAN_KL, "min_same_top1": MIN_SAME_TOP1}
    if not meets_bar(proof):
        raise UserError(
            "format",
            expected=f"a mean KL of at most {MAX_MEAN_KL} and the same likeliest token at {100 * MIN_SAME_TOP1:.0f} % of tokens",
            got=f"{proof['mean_kl']:.3g} and {100 * proof['same_top1']:.1f} % on {proof['tokens']} tokens in {proof['tool']}",
            do="Use the packed format, which is proved exactly; this file was removed.",
        )
    return proof
