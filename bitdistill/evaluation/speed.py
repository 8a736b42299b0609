"""Tokens per second of greedy decoding on this machine's CPU, for one sequence: full precision by transformers, the packed
student by our own runtime. Medians with their spread; compilation and the prompt are not counted.
"""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bitdistill.evaluation.weight_only import weight_only_size
from bitdistill.names import DISTILLED, FROM_DISK, FULL_PRECISION, PROJECTIONS, WEIGHT_ONLY
from bitdistill.runtime.cpu import Runtime
from bitdistill.runtime.packed_file import read_packed

REPEATS = 5


def machine() -> str:
    """The processor as its maker calls it, and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


def full_precision_size(folder: str | Path) -> dict[str, Any]:
    """Bytes of a saved full-precision model on disk: the seven projections of each layer, and the file.

    Returns: {"setting", "runner", "linear_bytes", "model_bytes", "bits_per_weight", "model_bits_per_parameter"}.
    """
    from safetensors import safe_open

    files = sorted(Path(folder).glob("*.safetensors"))
    linear_bytes = linear_weights = parameters = 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 -- not a dict
                tensor = tensors.get_tensor(name)
                parameters += tensor.numel()
                if name.split(".")[-2] in PROJECTIONS and tensor.dim() == 2:
                    linear_weights += tensor.numel()
                    linear_bytes += tensor.numel() * tensor.element_size()
    model_bytes = sum(file.stat().st_size for file in files)
    return {
        "setting": FULL_PRECISION,
        "runner": "not measured",
        "linear_bytes": linear_bytes,
        "model_bytes": model_bytes,
        "bits_per_weight": 8 * linear_bytes / linear_weights,
        "model_bits_per_parameter": 8 * model_bytes / parameters,
    }


def _rates(decode, tokens: int) -> dict[str, Any]:
    """Runs `decode(tokens) -> seconds` once to warm up, then REPEATS times."""
    decode(min(4, tokens))
    rates = [tokens / decode(tokens) for _ in range(REPEATS)]
    return {"tokens_per_second": statistics.median(rates), "spread": [min(rates), max(rates)]}


@torch.inference_mode()
def full_precision_speed(folder: str | Path, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Decoding by transformers in fp32 and in bf16, whichever is faster on this CPU.

    Args:
        folder: a Hugging Face model. prompt: token ids. tokens: decoded per timing.

    Returns: {"runner", "tokens_per_second", "spread"}.
    """
    from transformers import AutoModelForCausalLM

    best: dict[str, Any] = {"tokens_per_second": 0.0}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", **FROM_DISK
        ).eval()

        def decode(count: int, model=model) -> float:
            output = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            started = time.perf_counter()
            for _ in range(count):
                token = output.logits[:, -1].argmax(-1, keepdim=True)
                output = model(token, past_key_values=output.past_key_values, use_cache=True)
            return time.perf_counter() - started

        rates = _rates(decode, tokens)
        if rates["tokens_per_second"] > best["tokens_per_second"]:
            best = {"runner": f"transformers, {str(dtype).removeprefix('torch.')}", **rates}
    return best


def packed_speed(runtime: Runtime, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Decoding by the packed runtime; fields as in `full_precision_speed`."""

    def decode(count: int) -> float:
        cache = runtime.new_cache(len(prompt) + count)
        logits = runtime.logits(prompt, last_only=True, cache=cache)
        started = time.perf_counter()
        for _ in range(count):
            logits = runtime.logits([int(logits[-1].argmax())], last_only=True, cache=cache)
        return time.perf_counter() - started

    return {"runner": f"bitdistill, {runtime.model.config.packing}", **_rates(decode, tokens)}


def sizes_and_speeds(
    teacher: Path,
    packed: dict[str, tuple[Path, dict[str, Any]]],
    prompt: list[int],
    tokens: int,
    *,
    weight_only: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The content of export/speed.json: bytes and decoding speed of every setting on this CPU.

    Args:
        teacher: folder of FP16-SFT. packed: setting -> (packed file, sizes), from export.pack.pack_settings.
        prompt: token ids. tokens: decoded per timing; 0 measures no speed.
        weight_only: also the bytes of FP16-SFT with its linears in 4 bits. say: is told what takes long.

    Returns: {"machine", "rows"}, a row per setting, FP16-SFT first.
    """
    full = full_precision_size(teacher)
    positions = min(read_packed(path).config.max_position_embeddings for path, _ in packed.values())
    tokens = min(tokens, positions // 2)
    if len(prompt) + tokens > positions:
        say(
            f"export: the prompt of the timing is cut to {positions - tokens} tokens, for the model has {positions} positions"
        )
        prompt = prompt[: positions - tokens]
    if tokens:
        say("export: measures decoding of FP16-SFT by transformers")
        full |= full_precision_speed(teacher, prompt, tokens)
    rows = []
    for setting, (path, sizes) in packed.items():
        row = {"setting": setting, "runner": "not measured", "model_bytes": sizes["file_bytes"]}
        row |= {name: sizes[name] for name in ("linear_bytes", "bits_per_weight", "model_bits_per_parameter")}
        if tokens:
            row |= packed_speed(Runtime(path, torch.get_num_threads()), prompt, tokens)
        rows.append(row)
    rounded = []
    if weight_only:
        size = weight_only_size(teacher, read_packed(packed[DISTILLED][0]).config)
        rounded = [{"setting": name, "runner": "not measured", **size} for name in WEIGHT_ONLY]
    return {"machine": machine(), "rows": [full, *rounded, *rows]}
