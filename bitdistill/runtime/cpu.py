"""CPU inference from a packed student file: numpy, Numba and `tokenizers`; neither torch nor transformers is imported.

    text -> ids -> slots of the KV cache, steps of many rows -> `Decoder` -> logits -> `Sampler` -> ids -> text

The mathematics is in kernels/cpu/decoder.py; batching.py shares the decoder's steps among requests; slots.py knows what the
KV cache already holds. Logits do not depend on what else is in a step, so an answer is the same whether it is computed
alone or together with others.

The file is used from its memory map; nothing is unpacked or copied (`resident_bytes` counts what is held besides it).
"""

import itertools
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bitdistill.cpus import available_cpus
from bitdistill.errors import UserError
from bitdistill.kernels.cpu import library
from bitdistill.kernels.cpu.decoder import Decoder, KVCache
from bitdistill.names import KV_CACHES
from bitdistill.runtime.base import cache_capacity, check_new_tokens, stop_strings
from bitdistill.runtime.batching import ROWS_PER_STEP, Batch, Request, Stats
from bitdistill.runtime.compiled import decoder_model
from bitdistill.runtime.drafts import Drafts
from bitdistill.runtime.labels import label_requests, label_tree
from bitdistill.runtime.packed_file import PackedModel, read_packed
from bitdistill.runtime.predict import Predictor
from bitdistill.runtime.sampling import Sampler, Sampling
from bitdistill.runtime.slots import Slots
from bitdistill.runtime.text_stream import TextStream

MAX_SLOTS = 16
MAX_LOOKUP = 16  # tokens; a longer draft is seldom right to its end
MAX_THREADS = 1024  # a slip of the finger would fill the machine with threads


@dataclass
class Answer:
    """One finished sequence. `stopped_by`: "eos" | "length" | "context" | "stop"."""

    index: int  # of its prompt
    token_ids: list[int]
    text: str | None  # None where the file has no tokenizer
    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the KV cache
    stopped_by: str


@dataclass
class Cache:
    """The KV cache of one sequence that the caller feeds by hand, through `Runtime.logits`."""

    keys_values: KVCache
    length: int = 0  # positions in it

    @property
    def capacity(self) -> int:
        return self.keys_values.capacity

    @property
    def nbytes(self) -> int:
        return self.keys_values.nbytes


class Runtime(Predictor):
    """A student from a packed file.

    Args:
        path: a file of `export.write.write_packed`.
        threads: all cores that the process may use by default.
        kv_cache: how keys and values are kept: "bf16", "fp32" or "int8" (a scale for each position and head). What they
            cost in KL is in export/parity.py; bf16 is the default because it does not mind the outliers in keys, either.
        context: at most so many positions; the model's own limit by default.
        lookup: of each sequence, compute up to so many tokens at once that followed the same words before (drafts.py); answers
            are the same, token for token. Sequences that share a step look up less each: its rows are at most 16.

    Attributes:
        model: the open file (`PackedModel`): config, metadata, tensors.
        file_bytes: size of the file. weight_bytes: what a step reads of it, the packed linears and the LM head.
        stats: `Stats` of the last call that generated or classified.

    Raises:
        UserError: the file cannot be used (see `read_packed`), or a setting is out of its range.

    Not for several threads at once; several unfinished iterators are fine.
    """

    def __init__(
        self,
        path: str | Path,
        threads: int | None = None,
        kv_cache: str = "bf16",
        context: int | None = None,
        lookup: int = 0,
    ):
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            expected, do = f"1 to {MAX_THREADS:,}", "Leave it out to use all cores."
            raise UserError("threads", expected=expected, got=f"{threads:,}", do=do)
        if kv_cache not in KV_CACHES:
            raise UserError(
                "kv_cache", expected=f"one of {', '.join(KV_CACHES)}", got=repr(kv_cache), do="Choose one of these."
            )
        self.model: PackedModel = read_packed(path)
        longest = self.model.config.max_position_embeddings
        if context is not None and not 1 <= context <= longest:
            do = "Leave it out for the model's own context."
            raise UserError("context", expected=f"1 to {longest:,} positions", got=f"{context:,}", do=do)
        if not 0 <= lookup <= MAX_LOOKUP:
            raise UserError("lookup", expected=f"0 to {MAX_LOOKUP}", got=f"{lookup:,}", do="Use 3, or 0 for none.")
        self.context, self._lookup = context or longest, lookup
        self.kv_cache = kv_cache
        self.threads = threads or available_cpus()
        self.file_bytes = self.model.file_bytes
        self._decoder_model = decoder_model(self.model)
        library.load(_say_compiling, self._decoder_model.grouped)
        self._decoder = Decoder(self._decoder_model, self.threads)
        self._logits = np.empty((0, self.model.config.vocab_size), np.float32)
        self._slots: Slots | None = None
        self.stats = Stats()
        head = self._decoder_model.head
        self.weight_bytes = head.weight.nbytes + (0 if head.scale is None else head.scale.nbytes)
        self.weight_bytes += sum(
            self.model.tensors[f"{name}.weight_packed"].nbytes for name in self.model.config.linears
        )

    @property
    def resident_bytes(self) -> int:
        """What the runtime holds in memory beside the file's own pages, the KV cache and the tokenizer: its scratch."""
        return self._decoder.scratch_bytes + self._logits.nbytes

    # --- tokens -> logits ---------------------------------------------------------------------------------------------

    def new_cache(self, capacity: int) -> Cache:
        """An empty KV cache for `capacity` positions of one sequence, for `logits`."""
        return Cache(self._keys_values(1, capacity))

    def _keys_values(self, slots: int, capacity: int) -> KVCache:
        try:
            return KVCache(self._decoder_model, slots, capacity, self.kv_cache)
        except MemoryError as error:
            raise UserError(
                "context",
                expected="a KV cache that fits into memory",
                got=f"{slots} x {capacity:,} positions ({error})",
                do='Give a smaller context, fewer slots, or kv_cache "int8".',
            ) from error

    def logits(self, input_ids: Sequence[int], last_only: bool = False, cache: Cache | None = None) -> np.ndarray:
        """Next-token logits.

        Args:
            input_ids: T token ids that follow the positions in `cache`.
            last_only: only those of the last position, which saves the LM head for the others.
            cache: extended by T positions; without one the ids are a whole text.

        Returns: float32 (T, V), or (1, V) for last_only.

        Raises:
            UserError: no ids, an id outside the vocabulary, or more positions than the context (or the cache).
        """
        ids = self._checked_ids(input_ids)
        if cache is None and len(ids) <= self.context:
            cache = self.new_cache(len(ids))
        limit = self.context if cache is None else min(cache.capacity, self.context)
        first = 0 if cache is None else cache.length
        if first + len(ids) > limit:
            raise UserError(
                "prompt", expected=f"at most {limit} tokens", got=str(first + len(ids)), do="Shorten the text."
            )
        wanted = [len(ids) - 1] if last_only else None
        positions = range(first, first + len(ids))
        logits = self._forward(ids, [0] * len(ids), positions, cache.keys_values, wanted, fresh=True)
        cache.length += len(ids)
        return logits

    def classify(
        self, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], progress: Callable = iter
    ) -> np.ndarray:
        """How likely each label is after each prompt: ``sum_t log p(label_t | prompt, label_<t)``.

        Prompts share the decoder's steps, in the order of their ids, so that each computes only what it does not share with
        those before it.

        Args:
            prompts: N token lists. labels: L token lists.
            progress: wraps the iteration over prompts, such as tqdm.

        Returns: log-likelihoods float64 (N, L), natural logarithm.

        Raises:
            UserError: an empty prompt or label, an id outside the vocabulary, or a prompt that does not fit with a label.
        """
        labels = [self._checked_ids(label, "labels") for label in labels]
        limit = self.context + 1 - max(map(len, labels), default=1)
        prompts = [self._checked_ids(ids, limit=limit) for ids in prompts]
        likelihoods = np.zeros((len(prompts), len(labels)))
        if likelihoods.size == 0:
            return likelihoods
        tree, started = label_tree(labels), time.perf_counter()
        longest = max(map(len, prompts)) + max(map(len, labels)) - 1
        # As many prompts as fill a step, and slots for the openings that continue them.
        together = min(1 + ROWS_PER_STEP * len(prompts) // sum(map(len, prompts)), len(prompts))
        slots = self._slots_for(min(MAX_SLOTS, together * len(tree)), longest)
        together = max(min(together, MAX_SLOTS) // len(tree), 1)
        self.stats = Stats(prompt_tokens=sum(map(len, prompts)), weight_bytes=self.weight_bytes)
        batch = Batch(self._forward, slots, together, self.context, (), Stats())
        order = iter(progress(sorted(range(len(prompts)), key=lambda i: prompts[i])))
        others: dict[int, list[Request]] = {}  # of prompts that are being computed: the openings that continue them
        try:
            while True:
                for index in itertools.islice(order, max(together - len(batch.waiting), 0)):
                    first, *others[index] = label_requests(index, prompts[index], tree, likelihoods[index])
                    batch.waiting.append(first)
                if not batch:
                    break
                for request, _ in batch.step():
                    if request.index in others:
                        self.stats.cached_tokens += request.cached_tokens
                        batch.waiting.extendleft(reversed(others.pop(request.index)))
        finally:
            batch.close()
        self.stats.prompt_seconds = time.perf_counter() - started
        return likelihoods

    def _forward(self, ids, slots, positions, cache: KVCache, wanted: list[int] | None, fresh: bool = False):
        """`Decoder.forward`, into memory that the next call overwrites unless it is to be `fresh`: 600 KB for every token
        would cost their page faults."""
        rows, out = len(ids) if wanted is None else len(wanted), None
        if not fresh:
            if len(self._logits) < rows:
                self._logits = np.empty((rows, self.model.config.vocab_size), np.float32)
            out = self._logits[:rows]
        return self._decoder.forward(ids, slots, positions, cache, wanted, out=out)

    # --- generation ---------------------------------------------------------------------------------------------------

    def generate_ids(
        self, prompt_ids: Sequence[int], max_new_tokens: int = 128, sampling: Sampling | None = None
    ) -> Generator[int, None, None]:
        """`BaseRuntime.generate_ids`."""
        request = self._request(0, prompt_ids, max_new_tokens, sampling or Sampling())
        for _, token in self._run([request], 1):
            if token is not None:
                yield token

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        slots: int = 8,
    ) -> Iterator[Answer]:
        """Continues many prompts, `slots` at a time; as one ends the next one joins. Answers come as they are finished.

        Each is what `generate_ids` gives alone, with the seed ``sampling.seed + index``.

        Args:
            prompts: texts or token ids. slots: 1 to 16; each takes memory for its part of the KV cache.
            max_new_tokens, sampling, stop: as in `generate`.

        Raises:
            UserError: as `generate`, before anything is computed; texts for a file without a tokenizer.
        """
        _check_slots(slots)
        sampling = sampling or Sampling()
        requests = [
            self._request(index, self._encoded(prompt), max_new_tokens, replace(sampling, seed=sampling.seed + index))
            for index, prompt in enumerate(prompts)
        ]
        if stop_strings(stop):
            self._needed_tokenizer()
        streams = [
            self.tokenizer and TextStream(self.tokenizer, request.ids, stop_strings(stop)) for request in requests
        ]
        texts = ["" for _ in requests]
        for request, token in self._run(requests, slots):
            if stream := streams[request.index]:
                texts[request.index] += stream.finish() if token is None else stream.feed(token)
                if stream.stopped:
                    request.stopped_by = "stop"
            if token is None:
                yield Answer(
                    request.index,
                    request.ids[request.prompt_tokens :],
                    texts[request.index] if stream else None,
                    request.prompt_tokens,
                    request.cached_tokens,
                    request.stopped_by,
                )

    def new_batch(self, slots: int) -> Batch:
        """A batch with a KV cache of its own, requests whenever they come. For a server, which calls `Batch.step` from one
        thread. The cache grows with the longest sequence, up to the context.

        Args:
            slots: 1 to 16.

        Raises:
            UserError: as many sequences of the whole context would not fit into memory.
        """
        _check_slots(slots)

        def cache(positions: int) -> KVCache:
            return self._keys_values(slots, cache_capacity(positions, self.context))

        cache(self.context)  # whether there is memory for it is said now, and not in the middle of an answer
        memory = Slots(cache(1), self.model.config.window, cache)
        stats = Stats(weight_bytes=self.weight_bytes)
        return Batch(self._forward, memory, slots, self.context, self.model.config.eos_token_ids, stats)

    def new_request(self, prompt_ids: Sequence[int], max_new_tokens: int, sampling: Sampling) -> Request:
        """A checked request for `new_batch`.

        Args:
            prompt_ids: token ids. max_new_tokens: upper bound. sampling: how tokens are chosen.

        Raises:
            UserError: a prompt longer than the context, or settings out of range.
        """
        return self._request(0, prompt_ids, max_new_tokens, sampling)

    def _run(self, requests: Sequence[Request], together: int) -> Iterator[tuple[Request, int | None]]:
        """Steps of a `Batch`, in slots that fit, until all requests have ended; those that have not when the caller closes
        the iterator are cancelled."""
        self.stats = Stats(weight_bytes=self.weight_bytes)
        if not requests:
            return
        # The last token is never fed: its keys would serve the one after it.
        positions = max(len(request.ids) + request.max_new_tokens - 1 for request in requests)
        slots = self._slots_for(min(together, len(requests)), min(positions, self.context))
        eos = self.model.config.eos_token_ids
        batch = Batch(self._forward, slots, together, self.context, eos, self.stats)
        batch.waiting.extend(requests)
        try:
            while batch:
                yield from batch.step()
        finally:
            batch.close()
            batch.stats.resident_bytes = self.resident_bytes

    def _slots_for(self, count: int, positions: int) -> Slots:
        """Slots with room for `count` more sequences of `positions`: those at hand, or a larger cache that remembers what
        they hold. An unfinished iterator goes on in its own."""
        if self._slots is None or not self._slots.fits(count, positions):
            capacity = cache_capacity(positions, self.context)
            larger = Slots(self._keys_values(count, capacity), self.model.config.window)
            if self._slots is not None:
                larger.remember(self._slots)
            self._slots = larger
        return self._slots

    def profile(self, context: int, repeats: int = 20) -> dict[str, float]:
        """Seconds by part (`Decoder.profile`) of a decoding step after `context` positions: the fastest of some repeats."""
        cache = self.new_cache(context + 1)
        if context:
            self.logits([0] * context, last_only=True, cache=cache)
        step = ([0], [0], [context], cache.keys_values)
        return min((self._decoder.profile(*step) for _ in range(repeats)), key=lambda parts: sum(parts.values()))

    def close(self) -> None:
        """Ends the decoder's threads and drops the KV cache. Garbage collection does it, too."""
        self._decoder.close()
        self.forget()

    def forget(self) -> None:
        """Drops the KV cache and what it remembers of earlier prompts."""
        self._slots = None

    # --- checks -------------------------------------------------------------------------------------------------------

    def _request(self, index: int, prompt_ids: Sequence[int], max_new_tokens: int, sampling: Sampling) -> Request:
        check_new_tokens(max_new_tokens)
        ids = self._checked_ids(prompt_ids, limit=self.context)
        sampler = Sampler(sampling, ids, self.model.config.vocab_size)
        drafts = Drafts(self._lookup) if self._lookup else None
        return Request(index, ids, max_new_tokens, sampler, prompt_tokens=len(ids), drafts=drafts)


def _check_slots(slots: int) -> None:
    if not 1 <= slots <= MAX_SLOTS:
        raise UserError("slots", expected=f"1 to {MAX_SLOTS}", got=str(slots), do="Give a number in this range.")


def _say_compiling() -> None:
    """Some seconds of silence would look like a hang."""
    print("bitdistill: compiles its CPU kernels, once on this machine ...", file=sys.stderr, flush=True)
