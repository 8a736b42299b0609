"""A corpus as token ids on disk: made once, by all ranks together, and read by place.

    shard-00000.safetensors    tokens (n,) uint16 or uint32, of consecutive batches of documents
                               starts (m,) uint32, where documents begin among them
                               and as metadata: the digest of both, where the documents go on, whether the corpus ends here

The tokens of all shards one after the other are those of corpus.TokenStream, which is the specification: documents, each
with its EOS. Shard i holds batches i * SHARD_BATCHES and following, whichever rank makes it. Each rank makes one shard at a
time, until there are as many tokens as are needed or the corpus ends. Every rank reads all texts, but makes tokens of its
own share only; reading takes little time compared with that. A shard is complete or absent. So the same shards come out
whatever interrupts the work and however many ranks continue it; a run that needs more tokens continues after the last
shard.

`ShardedStream` gives the blocks of `TokenStream` in its order. Block n is found by arithmetic, so nothing is read again after a
resume, and no rank holds more than the blocks it looks at. With `document_mask` its blocks say where documents begin.
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from tqdm.auto import tqdm

from bitdistill.data.corpus import TokenStream, corpus_files
from bitdistill.distributed import process_group
from bitdistill.errors import UserError
from bitdistill.files import whole_file
from bitdistill.kernels.numerics import IGNORED
from bitdistill.text_files import COMPRESSED, user_path

FORMAT, VERSION = "bitdistill corpus tokens", 1
SHARD_BATCHES = 128  # of corpus.BATCH_CHARACTERS: up to 17 million characters, 4 million tokens
OPEN_SHARDS = 64


def token_bytes(source: str, tokens: int, vocabulary: int) -> int:
    """The most bytes that so many tokens of a corpus take on disk: whole shards, but no more than its local files give.

    Args:
        source: of the corpus. tokens: how many are needed. vocabulary: words of the tokenizer.
    """
    files, _ = corpus_files(user_path(source, "corpus"))
    of_files = sum(file.stat().st_size for file in files)
    most = tokens + 2**22
    if files and not any(file.suffix in COMPRESSED for file in files):
        most = min(most, 2 * of_files)  # a token has a byte at least; and the EOS of short documents
    return np.dtype(_dtype(vocabulary)).itemsize * most


def _dtype(vocabulary: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocabulary <= 2**16 else np.uint32


# ---------------------------------------------------------------------------------------------------- writing


def write_tokens(folder: Path, stream: TokenStream, tokens: int) -> None:
    """Makes the shards that are missing until `folder` holds so many tokens or all of the corpus. Every rank calls it.

    Args:
        folder: for this corpus and tokenizer alone; the same for all ranks. stream: the corpus.
        tokens: how many are needed.

    Raises:
        UserError: a file of the corpus that cannot be read, or a damaged shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    process_group.barrier()
    abouts = _whole(folder)
    process_group.barrier()  # all have looked before anyone writes
    done = sum(about["tokens"] for about in abouts)
    if done >= tokens or (abouts and abouts[-1]["last"]):
        return
    ranks, rank = process_group.world_size(), process_group.rank()
    batches = stream.batches_of_documents(abouts[-1]["after"] if abouts else None)
    pending = next(batches, None)
    with tqdm(total=tokens, initial=done, desc="tokens   ", unit="token", unit_scale=True, disable=rank != 0) as bar:
        for first in range(len(abouts), 2**31, ranks):
            for shard in range(first, first + ranks):
                taken = [] if pending is None else [pending, *islice(batches, SHARD_BATCHES - 1)]
                pending = next(batches, None)
                if taken and shard == first + rank and not (folder / _name(shard)).is_file():
                    _write(folder / _name(shard), stream, [rows for _, rows in taken], pending, shard)
            process_group.barrier()
            there = [about(folder, s) for s in range(first, first + ranks) if (folder / _name(s)).is_file()]
            process_group.barrier()
            done += sum(one["tokens"] for one in there)
            bar.update(min(done, tokens) - bar.n)
            if done >= tokens or pending is None:
                return


def _write(path: Path, stream: TokenStream, batches: list[list[dict]], pending: tuple | None, shard: int) -> None:
    found, starts, length = [], [], 0
    for rows in batches:
        ids, begins = stream.tokens_of(rows)
        starts += [length + begin for begin in begins]
        found.append(ids)
        length += len(ids)
    arrays = {"tokens": np.concatenate(found).astype(_dtype(stream.vocabulary)), "starts": np.array(starts, np.uint32)}
    known = {"shard": shard, "tokens": length, "digest": _digest(arrays), "last": pending is None}
    known |= {"after": None if pending is None else pending[0]}
    with whole_file(path) as temporary:
        save_file(arrays, temporary, metadata={"format": FORMAT, "version": str(VERSION), "about": json.dumps(known)})


def _digest(arrays: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(arrays["tokens"].tobytes() + arrays["starts"].tobytes()).hexdigest()


def _name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def _whole(folder: Path) -> list[dict]:
    """What the first shards without a gap say of themselves."""
    found = []
    while (folder / _name(len(found))).is_file():
        found.append(about(folder, len(found)))
    return found


def about(folder: Path, shard: int) -> dict:
    """{"shard", "tokens", "digest", "last", "after"} of a shard.

    Raises:
        UserError: it is damaged, or of another version.
    """
    metadata = _opened(folder, shard).metadata() or {}
    got = f"{metadata.get('format')}, version {metadata.get('version')}"
    if got != f"{FORMAT}, version {VERSION}":
        raise _damaged(folder, shard, f"{FORMAT}, version {VERSION}", got)
    known = json.loads(metadata["about"])
    if known["shard"] != shard:
        raise _damaged(folder, shard, f"shard {shard}", f"shard {known['shard']}")
    return known


def _opened(folder: Path, shard: int):
    try:
        return safe_open(folder / _name(shard), framework="np")
    except (SafetensorError, FileNotFoundError) as error:
        raise _damaged(folder, shard, "a whole safetensors file", error) from error


def _damaged(folder: Path, shard: int, expected: str, got: object) -> UserError:
    do = f"Remove {folder}, and give the command again: the tokens are made once more."
    return UserError(f"{folder / _name(shard)}", expected=expected, got=str(got), do=do)


# ---------------------------------------------------------------------------------------------------- reading


class TokenShards:
    """The tokens of a corpus, by place; only what is asked for is read, and each shard is compared with its digest once.

    Args:
        folder: as `write_tokens` left it.

    Attributes:
        tokens: how many there are. complete: whether that is the whole corpus.

    Raises:
        UserError: a shard is damaged.
    """

    def __init__(self, folder: Path):
        self.folder, abouts = folder, _whole(folder)
        self._ends = np.cumsum([0, *(one["tokens"] for one in abouts)])
        self._digests = [one["digest"] for one in abouts]
        self.tokens, self.complete = int(self._ends[-1]), bool(abouts and abouts[-1]["last"])
        self._files: dict[int, tuple] = {}

    def read(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """(token ids int64 (n,), whether a document begins there, bool (n,)) of places `begin` to `end`."""
        ids, begins = np.empty(end - begin, np.int64), np.zeros(end - begin, bool)
        shard = int(np.searchsorted(self._ends, begin, side="right")) - 1
        at = begin
        while at < end:
            tokens, starts = self._shard(shard)
            offset = int(self._ends[shard])
            upto = min(end, int(self._ends[shard + 1]))
            ids[at - begin : upto - begin] = tokens[at - offset : upto - offset]
            inside = slice(*np.searchsorted(starts, [at - offset, upto - offset]))
            begins[starts[inside].astype(np.int64) + offset - begin] = True
            at, shard = upto, shard + 1
        return ids, begins

    def _shard(self, shard: int) -> tuple:
        if shard not in self._files:
            while len(self._files) >= OPEN_SHARDS:
                del self._files[next(iter(self._files))]
            file = _opened(self.folder, shard)
            arrays = {name: file.get_tensor(name) for name in ("tokens", "starts")}
            found = _digest(arrays)
            if found != self._digests[shard]:
                raise _damaged(self.folder, shard, f"digest {self._digests[shard]}", found)
            self._files[shard] = file.get_slice("tokens"), arrays["starts"]
        return self._files[shard]


class ShardedStream(IterableDataset):
    """The endless blocks of `corpus.TokenStream`, in its order, from tokens on disk.

    A block is {"input_ids", "labels", "block"}, int64 (block_size,) and the block's number since the very first. With
    `document_mask` there are "position_ids", too, which begin again with each document: without an attention mask, that is how
    transformers knows that tokens see their own document alone; and the first token of a document is no label, for nothing
    before it is seen.

    Args:
        shards: the corpus. stream: the same corpus, for its block size, seed and window.
        document_mask: whether the documents of a block are apart.

    Attributes:
        epochs: how often the end of the corpus was reached.
    """

    def __init__(self, shards: TokenShards, stream: TokenStream, document_mask: bool):
        super().__init__()
        self.block_size, self.settings, self.document_mask = stream.block_size, stream.settings, document_mask
        self._shards, self._seed, self._window = shards, stream.settings["seed"], stream.settings["window"]
        self.blocks = shards.tokens // self.block_size
        if not shards.complete:  # the last window may not be whole yet
            self.blocks -= self.blocks % self._window
        if not self.blocks:
            do = "Give a larger corpus or a smaller block_size."
            got = f"{shards.tokens} tokens" if shards.tokens else "no text"
            raise UserError("corpus", expected=f"at least {self.block_size} tokens", got=got, do=do)
        self._next = 0

    @property
    def epochs(self) -> int:
        """How often the end of the corpus was reached."""
        return self._next // self.blocks if self._shards.complete else 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """From the beginning, or from where ``load_state`` put it."""
        if get_worker_info() is not None:
            raise ValueError("ShardedStream keeps its place in this process: use dataloader_num_workers 0")
        while True:
            block = self.block(self._next)
            self._next += 1
            yield block

    def block(self, number: int) -> dict[str, Tensor]:
        """Block `number` since the very first."""
        epoch, within = divmod(number, self.blocks)
        assert epoch == 0 or self._shards.complete, f"block {number} of {self.blocks} that were made"
        window, place = divmod(within, self._window)
        size = min(self._window, self.blocks - window * self._window)
        windows = -(-self.blocks // self._window)
        order = np.random.default_rng([self._seed, epoch * windows + window]).permutation(size)
        first = (window * self._window + int(order[place])) * self.block_size
        ids, begins = self._shards.read(first, first + self.block_size)
        tokens = torch.from_numpy(ids)
        block = {"input_ids": tokens, "labels": tokens.clone(), "block": number}
        if self.document_mask:
            begins[0] = True
            places = np.arange(self.block_size)
            block["position_ids"] = torch.from_numpy(places - np.maximum.accumulate(np.where(begins, places, 0)))
            begins[0] = False
            block["labels"][torch.from_numpy(begins)] = IGNORED
        return block

    def state_for(self, blocks: int) -> dict:
        """Where the stream stands after ``blocks`` blocks, counted from the very first: for JSON."""
        return {"block": blocks, "skip_blocks": 0, "settings": self.settings}

    def load_state(self, state: dict) -> None:
        """Go on after the blocks of a ``state_for``, also of one that a TokenStream gave.

        Raises:
            UserError: the state belongs to another corpus, block size, window or seed.
        """
        TokenStream.require_same(self.settings, state["settings"])
        self._next = state["block"] + state["skip_blocks"]


def blocks_to_make(blocks: int, window: int) -> int:
    """Blocks of tokens that a reader of `blocks` blocks may look at: whole windows, and one more that is fetched ahead."""
    return (-(-blocks // window) + 1) * window
