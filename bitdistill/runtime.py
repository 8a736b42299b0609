"""CPU inference from a packed student file: numpy, Numba and `tokenizers`; neither torch nor transformers is imported.

    ids -> embedding -> per layer: norm, q k v, RoPE, KV cache, attention, o; norm, gate up, act, down -> norm -> head

Each projection is ``acc * (act_scale * weight_scale) + bias`` with exact integers ``acc``, as in kernels/reference.py.
All else is fp32, as transformers computes it. One sequence at a time; prompts go through in pieces of PREFILL_TOKENS.

A first version, plain: base-3 files are repacked to 2 bits when they are opened, and the LM head is kept as fp32 for
BLAS. `resident_bytes` says what that costs.
Shape suffixes: T new positions, S cached positions, H heads, K key/value heads, G heads a key/value head, D head width.
"""

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from threadpoolctl import ThreadpoolController
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from bitdistill.errors import UserError
from bitdistill.export.packed import PackedModel, read_packed
from bitdistill.kernels.cpu_matmul import pack_2bit, quantize_activation, ternary_accumulate

PREFILL_TOKENS = 256  # bounds the attention scores of a long prompt: heads x 256 x positions floats


class Cache:
    """Keys (after norm and RoPE) and values of the positions so far: float32 (layers, K, capacity, D)."""

    def __init__(self, layers: int, heads: int, head_dim: int, capacity: int):
        self.keys = np.empty((layers, heads, capacity, head_dim), np.float32)
        self.values = np.empty_like(self.keys)
        self.capacity = capacity
        self.length = 0


@dataclass(frozen=True)
class _Projection:
    """A ternary linear, ready to run."""

    packed: np.ndarray  # uint8 (O, ceil(I / 4))
    weight_scale: np.float32
    bias: np.ndarray | None
    subln: np.ndarray | None
    subln_eps: float | None


class Runtime:
    """A student from a packed file.

    Args:
        path: a file of `export.packed.write_packed`.
        threads: of the ternary products and of BLAS; all cores that the process may use by default.

    Attributes:
        model: the open file (`PackedModel`): config, metadata, tensors.
        tokenizer: `tokenizers.Tokenizer`, or None when the file has none.
        file_bytes: size of the file. resident_bytes: arrays that this object holds in memory beside the file's own
            pages, of which it uses biases, norms, embedding rows and, in a 2-bit file, the weights.
        stats: of the last `generate`: prompt_tokens, new_tokens, prompt_seconds, decode_seconds, stopped_by
            ("eos" | "length" | "context" | "stop").

    Raises:
        UserError: the file cannot be used (see `read_packed`), or threads is below 1.
    """

    def __init__(self, path: str | Path, threads: int | None = None):
        if threads is not None and threads < 1:
            raise UserError("threads", expected="at least 1", got=str(threads), do="Leave it out to use all cores.")
        self.model: PackedModel = read_packed(path)
        self.threads = threads or _usable_cores()
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None
        self._blas = ThreadpoolController()
        config, tensors = self.model.config, self.model.tensors
        text = self.model.tokenizer_json()
        self.tokenizer = Tokenizer.from_str(text) if text else None
        self.file_bytes = self.model.file_bytes
        self._head = self.model.table(config.tables()[-1])
        self.resident_bytes = self._head.nbytes
        self._linears: dict[str, _Projection] = {}
        for name, linear in config.linears.items():
            packed = pack_2bit(self.model.weight_codes(name))
            self.resident_bytes += packed.nbytes
            self._linears[name] = _Projection(
                packed,
                tensors[f"{name}.weight_scale"][()],
                tensors.get(f"{name}.bias"),
                tensors.get(f"{name}.subln"),
                linear.subln_eps,
            )
        self.stats: dict = {}

    # --- tokens -> logits ---------------------------------------------------------------------------------------------

    def new_cache(self, capacity: int) -> Cache:
        """An empty KV cache for `capacity` positions: 8 * layers * K * D bytes each."""
        config = self.model.config
        return Cache(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, capacity)

    def logits(self, input_ids: Sequence[int], last_only: bool = False, cache: Cache | None = None) -> np.ndarray:
        """Next-token logits.

        Args:
            input_ids: T token ids that follow the positions in `cache`.
            last_only: only those of the last position, which saves the LM head for the others.
            cache: extended by T positions; without one the ids are a whole text.

        Returns: float32 (T, V), or (1, V) for last_only.

        Raises:
            UserError: no ids, an id outside the vocabulary, or more positions than the model's context (or the cache).
        """
        ids = self._checked_ids(input_ids)
        if cache is None:
            cache = self.new_cache(len(ids))
        limit = min(cache.capacity, self.model.config.max_position_embeddings)
        if cache.length + len(ids) > limit:
            raise UserError(
                "prompt", expected=f"at most {limit} tokens", got=str(cache.length + len(ids)), do="Shorten the text."
            )
        rows = []
        with self._blas.limit(limits=self.threads, user_api="blas"):
            for start in range(0, len(ids), PREFILL_TOKENS):
                piece = ids[start : start + PREFILL_TOKENS]
                hidden = self._decode(piece, cache)
                if last_only and start + PREFILL_TOKENS < len(ids):
                    continue
                hidden = self._norm("model.norm", hidden[-1:] if last_only else hidden)
                rows.append(hidden @ self._head.T)
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def _checked_ids(self, input_ids: Sequence[int]) -> np.ndarray:
        ids = np.asarray(input_ids, np.int64).reshape(-1)
        vocabulary = self.model.config.vocab_size
        if len(ids) == 0:
            raise UserError("prompt", expected="at least one token", got="none", do="Give a text.")
        if ids.min() < 0 or ids.max() >= vocabulary:
            bad = ids[(ids < 0) | (ids >= vocabulary)][0]
            raise UserError(
                "prompt", expected=f"token ids below {vocabulary}", got=str(bad), do="Use this student's tokenizer."
            )
        return ids

    def _decode(self, ids: np.ndarray, cache: Cache) -> np.ndarray:
        """The decoder layers over T new positions: float32 (T, hidden), before the last norm."""
        config, tensors = self.model.config, self.model.tensors
        positions = np.arange(cache.length, cache.length + len(ids), dtype=np.float32)
        rope = {}
        for kind in set(config.rope):
            angles = positions[:, None] * tensors[f"rope.{kind}.inv_freq"]
            scaling = tensors[f"rope.{kind}.attention_scaling"]
            rope[kind] = (np.cos(angles) * scaling, np.sin(angles) * scaling)
        x = self.model.table("model.embed_tokens", ids) * np.float32(config.embedding_scale)
        gemma = config.model_type == "gemma3_text"  # its two further norms stand behind attention and MLP
        for index in range(config.num_hidden_layers):
            layer = f"model.layers.{index}"
            y = self._attention(
                layer, index, self._norm(f"{layer}.input_layernorm", x), rope[config.rope[index]], cache
            )
            if gemma:
                y = self._norm(f"{layer}.post_attention_layernorm", y)
            x = x + y
            before_mlp = "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
            y = self._mlp(f"{layer}.mlp", self._norm(f"{layer}.{before_mlp}", x))
            if gemma:
                y = self._norm(f"{layer}.post_feedforward_layernorm", y)
            x = x + y
        cache.length += len(ids)
        return x

    def _attention(self, layer: str, index: int, x: np.ndarray, rope: tuple, cache: Cache) -> np.ndarray:
        config = self.model.config
        tokens, kv_heads, width = len(x), config.num_key_value_heads, config.head_dim
        q, k, v = self._project(x, [f"{layer}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")])
        q_THD, k_TKD, v_TKD = (y.reshape(tokens, -1, width) for y in (q, k, v))
        if f"{layer}.self_attn.q_norm" in config.norms:
            q_THD = self._norm(f"{layer}.self_attn.q_norm", q_THD)
            k_TKD = self._norm(f"{layer}.self_attn.k_norm", k_TKD)
        first, end = cache.length, cache.length + tokens
        cache.keys[index, :, first:end] = _rotate(k_TKD, *rope).transpose(1, 0, 2)
        cache.values[index, :, first:end] = v_TKD.transpose(1, 0, 2)

        window = config.window[index]
        oldest = 0 if window is None else max(0, first - window + 1)
        keys_KSD, values_KSD = cache.keys[index, :, oldest:end], cache.values[index, :, oldest:end]
        # heads of one key/value head are neighbours: (T, K, G, D) -> (K, G * T, D)
        q_KQD = _rotate(q_THD, *rope).reshape(tokens, kv_heads, -1, width).transpose(1, 2, 0, 3)
        groups = q_KQD.shape[1]
        scores = q_KQD.reshape(kv_heads, groups * tokens, width) @ keys_KSD.transpose(0, 2, 1)
        scores = scores.reshape(kv_heads, groups, tokens, end - oldest) * np.float32(config.attention_scale)
        if tokens > 1:
            age = np.arange(first, end)[:, None] - np.arange(oldest, end)  # (T, S); the future is negative
            hidden = age < 0 if window is None else (age < 0) | (age >= window)
            scores = np.where(hidden, np.float32(-np.inf), scores)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed = weights.reshape(kv_heads, groups * tokens, -1) @ values_KSD
        mixed = mixed.reshape(kv_heads, groups, tokens, width).transpose(2, 0, 1, 3).reshape(tokens, -1)
        return self._project(mixed, [f"{layer}.self_attn.o_proj"])[0]

    def _mlp(self, mlp: str, x: np.ndarray) -> np.ndarray:
        gate, up = self._project(x, [f"{mlp}.gate_proj", f"{mlp}.up_proj"])
        act = _silu if self.model.config.activation == "silu" else _gelu_tanh
        return self._project(act(gate) * up, [f"{mlp}.down_proj"])[0]

    def _project(self, x: np.ndarray, names: list[str]) -> list[np.ndarray]:
        """One x (T, I) through several BitLinears: float32 (T, O) each. Those without SubLN share the int8 codes."""
        outputs, shared = [], None
        for name in names:
            linear = self._linears[name]
            if linear.subln is not None:
                outputs.append(self.quantized_product(name, rms_norm(x, linear.subln, linear.subln_eps)))
            else:
                shared = shared or quantize_activation(x)
                outputs.append(self._product(linear, *shared))
        return outputs

    def quantized_product(self, name: str, x: np.ndarray) -> np.ndarray:
        """One BitLinear behind its SubLN: float32 (T, I) -> (T, O). Bit for bit `reference.bit_linear` on a CPU."""
        return self._product(self._linears[name], *quantize_activation(x))

    def _product(self, linear: _Projection, act_codes: np.ndarray, act_scale: np.ndarray) -> np.ndarray:
        acc = ternary_accumulate(act_codes, linear.packed, self._pool, self.threads)
        y = acc.astype(np.float32) * (act_scale * linear.weight_scale)
        return y if linear.bias is None else y + linear.bias

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return rms_norm(x, self.model.tensors[f"{name}.gain"], self.model.config.rms_norm_eps)

    # --- generation ---------------------------------------------------------------------------------------------------

    def generate_ids(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 0,
    ) -> Iterator[int]:
        """Continues a prompt, token by token; an end-of-text token ends it and is not yielded.

        Args:
            prompt_ids: token ids.
            max_new_tokens: upper bound; the model's context is another (then stats["stopped_by"] is "context").
            temperature: 0 takes the most likely token; else samples from softmax(logits / temperature).
            top_k: sample among the k most likely only; None takes all.
            seed: of the sampling.

        Raises:
            UserError: a prompt longer than the context, or settings out of range.
        """
        if temperature < 0:
            raise UserError("temperature", expected="0 or more", got=str(temperature), do="0 is greedy.")
        if top_k is not None and top_k < 1:
            raise UserError("top_k", expected="at least 1", got=str(top_k), do="Leave it out to sample from all.")
        if max_new_tokens < 1:
            raise UserError("max_new_tokens", expected="at least 1", got=str(max_new_tokens), do="Correct it.")
        prompt_ids = self._checked_ids(prompt_ids)
        context = self.model.config.max_position_embeddings
        if len(prompt_ids) > context:
            raise UserError(
                "prompt", expected=f"at most {context} tokens", got=str(len(prompt_ids)), do="Shorten the text."
            )
        rng = np.random.default_rng(seed)
        cache = self.new_cache(min(context, len(prompt_ids) + max_new_tokens))
        stats = {"prompt_tokens": len(prompt_ids), "new_tokens": 0, "decode_seconds": 0.0, "stopped_by": "length"}
        self.stats = stats
        start = time.perf_counter()
        logits = self.logits(prompt_ids, last_only=True, cache=cache)[0]
        stats["prompt_seconds"] = time.perf_counter() - start
        while True:
            token = _choose(logits, temperature, top_k, rng)
            if token in self.model.config.eos_token_ids:
                stats["stopped_by"] = "eos"
                return
            stats["new_tokens"] += 1
            yield token
            if stats["new_tokens"] == max_new_tokens:
                return
            if cache.length == context:
                stats["stopped_by"] = "context"
                return
            start = time.perf_counter()
            logits = self.logits([token], cache=cache)[0]
            stats["decode_seconds"] += time.perf_counter() - start

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """As `generate_ids`, in pieces of text. A piece ends with a whole character: bytes of a character that is not
        complete yet are held back, and so is text that may turn out to be the beginning of a stop string.

        Args:
            prompt: text (encoded with the tokenizer's special tokens) or token ids.
            stop: a string, or several, that end the answer; they are not part of it.

        Raises:
            UserError: as `generate_ids`, or the file has no tokenizer.
        """
        if self.tokenizer is None:
            raise UserError(
                "file",
                expected="a packed file with a tokenizer",
                got=f"{self.model.path} without one",
                do="Use generate_ids, or export it again with the tokenizer.",
            )
        stop = [word for word in ([stop] if isinstance(stop, str) else stop) if word]
        ids = self.tokenizer.encode(prompt).ids if isinstance(prompt, str) else list(prompt)
        stream = DecodeStream(ids=ids, skip_special_tokens=True)
        new_ids, emitted, text = [], 0, ""
        for token in self.generate_ids(ids, max_new_tokens, temperature, top_k, seed):
            new_ids.append(token)
            text += stream.step(self.tokenizer, token) or ""
            found = [text.find(word) for word in stop if word in text]
            if found:
                self.stats["stopped_by"] = "stop"
                text = text[: min(found)]
                break
            safe = len(text) - _may_begin(text, stop)
            if safe > emitted:
                yield text[emitted:safe]
                emitted = safe
        else:
            # What the stream still held back: bytes that never became a character read as U+FFFD.
            whole = self.tokenizer.decode(ids + new_ids)[len(self.tokenizer.decode(ids)) :]
            text = whole if whole.startswith(text) else text
        if len(text) > emitted:
            yield text[emitted:]


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _may_begin(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of `stop`."""
    lengths = [size for word in stop for size in range(1, len(word)) if text.endswith(word[:size])]
    return max(lengths, default=0)


def _choose(logits: np.ndarray, temperature: float, top_k: int | None, rng: np.random.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    if top_k is not None and top_k < len(scaled):
        scaled[scaled < np.partition(scaled, -top_k)[-top_k]] = -np.inf
    weights = np.exp(scaled - scaled.max())
    return int(rng.choice(len(weights), p=weights / weights.sum()))


def rms_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    """``x / sqrt(mean(x^2) + eps) * gain`` over the last dimension."""
    return x * (np.float32(1) / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + eps)) * gain


def _rotate(x_THD: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """RoPE as in transformers: dimension d turns with d + D/2. cos, sin: (T, D/2)."""
    cos, sin = cos[:, None], sin[:, None]
    half = x_THD.shape[-1] // 2
    low, high = x_THD[..., :half], x_THD[..., half:]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def _silu(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, 0
        return x / (np.float32(1) + np.exp(-x))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    inner = np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (np.float32(1) + np.tanh(inner))
