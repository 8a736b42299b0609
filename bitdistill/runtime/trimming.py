"""A packed file with a smaller vocabulary: the rows of embedding and LM head that a task needs, and a tokenizer for them.

Kept rows keep their bytes, so that the logits of kept tokens are those of the larger file, bit for bit, for every text whose
tokens are all kept. Other texts are cut into more and smaller pieces (trimmed_tokenizer.py). Needs no torch.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from bitdistill.errors import UserError
from bitdistill.kernels import packing as layout
from bitdistill.runtime.packed_file import TOKENIZER, Config, PackedModel
from bitdistill.runtime.packed_writer import write_tensors
from bitdistill.trimmed_tokenizer import kept_tokens, trim_tokenizer


def trim_packed(
    packed: PackedModel, counts: np.ndarray, output: str | Path, threshold: int = 0, vocabulary: int = 0
) -> np.ndarray:
    """Writes a packed file with the tokens that are used, and those that their merges need.

    Args:
        packed: the file, open.
        counts: int64 (V,) uses of each token.
        output: the file to write; its folder must exist.
        threshold: tokens used more often than this are kept.
        vocabulary: so many are kept at least, the lowest ids next; with what their merges need it may be a few more.

    Returns: int64 (V',), the kept ids, ascending; the new id of a token is its place there.

    Raises:
        UserError: the file has no tokenizer, or none whose tokens follow from merges.
    """
    text = packed.tokenizer_json()
    do = "Give a file with a byte-pair encoding tokenizer."
    if text is None:
        raise UserError("RUN_OR_FILE", expected="a file with a tokenizer", got=str(packed.path), do=do)
    description = json.loads(text)
    kept = kept_tokens(description, counts, threshold, field="RUN_OR_FILE", do=do)
    if len(kept) < vocabulary:
        used = counts > threshold
        used[np.setdiff1d(np.arange(len(counts)), kept)[: vocabulary - len(kept)]] = True
        kept = kept_tokens(description, used, field="RUN_OR_FILE", do=do)
    kept = np.union1d(kept, [index for index in packed.config.eos_token_ids if index < packed.config.vocab_size])
    tokenizer = json.dumps(trim_tokenizer(description, kept), ensure_ascii=False).encode()
    new_id = {int(old): new for new, old in enumerate(kept)}
    config = dataclasses.replace(
        packed.config,
        vocab_size=len(kept),
        eos_token_ids=[new_id[index] for index in packed.config.eos_token_ids if index in new_id],
        tokenizer_bytes=len(tokenizer),
    )
    tensors = {name: tensor for name, tensor in packed.tensors.items() if not name.startswith(packed.config.tables())}
    for name in packed.config.tables():
        tensors |= _rows_of_table(packed, name, kept)
    tensors[TOKENIZER] = np.frombuffer(tokenizer, np.uint8)
    write_tensors(Path(output), config, tensors, packed.metadata)
    return kept


def _rows_of_table(packed: PackedModel, name: str, kept: np.ndarray) -> dict[str, np.ndarray]:
    """Some rows of an embedding or LM head, as a file stores them."""
    config: Config = packed.config
    if config.embedding == "fp16":
        return {f"{name}.weight": np.ascontiguousarray(packed.tensors[f"{name}.weight"][kept])}
    codes, scale = packed.table_codes(name, kept)
    stored: dict[str, Any] = {
        "int8": lambda: (layout.pack_int8(codes), scale),
        "int4": lambda: (layout.pack_int4(codes), layout.pack_scales(scale)),
        "ternary": lambda: (layout.pack(codes, config.packing), scale),
    }
    weight, scales = stored[config.embedding]()
    return {f"{name}.weight_packed": weight, f"{name}.weight_scale": np.ascontiguousarray(scales)}
