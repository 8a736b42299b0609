"""The compiled decoder: from token ids to logits, on packed weights as they are in the file.

    N rows, each a token of a sequence (slot) at a position -> K and V into the cache -> logits of the wanted rows

A prompt is N rows of one slot, decoding a batch is one row of each of N slots, and continuous batching is any mixture. The
parts of a model are plain dataclasses of numpy arrays, which may be read-only and misaligned. This module checks them and
describes them to step.py by their addresses. It knows nothing of files.

Logits depend neither on the number of threads nor on how the rows are divided into calls, to the last bit.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitdistill.kernels import packing
from bitdistill.kernels.cpu import library, records
from bitdistill.kernels.cpu.pool import Pool

# Of a long call, so many rows go through the layers together. Working memory grows with it. Seconds of a 512-token prompt,
# relative to 128 (Qwen3-0.6B shape, one Zen 3 core): 16 1.19, 32 1.07, 64 1.03, 256 1.00, 512 1.04.
ROWS_PER_BLOCK = 128
ALIGNMENT = 64
ACTIVATIONS = {"silu": records.SILU, "gelu_pytorch_tanh": records.GELU_TANH}
CACHE_DTYPES = {
    "fp32": (records.FP32, np.float32),
    "bf16": (records.BF16, np.uint16),
    "int8": (records.INT8, np.int8),
}


@dataclass(frozen=True)
class Table:
    """An embedding or LM head, (V, hidden) (kernels/packing.py)."""

    format: str  # "fp16" | "int8" | "int4" | "2bit" | "base3"
    rows: int
    columns: int
    weight: np.ndarray  # fp16: float16 (V, hidden); else the 1-D array of packing.py
    scale: np.ndarray | None = None  # float32 (V,); int4: float16 (ceil(V / 16), hidden / 32, 16); fp16: None


@dataclass(frozen=True)
class Projection:
    """A ternary linear: ``y = acc * (act_scale * weight_scale) + bias``, after its SubLN if it has one."""

    weight: np.ndarray  # uint8 (packed_bytes(O, I, packing),)
    packing: str  # "2bit" | "base3"
    out_features: int
    in_features: int
    weight_scale: float | np.ndarray  # of groups of columns: float16 (ceil(O / 16), G, 16), see packing.pack_scales
    bias: np.ndarray | None = None  # float32 (O,)
    subln: np.ndarray | None = None  # float32 (I,)
    subln_eps: float | None = None
    group_size: int | None = None  # columns of a row that share a scale; None for one scale, I or more for one per row
    input_scale: np.ndarray | None = None  # float32 (I,), by which its input is divided before it is rounded
    act_blocks: bool = False  # its activations have a scale for each 32 columns, not one for the token

    @property
    def grouped(self) -> bool:
        """Whether several scales take part in one number of the result."""
        return self.act_blocks or (self.group_size is not None and self.group_size < self.in_features)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One decoder layer. Norms are float32 gains, always the multiplier; None where the family has none."""

    input_norm: np.ndarray
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    gate: Projection
    up: Projection
    down: Projection
    pre_mlp_norm: np.ndarray
    q_norm: np.ndarray | None = None
    k_norm: np.ndarray | None = None
    post_attention_norm: np.ndarray | None = None  # on the attention's output, in front of the residual sum
    post_mlp_norm: np.ndarray | None = None  # on the MLP's output likewise
    rope: int = 0  # index into Model.ropes
    window: int | None = None  # how many last positions a row sees, itself included


@dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder-only language model."""

    layers: Sequence[Layer]
    embedding: Table
    head: Table  # the same object when tied
    final_norm: np.ndarray
    eps: float
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    activation: str  # "silu" | "gelu_pytorch_tanh"
    attention_scale: float
    embedding_scale: float
    ropes: Sequence[tuple[np.ndarray, float]]  # (inv_freq float32 (head_dim / 2,), factor of cosine and sine)

    @property
    def grouped(self) -> bool:
        """Whether it needs the products with scales of groups of columns (library.py)."""
        return any(getattr(layer, name).grouped for layer in self.layers for name in records.PROJECTIONS)


class KVCache:
    """Keys and values of `slots` sequences of up to `capacity` positions (layout: attention.py).

    Args:
        model: whose layers and heads.
        slots: sequences that live side by side.
        capacity: positions of each; rounded up to a multiple of 32 in memory.
        dtype: "fp32", "bf16" (rounded half to even) or "int8" (one fp32 scale for each head and position).

    Attributes: slots, capacity, dtype, nbytes (memory of the arrays; the first writes make it resident, up to 2 MB at a time).

    Raises:
        ValueError: slots or capacity below 1, or an unknown dtype.
    """

    def __init__(self, model: Model, slots: int, capacity: int, dtype: str = "fp32"):
        _check(dtype in CACHE_DTYPES, "dtype", "one of " + ", ".join(CACHE_DTYPES), repr(dtype))
        _check(slots >= 1, "slots", "at least 1", slots)
        _check(capacity >= 1, "capacity", "at least 1 position", capacity)
        self.slots, self.capacity, self.dtype = slots, capacity, dtype
        code, number = CACHE_DTYPES[dtype]
        self.shape = (len(model.layers), model.num_key_value_heads, model.head_dim)
        compiled = library.load()
        lanes, width = compiled.LANES, compiled.padded(model.head_dim)
        self.padded_capacity = -(-capacity // compiled.CHUNK) * compiled.CHUNK
        heads = (len(model.layers), slots, model.num_key_value_heads)
        pair, rows = (2, compiled.key_rows(code, model.head_dim)) if dtype == "bf16" else (1, model.head_dim)
        self.keys = _zeros((*heads, self.padded_capacity // lanes, rows // pair, lanes * pair), number)
        self.values = _zeros((*heads, self.padded_capacity // pair, width * pair), number)
        scales = self.padded_capacity if dtype == "int8" else 0
        self.key_scales, self.value_scales = (np.zeros((*heads, scales), np.float32) for _ in range(2))
        arrays = (self.keys, self.values, self.key_scales, self.value_scales)
        # The last words of a records.CALL.
        self.words = np.array([*(a.ctypes.data for a in arrays), code, slots, self.padded_capacity], np.int64)
        self.nbytes = sum(array.nbytes for array in arrays)

    def copy(self, source_slot: int, target_slot: int, length: int, source: "KVCache | None" = None) -> None:
        """Copies the first `length` positions of one slot to another: a prefix that sequences share.

        Args:
            source_slot, target_slot: where they lie, and where they come to lie.
            length: how many.
            source: the cache of `source_slot`, of the same model and dtype; this one by default.

        Raises:
            ValueError: a slot or length out of range.
        """
        source = self if source is None else source
        for name, slot, slots in (("source_slot", source_slot, source.slots), ("target_slot", target_slot, self.slots)):
            _check(0 <= slot < slots, name, f"0 to {slots - 1}", slot, "Give the cache more slots.")
        longest = min(self.capacity, source.capacity)
        _check(0 <= length <= longest, "length", f"0 to {longest}", length, "Copy less.")
        blocks = -(-length // library.load().LANES)
        self.keys[:, target_slot, :, :blocks] = source.keys[:, source_slot, :, :blocks]
        for name in ("values", "key_scales", "value_scales"):
            to, of = getattr(self, name), getattr(source, name)
            rows = -(-length * to.shape[3] // self.padded_capacity)
            to[:, target_slot, :, :rows] = of[:, source_slot, :, :rows]


class Decoder:
    """A model, ready to run.

    Args:
        model: its arrays are kept alive and never written to. Gains and biases are copied (they are padded).
        threads: that share every step, the caller included. More than free cores make it slow.

    Attributes: model, threads, scratch_bytes (working memory and padded copies; a page that no call touched yet is not
        resident).

    Raises:
        ValueError: a part that does not fit, named with its layer.
    """

    def __init__(self, model: Model, threads: int = 1):
        _check(threads >= 1, "threads", "at least 1", threads)
        self.model, self.threads = model, threads
        self._compiled = library.load(grouped=model.grouped)
        self._keep: list[np.ndarray] = []  # the arrays whose addresses are used
        self.scratch_bytes = 0
        self._model, self._layers = np.zeros(1, records.MODEL), np.zeros(len(model.layers), records.LAYER)
        self._call, self._scratch = np.zeros(1, records.CALL), np.zeros(1, records.SCRATCH)
        self._describe_model()
        self._allocate()
        self._shape = (len(model.layers), model.num_key_value_heads, model.head_dim)
        self._rows = np.zeros((4, ROWS_PER_BLOCK), np.int64)  # ids, slots, positions and wanted rows of a block
        for name, row in zip(("ids", "slots", "positions", "wanted"), self._rows, strict=True):
            self._call[name] = row.ctypes.data
        self._call_words = self._call.view(np.int64)
        described = (self._model, self._layers, self._call, self._scratch)
        self._addresses = tuple(record.ctypes.data for record in described)
        self._pool = Pool(threads, self._compiled.enter, self._addresses, described) if threads > 1 else None
        self._one_call = threading.Lock()

    # --- running ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        ids: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        cache: KVCache,
        wanted: Sequence[int] | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Logits of the next token after each wanted row; the cache is extended by all rows.

        Args:
            ids: (N,) token of each row. slots: (N,) its sequence. positions: (N,) its place there, rising in each slot;
                the earlier positions are in the cache or among the rows. A position that was fed before is overwritten,
                and what comes after it is forgotten.
            cache: of this model.
            wanted: rising row numbers; all rows by default. Each costs a pass of the LM head.
            out: float32 (wanted, V), C-contiguous: where to write. A new array by default.

        Returns: float32 (wanted, V), `out` if given.

        Raises:
            ValueError: lengths, ids, slots, positions, wanted, out or the cache do not fit; nothing was run.

        Numerics: integer products exact, fp32 elsewhere. Bit-equal for any number of threads and any cut into calls.
        """
        rows, wanted = self._checked_rows(ids, slots, positions, cache, wanted)
        out = self._checked_out(out, len(wanted))
        with self._one_call:
            self._run(rows, cache, wanted, out)
        return out

    def profile(
        self,
        ids: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        cache: KVCache,
        wanted: Sequence[int] | None = None,
    ) -> dict[str, float]:
        """Seconds that one such `forward` spends on each part (records.PARTS), averaged over the threads.

        "waiting" is time at barriers; "attention" includes RoPE, the norms of q and k and the cache.
        """
        rows, wanted = self._checked_rows(ids, slots, positions, cache, wanted)
        nanoseconds = np.zeros((self.threads, len(records.PARTS)), np.int64)
        with self._one_call:
            try:
                self._call["profile"] = nanoseconds.ctypes.data
                self._run(rows, cache, wanted, self._checked_out(None, len(wanted)))
            finally:
                self._call["profile"] = 0
        return dict(zip(records.PARTS, (nanoseconds.mean(axis=0) * 1e-9).tolist(), strict=True))

    def close(self) -> None:
        """Ends the threads. Another call would start them again."""
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _run(self, rows: np.ndarray, cache: KVCache, wanted: np.ndarray, out: np.ndarray) -> None:
        """Checked rows, block by block. One token takes this path thousands of times per second: few numpy calls."""
        call, count, address = self._call[0], rows.shape[1], out.__array_interface__["data"][0]
        self._call_words[-len(cache.words) :] = cache.words
        if self._pool is not None:
            self._make_room(min(count, ROWS_PER_BLOCK), cache)
        done = 0
        for start in range(0, count, ROWS_PER_BLOCK):
            stop = min(start + ROWS_PER_BLOCK, count)
            high = len(wanted) if stop == count else int(np.searchsorted(wanted, stop))
            self._rows[:3, : stop - start] = rows[:, start:stop]
            self._rows[3, : high - done] = wanted[done:high] - start
            call["rows"], call["wanted_rows"] = stop - start, high - done
            call["logits"] = address + 4 * self.model.head.rows * done
            if self._pool is None:
                self._compiled.enter(0, 0, 1, 0, *self._addresses)
            else:
                self._pool.run()
            done = high

    def _make_room(self, rows: int, cache: KVCache) -> None:
        """Memory for attention that is divided into spans: as many parts as a call of so many rows can need of this cache."""
        self._arrived[:] = 0  # a call that failed may have left something
        if (rows, cache.padded_capacity) == self._room_for:
            return
        self._room_for = rows, cache.padded_capacity
        model, compiled = self.model, self._compiled
        spans = -(-cache.padded_capacity // compiled.SPAN)
        group = model.num_attention_heads // model.num_key_value_heads
        units = min(len(self._arrived), rows * model.num_key_value_heads)
        queries = min(rows, compiled.tile_rows(group)) * group
        floats = units * spans * compiled.part_floats(queries, model.head_dim) if spans > 1 else 0
        if floats > self._parts.size:
            self.scratch_bytes += 4 * (floats - self._parts.size)
            self._parts = _zeros((floats,), np.float32)
            self._scratch["parts"] = self._parts.ctypes.data

    def _checked_out(self, out: np.ndarray | None, wanted: int) -> np.ndarray:
        shape = (wanted, self.model.head.rows)
        if out is None:
            return np.empty(shape, np.float32)
        fits = out.dtype == np.float32 and out.shape == shape
        fits = fits and out.flags.c_contiguous and out.flags.writeable and out.flags.aligned
        expected = f"writable float32 {shape}, C-contiguous and aligned"
        _check(fits, "out", expected, f"{out.dtype} {out.shape}", "Leave it out to get a new array.")
        return out

    def _checked_rows(self, ids, slots, positions, cache: KVCache, wanted) -> tuple[np.ndarray, np.ndarray]:
        """int64 (3, N) of ids, slots, positions; int64 (wanted,)."""
        model, count = self.model, len(ids)
        _check(count >= 1, "ids", "at least one row", "none", "Give a token.")
        for name, values in (("slots", slots), ("positions", positions)):
            _check(len(values) == count, name, f"{count} numbers, one for each id", len(values))
        _check(cache.shape == self._shape, "cache", f"(layers, heads, width) = {self._shape}", cache.shape,
               "Make one of this model.")  # fmt: skip
        rows = np.array((ids, slots, positions), np.int64)
        wanted = np.arange(count) if wanted is None else np.array(wanted, np.int64).reshape(-1)
        if len(wanted) > 1:
            _check(bool((np.diff(wanted) > 0).all()), "wanted", "rising row numbers", wanted.tolist(), "Sort them.")
        lows = highs = rows[:, 0].tolist()
        if count > 1:
            lows, highs = rows.min(axis=1).tolist(), rows.max(axis=1).tolist()
        if len(wanted):
            lows, highs = [*lows, int(wanted[0])], [*highs, int(wanted[-1])]
        limits = (
            ("ids", model.embedding.rows, "Use this model's tokenizer."),
            ("slots", cache.slots, "Give the cache more slots."),
            ("positions", cache.capacity, "Give the cache a larger capacity, or shorten the text."),
            ("wanted", count, "Name rows of this call."),
        )
        for (name, limit, do), low, high in zip(limits, lows, highs, strict=False):
            if low < 0 or high >= limit:
                _check(False, name, f"0 to {limit - 1}", low if low < 0 else high, do)
        if count > 1:
            order = np.argsort(rows[1], kind="stable")
            same, rising = np.diff(rows[1, order]) == 0, np.diff(rows[2, order]) > 0
            if not (rising | ~same).all():
                slot = rows[1, order][1:][same & ~rising][0]
                got = f"{rows[2, rows[1] == slot].tolist()[:8]} in slot {slot}"
                _check(False, "positions", "rising positions in each slot", got, "Order the rows.")
        return rows, wanted

    # --- describing the model -----------------------------------------------------------------------------------------

    def _describe_model(self) -> None:
        model, record = self.model, self._model[0]
        hidden, width = model.embedding.columns, model.head_dim
        _check(len(model.layers) >= 1, "layers", "at least one", 0, "Give the model's layers.")
        _check(width >= 2 and width % 2 == 0, "head_dim", "an even number", width)
        _check(
            model.num_key_value_heads >= 1 and model.num_attention_heads % model.num_key_value_heads == 0,
            "num_attention_heads", f"a multiple of {model.num_key_value_heads} key/value heads",
            model.num_attention_heads,
        )  # fmt: skip
        _check(model.activation in ACTIVATIONS, "activation", f"one of {', '.join(ACTIVATIONS)}", model.activation,
               "Use another model.")  # fmt: skip
        _check(len(model.ropes) >= 1, "ropes", "at least one", 0, "Give (inv_freq, scaling).")
        self._describe_table("embedding", model.embedding, hidden, record["embedding"])
        self._describe_table("head", model.head, hidden, record["head"])
        record["final_norm"] = self._gain("final_norm", model.final_norm, hidden)
        frequencies = np.empty((len(model.ropes), width // 2 + 1), np.float32)
        for row, (inv_freq, scaling) in zip(frequencies, model.ropes, strict=True):
            _check(inv_freq.shape == (width // 2,), "ropes", f"{width // 2} frequencies", inv_freq.shape)
            row[:-1], row[-1] = inv_freq, scaling
        record["inv_freq"] = self._kept(frequencies)
        record["vocabulary"], record["hidden"], record["ropes"] = model.head.rows, hidden, len(model.ropes)
        record["layers"] = len(model.layers)
        record["intermediate"] = model.layers[0].gate.out_features
        record["heads"], record["kv_heads"] = model.num_attention_heads, model.num_key_value_heads
        record["head_dim"], record["activation"] = width, ACTIVATIONS[model.activation]
        record["eps"], record["attention_scale"] = model.eps, model.attention_scale
        record["embedding_scale"] = model.embedding_scale
        for index, layer in enumerate(model.layers):
            self._describe_layer(f"layers[{index}]", layer, self._layers[index])

    def _describe_layer(self, where: str, layer: Layer, record: np.void) -> None:
        model = self.model
        hidden, middle = model.embedding.columns, model.layers[0].gate.out_features
        mixed, kept = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
        shapes = {"q": (mixed, hidden), "k": (kept, hidden), "v": (kept, hidden), "o": (hidden, mixed)}
        shapes |= {"gate": (middle, hidden), "up": (middle, hidden), "down": (hidden, middle)}
        for name, shape in shapes.items():
            self._describe_projection(f"{where}.{name}", getattr(layer, name), shape, record[name])
        for names in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)):
            plain = None  # projections that take their input as it is read the same codes
            for fresh, name in enumerate(names):
                as_it_is = getattr(layer, name).subln is None and getattr(layer, name).input_scale is None
                if as_it_is and plain is not None:
                    record[name]["codes"], record[name]["own_codes"] = plain, 0
                else:
                    record[name]["codes"], record[name]["own_codes"] = fresh, 1
                    plain = fresh if as_it_is else plain
        for name in records.NORM_NAMES:
            gain, width = getattr(layer, name), model.head_dim if name in ("q_norm", "k_norm") else hidden
            record[name] = 0 if gain is None else self._gain(f"{where}.{name}", gain, width)
        _check(0 <= layer.rope < len(model.ropes), f"{where}.rope", f"0 to {len(model.ropes) - 1}", layer.rope)
        _check(layer.window is None or layer.window >= 1, f"{where}.window", "at least 1, or None", layer.window)
        record["rope"], record["window"] = layer.rope, layer.window or 0

    def _describe_projection(self, where: str, projection: Projection, shape: tuple, record: np.void) -> None:
        got = (projection.out_features, projection.in_features)
        _check(got == shape, where, f"(out_features, in_features) = {shape}", got)
        _check(projection.packing in packing.PACKINGS, f"{where}.packing", f"one of {', '.join(packing.PACKINGS)}",
               projection.packing, "Pack it again.")  # fmt: skip
        size = packing.packed_bytes(*shape, projection.packing)
        record["weight"] = self._array(f"{where}.weight", projection.weight, np.uint8, (size,))
        record["packing"] = records.MATRIX_FORMATS.index(projection.packing)
        record["out_features"], record["in_features"] = shape
        self._describe_scales(where, projection, record)
        record["act_blocks"] = projection.act_blocks
        if projection.bias is not None:
            record["bias"] = self._gain(f"{where}.bias", projection.bias, shape[0])
        if projection.subln is not None:
            _check(projection.subln_eps is not None, f"{where}.subln_eps", "a number", None, "Give it.")
            record["subln"] = self._gain(f"{where}.subln", projection.subln, shape[1])
            record["subln_eps"] = projection.subln_eps
        if projection.input_scale is not None:
            record["input_scale"] = self._gain(f"{where}.input_scale", projection.input_scale, shape[1], 1)

    def _describe_scales(self, where: str, projection: Projection, record: np.void) -> None:
        if projection.group_size is None:
            record["weight_scale"] = projection.weight_scale
            return
        groups = -(-projection.in_features // projection.group_size)
        fits = groups == 1 or projection.group_size in records.GROUP_COLUMNS
        allowed = ", ".join(map(str, records.GROUP_COLUMNS))
        _check(fits, f"{where}.group_size", f"one of {allowed}", projection.group_size, "Export the student again.")
        shape = (packing.row_groups(projection.out_features), groups, packing.BLOCK_ROWS)
        record["scales"] = self._array(f"{where}.weight_scale", projection.weight_scale, np.float16, shape)
        record["group_size"] = 0 if groups == 1 else projection.group_size

    def _describe_table(self, where: str, table: Table, hidden: int, record: np.void) -> None:
        _check(
            table.format in records.MATRIX_FORMATS,
            f"{where}.format",
            f"one of {', '.join(records.MATRIX_FORMATS)}",
            table.format,
            "Pack it again.",
        )
        _check(table.columns == hidden, f"{where}.columns", hidden, table.columns)
        record["format"] = records.MATRIX_FORMATS.index(table.format)
        if table.format == "fp16":
            record["weight"] = self._array(f"{where}.weight", table.weight, np.float16, (table.rows, hidden))
            return
        number = np.int8 if table.format == "int8" else np.uint8
        size = packing.packed_bytes(table.rows, hidden, table.format)
        record["weight"] = self._array(f"{where}.weight", table.weight, number, (size,))
        if table.format == "int4":
            shape = (packing.row_groups(table.rows), hidden // packing.INT4_GROUP, packing.BLOCK_ROWS)
            record["scale"] = self._array(f"{where}.scale", table.scale, np.float16, shape)
        else:
            record["scale"] = self._array(f"{where}.scale", table.scale, np.float32, (table.rows,))

    def _array(self, where: str, array: np.ndarray, dtype: type, shape: tuple) -> int:
        """Address of a checked array, which is used without a copy."""
        expected, got = f"{np.dtype(dtype)} {shape}, C-contiguous", "none"
        if array is not None:
            got = f"{array.dtype} {array.shape}"
        fits = array is not None and array.dtype == dtype and array.shape == shape and array.flags.c_contiguous
        _check(fits, where, expected, got, "Pack it again.")
        self._keep.append(array)
        return array.ctypes.data

    def _gain(self, where: str, gain: np.ndarray, width: int, padding: float = 0) -> int:
        """Address of a copy of a float32 vector, padded with zeros or another number."""
        fits = gain.dtype == np.float32 and gain.shape == (width,)
        _check(fits, where, f"float32 ({width},)", f"{gain.dtype} {gain.shape}")
        copy = np.full(self._compiled.padded(width), padding, np.float32)
        copy[:width] = gain
        return self._kept(copy)

    def _kept(self, array: np.ndarray) -> int:
        self._keep.append(array)
        self.scratch_bytes += array.nbytes
        return array.ctypes.data

    # --- working memory -----------------------------------------------------------------------------------------------

    def _allocate(self) -> None:
        """One zeroed array for all working memory, in pieces that begin at multiples of 64 bytes."""
        model, scratch, rows = self.model, self._scratch[0], ROWS_PER_BLOCK
        hidden, middle = model.embedding.columns, model.layers[0].gate.out_features
        mixed, kept = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
        wide = {name: 4 * self._compiled.padded(size) for name, size in
                (("x", hidden), ("attended", mixed), ("gate", middle), ("up", middle), ("out", hidden))}  # fmt: skip
        wide["qkv"] = 4 * (self._compiled.padded(mixed) + 2 * self._compiled.padded(kept))
        record = self._compiled.record_bytes(max(hidden, middle, mixed))
        angles = 4 * len(model.ropes) * model.head_dim // 2
        group = model.num_attention_heads // model.num_key_value_heads
        widest = max(wide[name] for name in ("x", "attended", "gate"))
        private = {
            "p_x": wide["x"], "p_row": widest, "p_row2": widest, "p_records": 3 * record, "p_cos": angles, "p_sin": angles,
            "p_acc": 4 * max(records.ACC_WORDS, records.GROUP * rows), "p_product": self._compiled.SCRATCH_BYTES,
            "p_attention": 4 * self._compiled.attention_scratch_floats(group, model.head_dim), "p_tiles": 8 * (rows + 1),
        }  # fmt: skip
        shared = {name: rows * size for name, size in wide.items()}
        shared |= {"records": 3 * rows * record, "cos": rows * angles, "sin": rows * angles}
        shared["arrived"] = 8 * records.SPREAD * self.threads
        at = 0
        for name, size in private.items():
            scratch[name] = at
            at += _aligned(size)
        scratch["private_bytes"] = _aligned(at, 4096)
        shared["private"] = self.threads * _aligned(at, 4096)
        size = sum(_aligned(size) for size in shared.values()) + ALIGNMENT
        memory = np.zeros(size, np.uint8)
        at = _aligned(self._kept(memory))
        for name, size in shared.items():
            scratch[name] = at
            at += _aligned(size)
        scratch["rows"], scratch["record_bytes"] = rows, record
        start = scratch["arrived"] - memory.ctypes.data
        self._arrived = memory[start : start + 8 * records.SPREAD * self.threads].view(np.int64)
        self._parts, self._room_for = np.zeros(0, np.float32), (0, 0)  # grows with the cache


def _aligned(size: int, to: int = ALIGNMENT) -> int:
    return -(-size // to) * to


def _zeros(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Zeros that begin at a cache line, as rows of tiles should."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _check(fits: bool, field: str, expected: object, got: object, do: str = "") -> None:
    if not fits:
        raise ValueError(f"{field}: expected {expected}; got {got}. {do}".rstrip())
