"""The teacher of stage 2, run once: its k largest logits for every block that stage 2 will see, on disk.

The token stream of stage 2 is known beforehand: block i depends only on corpus, block size and seed (corpus.TokenStream).
So the full-precision base model runs over blocks 0 to N-1 once, and training reads the logits that it gave:

    cache.json                         versioned header: what is held, and the size of every shard
    shard-00000.safetensors            indices (n, T, k) uint16 or uint32, the words, the most likely first
                                       values  (n, T, k) fp16, their logits minus the largest
                                       log_rest (n, T) fp32, log of the sum over all other words (kernels/vocabulary.py)
                                       token_hash (n,) uint64, of each block's tokens

It is not worked out a second time which block a rank, a micro-step or a resumed run trains on. Instead, each block carries
its number, and a hash of its tokens is compared with that of the tokens that the teacher saw.

Rounding. A logit that lies d below the largest is moved by at most 2^-11 d, so least where the probability is high.
log_rest is computed afterwards, such that the probability outside the k words is exact. The KL of the rounded teacher from
the exact one is then at most 2^-23 E[d^2] / tau^2, with E under the teacher: 1e-6 nats for a d of 3. Much more is lost
because the words outside the k are not told apart, and the loss grows with the temperature: at tau = 5 nearly all
probability is outside the 32 largest words. Here tau is therefore 1 by default, unlike in stage 3.

Bytes per token: 4 k + 4 for vocabularies up to 65,536 words, else 6 k + 4. With k = 32 that is 132 or 196, so a tenth of a
billion tokens take 13 or 20 GB.

What it saves. Training a student of P parameters costs 6 P floating-point operations per token (8 P with gradient
checkpointing). A teacher of its size that runs along would cost 2 P more in every run: a third, and its weights and
activations on the device. Writing the cache costs these 2 P once. So a single run saves only memory, and each further run
on the same blocks (another seed of the student, another learning rate, an ablation) saves a quarter of its compute.

The cache is written in shards, each of which is complete or absent. Rank r of R writes shards r, r + R, ...; after a
restart, the missing ones are written.

Shape suffixes: B blocks, T positions, K cached words, N rows (B * T), V vocabulary.
"""

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from bitdistill.distributed import process_group
from bitdistill.errors import UserError
from bitdistill.kernels.vocabulary import linear_top_k
from bitdistill.training.cache_files import HEADER, CacheFolder, move_finished, require_room, save_shard, shard_name
from bitdistill.training.head import head_weight, hidden_states, instead_of_logits

FORMAT, VERSION = "bitdistill teacher logits", 1
SHARD_BYTES = 2**28  # held in memory while it is made
LEAST_SHARDS = 64  # of a small cache: ranks share them, and a restart repeats one at most


@dataclass(frozen=True)
class Layout:
    """What a cache holds. Sizes follow from it, before anything is written.

    Args:
        blocks: N. block_size: T, tokens. top_k: K. vocabulary: V, rows of the LM head.
        temperature: tau, for which log_rest holds.

    Raises:
        UserError: K above V.
    """

    blocks: int
    block_size: int
    top_k: int
    temperature: float
    vocabulary: int

    def __post_init__(self):
        if not 1 <= self.top_k <= self.vocabulary:
            raise UserError(
                "pretrain.kd_top_k",
                expected=f"1 to {self.vocabulary}, the model's words",
                got=str(self.top_k),
                do="Set it to a number in this range.",
            )

    @property
    def index_dtype(self) -> type[np.unsignedinteger]:
        return np.uint16 if self.vocabulary <= 2**16 else np.uint32

    @property
    def bytes_per_token(self) -> int:
        return self.top_k * (np.dtype(self.index_dtype).itemsize + 2) + 4

    @property
    def total_bytes(self) -> int:
        """Without the headers of the shards, 0.5 kB each."""
        return self.blocks * (self.block_size * self.bytes_per_token + 8)

    @property
    def blocks_per_shard(self) -> int:
        fitting = max(1, SHARD_BYTES // (self.block_size * self.bytes_per_token))
        return min(fitting, -(-self.blocks // LEAST_SHARDS))

    @property
    def shards(self) -> int:
        return -(-self.blocks // self.blocks_per_shard)

    def __str__(self) -> str:
        return (
            f"{self.blocks:,} blocks of {self.block_size} tokens, the {self.top_k} largest of {self.vocabulary:,} logits: "
            f"{self.bytes_per_token} bytes per token, {self.total_bytes / 1e9:.3g} GB"
        )


def check_room(folder: Path, layout: Layout) -> None:
    """Raises UserError when the disk of `folder` has no room for the shards that are not in it yet."""
    do = "Lower pretrain.kd_top_k or pretrain.max_steps, or move output_dir."
    require_room(folder, layout.total_bytes, what="the teacher's logits", layout=layout, do=do)


# ---------------------------------------------------------------------------------------------------- writing


def round_top_k(values_NK: Tensor, log_rest_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """``values`` in fp16, and the ``log_rest`` beside which the mass outside K is as it was.

    Returns: (fp16 (N, K), fp32 (N,)), with ``log_rest' - lse(values' / tau) = log_rest - lse(values / tau)``.
    """
    rounded_NK = values_NK.half()
    shift_N = (rounded_NK.float() / temperature).logsumexp(-1) - (values_NK / temperature).logsumexp(-1)
    return rounded_NK, log_rest_N + shift_N


def token_hashes(tokens_BT: np.ndarray) -> np.ndarray:
    """Eight bytes of BLAKE2 of each block's tokens: uint64 (B,)."""
    rows = np.ascontiguousarray(tokens_BT, dtype="<u4")
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def teacher_logits(
    model: nn.Module,
    tokens_BT: Tensor,
    layout: Layout,
    products: torch.dtype | None = None,
    positions_BT: Tensor | None = None,
) -> dict[str, np.ndarray]:
    """One batch of the cache: indices (B, T, K), values (B, T, K), log_rest (B, T), as they are stored.

    Args:
        model: full precision, in eval mode. Runs in its own dtype; its logits are fp32.
        tokens_BT: int64, blocks without padding.
        layout: how many words are kept, and at which temperature.
        products: the dtype of its matrix products, if not its own. The head's are in its own.
        positions_BT: positions that begin again with each document of a block; None for blocks that are one document.
    """
    autocast = torch.autocast(model.device.type, products, enabled=products is not None)
    tokens_BT = tokens_BT.to(model.device)
    where = {"attention_mask": torch.ones_like(tokens_BT)}
    if positions_BT is not None:
        where = {"position_ids": positions_BT.to(model.device)}
    with torch.no_grad(), autocast, instead_of_logits(model, hidden_states):
        hidden = model(input_ids=tokens_BT, **where, use_cache=False).logits
    with head_weight(model) as weight:
        indices, values, log_rest = linear_top_k(
            hidden.flatten(0, 1), weight, layout.top_k, temperature=layout.temperature
        )
    values, log_rest = round_top_k(values, log_rest, layout.temperature)
    return {
        "indices": indices.unflatten(0, tokens_BT.shape).cpu().numpy().astype(layout.index_dtype),
        "values": values.unflatten(0, tokens_BT.shape).cpu().numpy(),
        "log_rest": log_rest.unflatten(0, tokens_BT.shape).cpu().numpy(),
    }


def write_shards(
    folder: Path, model: nn.Module, stream, layout: Layout, *, batch_size: int, products: torch.dtype | None = None
) -> None:
    """Runs the teacher over this rank's share of the blocks, but for shards that are in `folder` already.

    Args:
        folder: of unfinished work, the same for all ranks.
        model: the teacher, as in teacher_logits; whole on this rank.
        stream: corpus.TokenStream at its beginning, or anything that gives its blocks in order.
        batch_size: blocks at a time. products: as in teacher_logits.
        layout: what is written: blocks, block size, words, temperature.
    """
    blocks = iter(stream)
    with tqdm(total=layout.blocks, desc="cache    ", unit="block", disable=not process_group.is_main()) as bar:
        for shard in range(layout.shards):
            first = shard * layout.blocks_per_shard
            taken = [next(blocks) for _ in range(min(layout.blocks_per_shard, layout.blocks - first))]
            assert [block["block"] for block in taken] == list(range(first, first + len(taken)))
            path = folder / shard_name(shard)
            if shard % process_group.world_size() != process_group.rank() or path.is_file():
                bar.update(len(taken))
                continue
            tokens_BT = torch.stack([block["input_ids"] for block in taken])
            positions = [block["position_ids"] for block in taken if "position_ids" in block]
            positions = torch.stack(positions).split(batch_size) if positions else itertools.repeat(None)
            batches = []
            for batch_BT, positions_BT in zip(tokens_BT.split(batch_size), positions, strict=False):
                batches.append(teacher_logits(model, batch_BT, layout, products, positions_BT))
                bar.update(len(batch_BT))
            arrays = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
            arrays["token_hash"] = token_hashes(tokens_BT.numpy())
            save_shard(path, arrays, {"format": FORMAT, "version": VERSION, "first_block": first})


def finish_cache(unfinished: Path, folder: Path, layout: Layout) -> int:
    """Moves the shards that all ranks wrote to `folder` and writes the header. Rank 0, after a barrier.

    Returns: bytes of the shards.
    """
    sizes = list(move_finished(unfinished, folder, map(shard_name, range(layout.shards))).values())
    header = {"format": FORMAT, "version": VERSION, **asdict(layout), "shard_bytes": sizes}
    (folder / HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")
    return sum(sizes)


# ---------------------------------------------------------------------------------------------------- reading


class TeacherCache:
    """A finished cache, read-only; only the pages of the blocks asked for are read.

    Args:
        folder: RUN/cache.
        blocks: how many of them will be needed. block_size: of the stream. vocabulary: of the student.

    Attributes:
        layout: what it holds; its temperature is that of the loss.

    Raises:
        UserError: absent, of another version, cut short, or made for something else.
    """

    def __init__(self, folder: str | Path, *, blocks: int, block_size: int, vocabulary: int):
        self._files = CacheFolder(folder, format=FORMAT, version=VERSION, stage="cache")
        require, header = self._files.require, self._files.header()
        sizes = header.pop("shard_bytes")
        self.layout = Layout(**header)
        require("blocks", blocks <= self.layout.blocks, f"at least {blocks}", self.layout.blocks)
        require("block_size", block_size == self.layout.block_size, block_size, self.layout.block_size)
        require("vocabulary", vocabulary == self.layout.vocabulary, vocabulary, self.layout.vocabulary)
        require("shards", len(sizes) == self.layout.shards, self.layout.shards, len(sizes))
        self._files.require_sizes({shard_name(shard): size for shard, size in enumerate(sizes)})
        self._open: dict[int, safe_open] = {}  # blocks come in order: the last two shards

    def read(self, block_B: Tensor, tokens_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the teacher said to these blocks, for head.head_distillation_top_k.

        Args:
            block_B: int64, their numbers. tokens_BT: int64, what is trained on.

        Returns: (indices int32 (B, T, K), values fp16 (B, T, K), log_rest fp32 (B, T)) on the device of `tokens_BT`.

        Raises: UserError: the teacher saw other tokens in that block, or no such block, or a shard is not of this cache.
        """
        found: dict[str, list[np.ndarray]] = {"indices": [], "values": [], "log_rest": []}
        hashes = token_hashes(tokens_BT.cpu().numpy())
        for block, ours in zip(block_B.tolist(), hashes, strict=True):
            self._files.require("blocks", block < self.layout.blocks, f"more than {block}", self.layout.blocks)
            shard, place = divmod(block, self.layout.blocks_per_shard)
            file = self._shard(shard)
            theirs = file.get_slice("token_hash")[place : place + 1][0]
            self._files.require(f"tokens of block {block}", ours == theirs, f"hash {ours:016x}", f"hash {theirs:016x}")
            for name, rows in found.items():
                rows.append(file.get_slice(name)[place : place + 1])
        indices, values, log_rest = (torch.from_numpy(_widened(np.concatenate(rows))) for rows in found.values())
        return tuple(part.to(tokens_BT.device) for part in (indices, values, log_rest))

    def _shard(self, shard: int) -> safe_open:
        if shard not in self._open:
            while len(self._open) > 1:
                del self._open[next(iter(self._open))]
            first = shard * self.layout.blocks_per_shard
            file = self._files.opened(shard, first_block=first)
            count = min(self.layout.blocks_per_shard, self.layout.blocks - first)
            shape, held = [count, self.layout.block_size, self.layout.top_k], file.get_slice("indices").get_shape()
            self._files.require(shard_name(shard), held == shape, f"indices {shape}", held)
            self._open[shard] = file
        return self._open[shard]


def _widened(array: np.ndarray) -> np.ndarray:
    """Words as int32, which every torch operator takes; the rest as it is."""
    return array.astype(np.int32) if array.dtype.kind == "u" else array
