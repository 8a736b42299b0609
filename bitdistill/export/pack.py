"""Writes the ternary settings of a run as packed files, and proves that of the student."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitdistill.distributed import process_group
from bitdistill.export.parity import prove_parity
from bitdistill.export.write import write_packed
from bitdistill.names import DISTILLED
from bitdistill.runtime.header import SAMPLING, Header
from bitdistill.runtime.packed_file import sealed_as
from bitdistill.student.embeddings import FULL_PRECISION, embedding_format
from bitdistill.student.loading import load_tokenizer, tokenizer_settings
from bitdistill.student.refine import load_student

STUDENT = "student.safetensors"


def pack_settings(
    folder: Path,
    models: dict[str, Path],
    prompts: Sequence[Sequence[int]],
    *,
    about: Header,
    packing: str,
    embedding: str | None,
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Packs every ternary model, and proves that BitDistill's file is the trained student (proof.json).

    Args:
        folder: for the files. models: setting -> the folder of its trained ternary model.
        prompts: token lists on which the packed student must reproduce the trained one.
        about: what the files say of their students: task, base, length, scores. packing: "base3" or "2bit".
        embedding: stored format of embedding and LM head; None: as they were trained, int8 if in full precision.

    Returns: setting -> (its packed file, its sizes as `write_packed` gives them).

    Raises:
        UserError: what `write_packed` and `prove_parity` refuse.
    """
    packed = {}
    for setting, source in models.items():
        path = folder / (STUDENT if setting == DISTILLED else f"{source.name}.safetensors")
        model = load_student(source)
        trained = embedding_format(model)
        sizes = write_packed(
            path,
            model,
            packing=packing,
            embedding=embedding or ("int8" if trained == FULL_PRECISION else trained),
            tokenizer_json=(source / "tokenizer.json").read_bytes(),
            metadata=student_header(about, model, load_tokenizer(source), setting=setting).to_json(),
        )
        bits = sizes["bits_per_weight"]
        process_group.say(f"export: {path.name}, {sizes['file_bytes']:,} bytes, {bits:.3f} bits per weight")
        if setting == DISTILLED:
            proof = prove_parity(path, model, prompts) | {"data_sha256": sealed_as(path)}
            (folder / "proof.json").write_text(json.dumps(proof, indent=1), encoding="utf-8")
            process_group.say(
                f"export: proved on {proof['tokens']} tokens: codes of {proof['linears']} linears equal, mean KL "
                f"{proof['mean_kl']:.1e}, same top-1 {100 * proof['same_top1']:.1f} %"
            )
        packed[setting] = path, sizes
    return packed


def student_header(about: Header, model, tokenizer, **more: Any) -> Header:
    """What a file says of a student: what is known of the run, with the tokenizer's and the base's own settings.

    Args:
        about: task, base, length and scores.
        model: the student (torch), whose generation_config is its base's. tokenizer: of transformers, or None.
        more: further facts.
    """
    if tokenizer is not None:
        more["tokenizer"] = tokenizer_settings(tokenizer)
    return dataclasses.replace(about, generation=_recommended(model.generation_config), **more)


def _recommended(config) -> dict[str, float]:
    """The sampling settings of a generation_config that is meant for sampling; none for greedy decoding."""
    if config is None or not config.do_sample:
        return {}
    found = {name: getattr(config, name, None) for name in SAMPLING}
    found = {name: value for name, value in found.items() if type(value) in (int, float)}
    if found.get("top_k") == 0:  # transformers' way to say: all of them
        del found["top_k"]
    return {"temperature": 1.0} | found
