"""The comparison of a run's settings: each is scored on the same validation rows. Also, for the report, what teacher and
student attend to.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitdistill.data.tasks import encode_prompts
from bitdistill.evaluation.score import score_splits, scores_json
from bitdistill.evaluation.weight_only import quantize_model
from bitdistill.names import DISTILLED, FULL_PRECISION, WEIGHT_ONLY
from bitdistill.prompts import Task
from bitdistill.student.loading import load_language_model, load_tokenizer
from bitdistill.student.refine import load_student
from bitdistill.student.sharing import WeightCodes

AttentionMaps = Callable[[torch.nn.Module, Sequence[int], int], np.ndarray]


def compare_settings(
    folder: Path,
    models: dict[str, Path],
    task: Task,
    splits: dict[str, Any],
    *,
    max_length: int,
    batch_size: int,
    device: str,
    products: torch.dtype | None = None,
    calibration: Callable[[Any], list[list[int]]] | None,
    attention_maps: AttentionMaps,
    attention_layers: dict[str, int],
) -> dict[str, Any]:
    """Scores every setting and writes scores.json, predictions of each split, and attention.npz.

    Args:
        folder: for the files. models: setting -> the folder of its trained model.
        task: what is scored. splits: {split: rows}, the main one first, from data.tasks.load_validation.
        max_length: tokens of prompt and answer. batch_size: rows at a time. device: "cpu" or "cuda".
        products: the dtype of the full-precision models' matrix products, if not their own.
        calibration: tokenizer -> prompts on which GPTQ rounds FP16-SFT to 4 bits; None leaves the 4-bit models out.
        attention_maps: (model, token ids, layer) -> what each head attends to, float32 (H, T, T).
        attention_layers: setting -> its layer that is drawn, for FP16-SFT and BitDistill.

    Returns: facts for done.json: what the 4-bit models weigh, and the seconds that all took.
    """
    started = time.perf_counter()
    options = {"max_length": max_length, "batch_size": batch_size}
    scores, attention, facts = {}, {}, {}
    for setting, source in models.items():
        model = load_language_model(source) if setting == FULL_PRECISION else load_student(source)
        model.to(device)
        tokenizer = load_tokenizer(source)
        autocast = torch.autocast(device, products, enabled=products is not None and setting == FULL_PRECISION)
        with WeightCodes(model).hold(), autocast:
            scores[setting] = score_splits(model, task, splits, tokenizer, name=setting, **options)
        if setting == FULL_PRECISION and calibration is not None:
            prompts = calibration(tokenizer)
            for name, method in WEIGHT_ONLY.items():
                rounded = load_language_model(source).to(device)
                facts[name] = quantize_model(rounded, method, prompts if method == "gptq" else ())
                with autocast:
                    scores[name] = score_splits(rounded, task, splits, tokenizer, name=name, **options)
        if setting in attention_layers:
            row = splits["validation"].select([0])
            prompt = encode_prompts(task, row, tokenizer, max_length)[0][0]
            attention[setting] = attention_maps(model, prompt, attention_layers[setting])
    notes = [] if device == "cpu" else ["scored on the GPU in fp32"]
    notes += [] if products is None else ["full-precision models are scored with bf16 products"]
    (folder / "scores.json").write_text(
        json.dumps(scores_json(task, splits, scores, notes), indent=1), encoding="utf-8"
    )
    _write_predictions(folder, splits, scores)
    np.savez_compressed(
        folder / "attention.npz",
        teacher=attention[FULL_PRECISION],
        student=attention[DISTILLED],
        tokens=np.array([tokenizer.decode([token]) for token in prompt]),
        layer=attention_layers[DISTILLED],
    )
    return facts | {"seconds": round(time.perf_counter() - started, 2)}


def _write_predictions(folder: Path, splits: dict[str, Any], scores: dict[str, dict[str, Any]]) -> None:
    """One line for each row of each split: the row, and what every setting said to it."""
    for split, rows in splits.items():
        name = "predictions.jsonl" if split == "validation" else f"predictions-{split}.jsonl"
        with (folder / name).open("w", encoding="utf-8") as file:
            for i, row in enumerate(rows):
                predictions = {setting: score[split].predictions[i] for setting, score in scores.items()}
                file.write(json.dumps({"row": i, **row, "predictions": predictions}) + "\n")
