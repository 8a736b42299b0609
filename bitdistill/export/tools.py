"""The answers of other tools to prompts: each tool loads a file that was written for it, and answers.

This file imports nothing of the project and, at its top, nothing but numpy, because a tool may live in an environment of its
own. Then this file is run there as a script:

    PYTHON -P tools.py FORMAT PATH QUESTIONS.json ANSWERS.npz
"""

import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

# format -> (the package that opens it, its name on PyPI)
TOOLS = {
    "gguf": ("llama_cpp", "llama-cpp-python"),
    "transformers": ("transformers", "transformers"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "mlx": ("mlx_lm", "mlx-lm"),
}
# As everywhere here: no pickle, no code of the folder's, no network (bitdistill/names.py, which a tool's environment lacks).
FROM_DISK = {"use_safetensors": True, "trust_remote_code": False, "local_files_only": True}
Answers = tuple[list[np.ndarray], list[list[int]]]  # float32 (T, V) logits of each prompt; its greedy continuation


def tool_version(format: str) -> str | None:
    """Name and version of the tool that opens a format, or None when it is not installed in this environment.

    Args:
        format: a name of TOOLS.
    """
    module, package = TOOLS[format]
    if importlib.util.find_spec(module) is None:
        return None
    return f"{package} {importlib.metadata.version(package)}"


def tool_answers(
    format: str, path: str | Path, prompts: list[list[int]], new_tokens: int = 0, threads: int = 1
) -> Answers:
    """The logits of each prompt, and the continuation, by the tool that opens the format.

    Args:
        format: a name of TOOLS. path: the GGUF file, or the folder.
        prompts: token ids of each prompt, at least one of each.
        new_tokens: tokens of each continuation: the likeliest one each time, end tokens included.
        threads: CPU threads of llama.cpp.

    Returns: (float32 (T, V) logits of each prompt, token ids of each continuation).
    """
    answer = {"gguf": _llama_cpp, "mlx": _mlx}.get(format, _transformers)
    return answer(path, prompts, new_tokens, threads)


def greedy(ids: list[int], logits: np.ndarray, new_tokens: int, step: Callable[[int], np.ndarray]) -> list[int]:
    """The likeliest continuation.

    Args:
        ids: the prompt. logits: (V,) after it. new_tokens: how many. step: takes a token in and gives the logits after it.
    """
    found: list[int] = []
    for _ in range(new_tokens):
        found.append(int(np.argmax(logits)))
        if len(found) < new_tokens:
            logits = step(found[-1])
    return found


def _llama_cpp(path, prompts: list[list[int]], new_tokens: int, threads: int) -> Answers:
    import llama_cpp.llama_cpp as library
    from llama_cpp import Llama

    # The types' own kernels, which every machine has, and not those for weights that are repacked for this machine: some
    # virtual machines announce AMX and then refuse its instructions.
    defaults = library.llama_model_default_params

    def plain():
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    library.llama_model_default_params = plain
    context = max(len(prompt) for prompt in prompts) + new_tokens + 8
    model = Llama(str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, logits_all=True, verbose=False)

    def step(token: int) -> np.ndarray:
        model.eval([token])
        return np.array(model.scores[model.n_tokens - 1], np.float32)

    logits, continuations = [], []
    for prompt in prompts:
        model.reset()
        model.eval(prompt)
        logits.append(np.array(model.scores[: len(prompt)], np.float32))
        continuations.append(greedy(prompt, logits[-1][-1], new_tokens, step))
    model.close()
    return logits, continuations


def _mlx(path, prompts: list[list[int]], new_tokens: int, threads: int) -> Answers:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(path))
    logits, continuations = [], []
    for prompt in prompts:
        cache = make_prompt_cache(model)

        def run(ids: list[int], cache=cache) -> np.ndarray:
            return np.array(model(mx.array([ids]), cache=cache).astype(mx.float32))[0]

        logits.append(run(prompt))
        continuations.append(greedy(prompt, logits[-1][-1], new_tokens, lambda token, run=run: run([token])[-1]))
    return logits, continuations


def _transformers(path, prompts: list[list[int]], new_tokens: int, threads: int) -> Answers:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **FROM_DISK)
    return torch_answers(model.eval(), prompts, new_tokens)


def torch_answers(model, prompts: list[list[int]], new_tokens: int = 0) -> Answers:
    """`tool_answers` of a causal language model of transformers that is loaded already, in eval mode.

    Args:
        model: the model. prompts, new_tokens: as in `tool_answers`.
    """
    import torch

    logits, continuations = [], []
    with torch.no_grad():
        for prompt in prompts:
            state: dict = {"past_key_values": None}

            def run(ids: list[int], state=state) -> np.ndarray:
                output = model(torch.tensor([ids], device=model.device), use_cache=new_tokens > 0, **state)
                state["past_key_values"] = output.past_key_values
                return output.logits[0].float().cpu().numpy()

            logits.append(run(prompt))
            continuations.append(greedy(prompt, logits[-1][-1], new_tokens, lambda token, run=run: run([token])[-1]))
    return logits, continuations


def main() -> None:
    """Answers the questions of a file: {"prompts", "new_tokens", "threads"}."""
    format, path, questions, target = sys.argv[1:]
    asked = json.loads(Path(questions).read_text(encoding="utf-8"))
    version = tool_version(format)
    if version is None:
        sys.exit(f"{TOOLS[format][1]} is not installed in {sys.executable}")
    logits, continuations = tool_answers(format, path, **asked)
    np.savez(target, *logits, continuations=np.array(continuations, np.int64), version=version)


if __name__ == "__main__":
    main()
