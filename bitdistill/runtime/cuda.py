"""GPU inference from a packed student file: the same function as cpu.py, on kernels/gpu/decoder.py.

Weights stay packed: ternary codes are converted to the GPU's 2-bit layout one projection at a time, and the whole model is
never unpacked. A prompt is processed in pieces of PREFILL_TOKENS, with the same kernels as a step. A step replays a CUDA
graph. With greedy decoding the graph also chooses the next token, so that the GPU works on it while the caller handles the
last one.

The KV cache is bfloat16 by default; "fp32" is there for comparisons. Everything else is as exact as on a CPU: integers bit
for bit, and fp32 around them.
"""

import importlib.util
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from bitdistill.errors import UserError
from bitdistill.kernels import packing as layout
from bitdistill.runtime.base import BaseRuntime, cache_capacity, check_new_tokens
from bitdistill.runtime.batching import Stats
from bitdistill.runtime.decoder_parts import layer_norms, model_numbers
from bitdistill.runtime.packed_file import PackedModel, read_packed
from bitdistill.runtime.sampling import Sampler, Sampling

PREFILL_TOKENS = 512
TABLE_ROWS = 4_096  # rows of an embedding that are unpacked at once while it is loaded
KV_CACHES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MIN_CAPABILITY = (7, 5)  # int8 tensor cores


def usable_device(name: str) -> torch.device:
    """The device of a name, if kernels can run there.

    Args:
        name: "cuda", "cuda:1", ...; "cpu" only where Triton interprets (TRITON_INTERPRET=1, for tests).

    Raises:
        UserError: no such GPU, one without int8 tensor cores, or no Triton.
    """

    def refuse(got: str) -> UserError:
        wanted = "an NVIDIA GPU with capability >= 7.5"
        return UserError("device", expected=wanted, got=got, do='Use the CPU runtime (device "cpu").')

    try:
        device = torch.device(name)
    except RuntimeError:
        raise refuse(repr(name)) from None
    if importlib.util.find_spec("triton") is None:
        raise refuse(f"{name} on a machine without Triton")
    import triton

    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return device
    if device.type != "cuda":
        raise refuse(repr(name))
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise refuse(f"{name} on a machine with {torch.cuda.device_count()} usable GPUs")
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        raise refuse(f"{torch.cuda.get_device_name(device)} with {capability[0]}.{capability[1]}")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


class CudaRuntime(BaseRuntime):
    """A student from a packed file, on a GPU.

    Args:
        path: a file of `export.write.write_packed`.
        device: "cuda", or one of several, "cuda:1".
        context: at most so many positions; the model's own limit by default.
        kv_cache: how keys and values are kept: "bf16" or "fp32".

    Attributes:
        model: the open file (`PackedModel`): config, metadata, tensors.
        tokenizer: `tokenizers.Tokenizer`, or None when the file has none.
        file_bytes: size of the file. device_bytes: weights, scales, tables, norms and biases on the GPU.
        weight_bytes: what a step reads of those, all but an embedding that is not the head.
        stats: `Stats` of the last call that generated.

    Raises:
        UserError: the file cannot be used (see `read_packed`), no usable GPU, or settings out of range.
    """

    def __init__(self, path: str | Path, device: str = "cuda", context: int | None = None, kv_cache: str = "bf16"):
        self.device = usable_device(device)
        if kv_cache not in KV_CACHES:
            raise UserError(
                "kv_cache", expected=f"one of {', '.join(KV_CACHES)}", got=repr(kv_cache), do="Choose one of these."
            )
        self.model: PackedModel = read_packed(path)
        longest = self.model.config.max_position_embeddings
        if context is not None and not 1 <= context <= longest:
            do = "Leave it out for the model's own context."
            raise UserError("context", expected=f"1 to {longest:,} positions", got=f"{context:,}", do=do)
        self.context = context or longest
        self.file_bytes = self.model.file_bytes
        self._cache_dtype = KV_CACHES[kv_cache]
        self._weights, self.device_bytes = _load(self.model, self.device)
        tied = self._weights.head is self._weights.embedding
        self.weight_bytes = self.device_bytes - (0 if tied else self._weights.embedding.nbytes)
        self._free: list = []  # sequences that nobody decodes now
        self._busy: list = []
        self.stats = Stats()

    @property
    def cache_bytes(self) -> int:
        """Keys and values of the sequences so far, for their whole capacity."""
        return sum(sequences.nbytes for sequences in self._free + self._busy)

    # --- tokens -> logits ---------------------------------------------------------------------------------------------

    def logits(self, input_ids: Sequence[int], last_only: bool = False) -> np.ndarray:
        """Next-token logits of a text.

        Args:
            input_ids: T token ids.
            last_only: only those of the last position, which saves the LM head for the others.

        Returns: float32 (T, V), or (1, V) for last_only.

        Raises:
            UserError: no ids, an id outside the vocabulary, or more positions than the context.
        """
        ids = self._checked_ids(input_ids, limit=self.context)
        with self._sequences(1, len(ids)) as sequences:
            if last_only:
                return self._prompt(sequences, ids, 0).cpu().numpy()
            rows = [sequences.prompt(piece, 0, first, "all").cpu().numpy() for first, piece in _pieces(ids)]
            return np.concatenate(rows)

    def _prompt(self, sequences, ids: list[int], slot: int) -> torch.Tensor:
        """Takes a prompt in: the logits of its last token, float32 (1, V) on the device."""
        *before, (first, piece) = _pieces(ids)
        for start, others in before:
            sequences.prompt(others, slot, start, "none")
        return sequences.prompt(piece, slot, first, "last")

    @contextmanager
    def _sequences(self, count: int, positions: int):
        """Slots for `count` sequences of so many positions, with a graph perhaps captured before; for one user."""
        from bitdistill.kernels.gpu.decoder import Sequences

        found = next((free for free in self._free if free.count == count and free.capacity >= positions), None)
        if found is None:
            self._free = [free for free in self._free if free.count != count]  # too short now: their memory goes
            capacity = cache_capacity(positions, self.context)
            found = Sequences(self._weights, count, capacity, self._cache_dtype)
        else:
            self._free.remove(found)
        self._busy.append(found)
        try:
            yield found
        finally:
            self._busy.remove(found)
            self._free.append(found)

    # --- generation ---------------------------------------------------------------------------------------------------

    def generate_ids(
        self, prompt_ids: Sequence[int], max_new_tokens: int = 128, sampling: Sampling | None = None
    ) -> Generator[int, None, None]:
        """`BaseRuntime.generate_ids`. Greedy decoding chooses on the GPU."""
        ids = self._checked_ids(prompt_ids, limit=self.context)
        check_new_tokens(max_new_tokens)
        sampling = sampling or Sampling()
        greedy = sampling.temperature == 0 and sampling.repetition_penalty == 1
        sampler = None if greedy else Sampler(sampling, ids, self.model.config.vocab_size)
        stats = self.stats = Stats(prompt_tokens=len(ids), weight_bytes=self.weight_bytes)
        eos = set(self.model.config.eos_token_ids)
        with self._sequences(1, min(self.context, len(ids) + max_new_tokens)) as sequences:
            stats.kv_cache_bytes = sequences.nbytes
            sequences.prepare()
            start = time.perf_counter()
            logits = self._prompt(sequences, ids, 0)
            token = int(sequences.ids[0]) if greedy else sampler.choose(logits[0].cpu().numpy())
            stats.prompt_seconds = time.perf_counter() - start
            while token not in eos:
                stats.new_tokens += 1
                position = len(ids) + stats.new_tokens - 1  # where this token would be taken in
                if stats.new_tokens == max_new_tokens or position == self.context:
                    stats.stopped_by = "length" if stats.new_tokens == max_new_tokens else "context"
                    yield token
                    return
                start = time.perf_counter()
                if not greedy:
                    sequences.ids.fill_(token)
                sequences.step()  # the GPU works while the caller has the token
                stats.decode_seconds += time.perf_counter() - start
                yield token
                start = time.perf_counter()
                token = int(sequences.ids[0]) if greedy else sampler.choose(sequences.logits[0].cpu().numpy())
                stats.decode_seconds += time.perf_counter() - start
                self._count_step(stats, [position])
            stats.stopped_by = "eos"

    def _count_step(self, stats: Stats, positions: list[int]) -> None:
        """A step of sequences that stood at these positions."""
        config = self.model.config
        token_bytes = 2 * config.num_key_value_heads * config.head_dim * self._cache_dtype.itemsize
        seen = sum(min(window or position + 1, position + 1) for window in config.window for position in positions)
        stats.decode_steps += 1
        stats.decoded_tokens += len(positions)
        stats.kv_read_bytes += token_bytes * seen

    def greedy_batch(self, prompts: Sequence[Sequence[int]], max_new_tokens: int = 128) -> list[list[int]]:
        """Greedy continuations of several prompts, decoded together.

        Args:
            prompts: token ids of each.
            max_new_tokens: of each, at most; the context is another bound.

        Returns: the new ids of each prompt, without an end-of-text token.
        """
        checked = [self._checked_ids(ids, limit=self.context) for ids in prompts]
        check_new_tokens(max_new_tokens)
        eos = set(self.model.config.eos_token_ids)
        room = [min(max_new_tokens, self.context - len(ids) + 1) for ids in checked]
        stats = self.stats = Stats(prompt_tokens=sum(map(len, checked)), weight_bytes=self.weight_bytes)
        answers: list[list[int]] = [[] for _ in checked]
        if not checked:
            return answers
        longest = max(min(self.context, len(ids) + max_new_tokens) for ids in checked)
        with self._sequences(len(checked), longest) as sequences:
            stats.kv_cache_bytes = sequences.nbytes
            sequences.prepare()
            start = time.perf_counter()
            for slot, ids in enumerate(checked):
                self._prompt(sequences, ids, slot)
            tokens = sequences.ids.tolist()
            stats.prompt_seconds = time.perf_counter() - start
            start = time.perf_counter()
            running = set(range(len(checked)))
            while True:
                for slot in sorted(running):
                    if tokens[slot] in eos:
                        running.remove(slot)
                        stats.stopped_by = "eos"
                        continue
                    answers[slot].append(tokens[slot])
                    if len(answers[slot]) == room[slot]:
                        running.remove(slot)
                        stats.stopped_by = "length" if room[slot] == max_new_tokens else "context"
                if not running:
                    break
                positions = [len(checked[slot]) + len(answers[slot]) - 1 for slot in running]
                sequences.step()  # of sequences that have ended, too: their rows are computed and left
                tokens = sequences.ids.tolist()
                self._count_step(stats, positions)
            stats.decode_seconds = time.perf_counter() - start
        stats.new_tokens = sum(map(len, answers))
        return answers


def _pieces(ids: list[int]) -> list[tuple[int, list[int]]]:
    """(first position, ids) of the pieces in which a prompt is taken in."""
    return [(first, ids[first : first + PREFILL_TOKENS]) for first in range(0, len(ids), PREFILL_TOKENS)]


# --- file -> device ---------------------------------------------------------------------------------------------------


def _load(model: PackedModel, device: torch.device):
    """(decoder.Model, bytes on the device) of an open file."""
    from bitdistill.kernels.gpu.decoder import Layer, Model

    config, tensors = model.config, model.tensors

    def moved(array: np.ndarray | None) -> torch.Tensor | None:
        return None if array is None else torch.from_numpy(np.array(array)).to(device)  # a copy: the map is read-only

    layers, gains = [], []
    for index in range(config.num_hidden_layers):
        attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
        norms = {name: moved(gain) for name, gain in layer_norms(model, index).items()}
        gains += [gain for gain in norms.values() if gain is not None]
        q_norm, k_norm = norms.pop("q_norm"), norms.pop("k_norm")
        layers.append(
            Layer(
                **norms,
                qkv=_group(model, [f"{attention}.{name}_proj" for name in "qkv"], device),
                qk_norms=None if q_norm is None else (q_norm, k_norm),
                o=_group(model, [f"{attention}.o_proj"], device),
                gate_up=_group(model, [f"{mlp}.gate_proj", f"{mlp}.up_proj"], device),
                down=_group(model, [f"{mlp}.down_proj"], device),
                rope=config.rope[index],
                window=config.window[index],
            )
        )
    tables = [_table(model, name, device) for name in config.tables()]
    rope = {
        kind: (moved(tensors[f"rope.{kind}.inv_freq"]), float(tensors[f"rope.{kind}.attention_scaling"]))
        for kind in set(config.rope)
    }
    final_norm = moved(tensors["model.norm.gain"])
    on_device = Model(
        layers=tuple(layers),
        embedding=tables[0],
        head=tables[-1],
        final_norm=final_norm,
        **model_numbers(config),
        rope=rope,
    )
    groups = [group for layer in layers for group in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    return on_device, sum(part.nbytes for part in (*groups, *tables, *gains, final_norm))


def _group(model: PackedModel, names: list[str], device: torch.device):
    """Projections that read one input, packed for the GPU."""
    from bitdistill.kernels.gpu.decode import pack_2bit
    from bitdistill.kernels.gpu.decode_groups import pack_groups
    from bitdistill.kernels.gpu.decoder import Group

    config, tensors = model.config, model.tensors
    linears = [config.linears[name] for name in names]
    epsilons = {linear.subln_eps for linear in linears}
    assert len(epsilons) == 1, f"{names}: some have a SubLN, some not, or of another eps: {epsilons}"
    subln_eps = epsilons.pop()
    columns, blocks = config.scale_columns(linears[0]), config.act_scale == "block"
    grouped = columns is not None and columns < linears[0].in_features
    codes = [torch.from_numpy(model.weight_codes(name)).to(device) for name in names]
    scales = [model.weight_scales(name) for name in names]
    if not grouped:  # one for each row
        scales = [np.broadcast_to(s.reshape(-1), (l.out_features,)) for s, l in zip(scales, linears, strict=True)]
    scales = [torch.from_numpy(np.array(scale)).to(device) for scale in scales]
    subln = input_scale = bias = None
    if subln_eps is not None:
        subln = torch.from_numpy(np.stack([tensors[f"{name}.subln"] for name in names])).to(device)
    if any(linear.input_scale for linear in linears):
        ones = np.ones(linears[0].in_features, np.float32)
        divisors = [tensors.get(f"{name}.input_scale", ones) for name in names]
        input_scale = torch.from_numpy(np.stack(divisors)).to(device)
    if subln is None and input_scale is None:  # all read the same codes
        codes, scales = [torch.cat(codes)], [torch.cat(scales)]
    if any(linear.bias for linear in linears):
        parts = [
            tensors.get(f"{n}.bias", np.zeros(l.out_features, np.float32)) for n, l in zip(names, linears, strict=True)
        ]
        bias = torch.from_numpy(np.concatenate(parts)).to(device)
    if grouped or blocks:
        group = columns if grouped else 0
        matrices, weight_scale = tuple(pack_groups(*pair, group) for pair in zip(codes, scales, strict=True)), None
    else:
        matrices, weight_scale = tuple(map(pack_2bit, codes)), torch.cat(scales)
    return Group(matrices, weight_scale, bias, subln, subln_eps or 0.0, input_scale, blocks)


def _table(model: PackedModel, name: str, device: torch.device):
    """An embedding or LM head in the file's format, brought over in pieces."""
    from bitdistill.kernels.gpu.decode import PackedMatrix, pack_2bit, pack_int4, pack_rows
    from bitdistill.kernels.gpu.decoder import Table

    config, tensors = model.config, model.tensors
    kind = config.packing if config.embedding == "ternary" else config.embedding
    pieces = []
    for first in range(0, config.vocab_size, TABLE_ROWS):
        rows = np.arange(first, min(first + TABLE_ROWS, config.vocab_size))
        if kind == "fp16":
            codes = np.array(tensors[f"{name}.weight"][rows[0] : rows[-1] + 1])
        else:
            codes = layout.unpack_rows(tensors[f"{name}.weight_packed"], rows, config.hidden_size, kind)
        codes = torch.from_numpy(codes).to(device)
        if kind == "int4":
            scale = np.array(layout.unpack_scales(tensors[f"{name}.weight_scale"], rows))
            pieces.append(pack_int4(codes, torch.from_numpy(scale).to(device)))
        else:
            pieces.append(pack_rows(codes) if kind in ("fp16", "int8") else pack_2bit(codes))
    data = torch.cat([piece.data for piece in pieces])
    group_scale = torch.cat([piece.group_scale for piece in pieces]) if kind == "int4" else None
    matrix = PackedMatrix(pieces[0].bits, config.vocab_size, config.hidden_size, data, group_scale)
    if kind in ("fp16", "int4"):
        return Table(matrix, None)
    return Table(matrix, torch.from_numpy(np.array(tensors[f"{name}.weight_scale"])).to(device))
