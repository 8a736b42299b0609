"""What a run needs before it is started: memory of each rank by part, time, network, disk and cost, from a config alone.

Everything is counted from the shapes of the model. For P parameters (L of them in ternary matrices), a teacher of P_t
parameters, W ranks and N tokens in a micro-step of one rank, the bytes on a rank are

    master weights   4 P        fp32; divided by W at ZeRO 3
    gradients        4 P        fp32; divided by W from ZeRO 2 on
    optimizer        8 P        the two moments of AdamW; divided by W from ZeRO 1 on; in the host's memory with --offload cpu
    DeepSpeed's copy 4 P / W    of a rank's share of the weights, flat, from ZeRO 1 on
    gathered         ZeRO 3     whole weights and gradients of a layer and of the vocabulary, while they are needed
    weight codes     L          int8, made once per optimizer step
    teacher          2 P_t      in stage 3, and in stage 2 where hidden states are compared; in half precision (4 P_t on a CPU);
                                offloaded: divided by W, in the host's memory; with --distill.teacher_cache its LM head alone
    activations      N x (the bytes that the backward pass reads per token, see `activation_bytes`)
    states           N x (the teacher's states after each layer, and with teacher forcing those that a layer reads)
    logits           one chunk of rows of the LM head with its temporaries (kernels/vocabulary.py)
    process          Python, PyTorch and the libraries; on a GPU the CUDA context, NCCL's buffers and the allocator's fragments

FLOP of a step with P_m weights in matrices: 6 P_m N, 8 P_m N with gradient checkpointing, and 2 P_t N for a teacher.
`sent_bytes` has the bytes that a rank sends per optimizer step.

Source: Rajbhandari et al., ZeRO (arXiv 1910.02054), sections 5 and 7; Korthikanti et al. (arXiv 2205.05198) for the way to
count activations, here with the tensors that this project's layers keep. `python bench/plan_check.py` compares the memory with
measured peaks.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

from bitdistill.errors import UserError

GIB = 2**30
FILLED = 0.90  # share of a device's memory that a plan uses: allocators fragment
PROCESS_BYTES = {"cuda": 1.5 * GIB, "cpu": 0.75 * GIB}
DEEPSPEED_BYTES = 0.25 * GIB  # the library and its buckets, on a CPU
PCIE_BYTES_PER_SECOND = 25e9
CHECKPOINTS_ON_DISK = 3  # two are kept while a third is written


@dataclass(frozen=True)
class Device:
    """A processor to train on.

    Args:
        kind: "cuda" or "cpu".
        memory_bytes: that one rank may use.
        flop_per_second: sustained in training.
        link_bytes_per_second: what one rank sends to the others.
        price_per_hour: of one device, in dollars; 0 where it is not known.
    """

    kind: str
    memory_bytes: float
    flop_per_second: float
    link_bytes_per_second: float
    price_per_hour: float


# Assumptions, not measurements, and each has an option: 0.4 of the data sheet's dense bf16 rate, the links of a server of
# eight, and what clouds asked for an hour in 2026.
DEVICES = {
    "A100": Device("cuda", 80e9, 0.4 * 312e12, 300e9, 1.8),
    "H100": Device("cuda", 80e9, 0.4 * 989e12, 450e9, 2.8),
    "H200": Device("cuda", 141e9, 0.4 * 989e12, 450e9, 3.5),
    "B200": Device("cuda", 180e9, 0.4 * 2250e12, 900e9, 5.5),
    "RTX4090": Device("cuda", 24e9, 0.4 * 165e12, 25e9, 0.5),
    "CPU": Device("cpu", 16e9, 0.15e12, 10e9, 0.0),
}

LIVE_PARAMETERS = 1e9  # DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance


@dataclass(frozen=True)
class Shape:
    """What the plan needs to know of a model.

    Args:
        parameters: of the whole model, a tied embedding counted once. linear_weights: in the matrices of the decoder layers.
        vocabulary, hidden, intermediate, layers: of the config.
        query_width: heads x head_dim. key_value_width: key/value heads x head_dim.
    """

    parameters: int
    linear_weights: int
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    query_width: int
    key_value_width: int

    @property
    def matrix_weights(self) -> int:
        """Weights that each token is multiplied by: the decoder's matrices and the LM head."""
        return self.linear_weights + self.vocabulary * self.hidden


@dataclass(frozen=True)
class Setting:
    """How a stage is spread over the ranks.

    Args:
        zero: ZeRO stage. offload: "cpu" for the optimizer's state (and the weights at ZeRO 3). teacher_offload: of the teacher.
        checkpointing: whether activations are computed again in the backward pass.
    """

    zero: int
    offload: bool = False
    teacher_offload: bool = False
    checkpointing: bool = False


@dataclass(frozen=True)
class Work:
    """What is to be trained.

    Args:
        student: its shape. teacher: that of the teacher, or None. ternary: False for full-precision fine-tuning.
        teacher_cached: whether what the teacher says is read from disk; then its LM head alone is in memory.
        states: whether hidden states are compared with the teacher's. forced: whether layers read them, too (teacher forcing).
        total_tokens: of the whole stage. tokens_per_micro_step: of one rank. tokens_per_step: of all ranks in an optimizer step.
    """

    student: Shape
    total_tokens: float
    tokens_per_micro_step: int
    tokens_per_step: int
    teacher: Shape | None = None
    ternary: bool = True
    teacher_cached: bool = False
    states: bool = False
    forced: bool = False


@dataclass(frozen=True)
class Plan:
    """One setting on so many devices, and what a stage takes with it.

    Args:
        setting, world_size: as asked. parts: {part: bytes} on the device of one rank. host_bytes: of one rank.
        step_seconds, days, cost: of an optimizer step, of the stage, in dollars. network_bytes: sent by a rank per step.
        disk_bytes: results and checkpoints. fits: whether device and host have the memory.
    """

    setting: Setting
    world_size: int
    parts: dict[str, float]
    host_bytes: float
    step_seconds: float
    days: float
    cost: float
    network_bytes: float
    disk_bytes: float
    fits: bool

    @property
    def device_bytes(self) -> float:
        """The sum of the parts."""
        return sum(self.parts.values())


def shape_of(config: Any) -> Shape:
    """The shape of a model, counted on PyTorch's meta device: no weight is allocated or read.

    Args:
        config: a Hugging Face config of a supported family.
    """
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear_weights=sum(linear.weight.numel() for linear in linears),
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        query_width=config.num_attention_heads * head_dim,
        key_value_width=config.num_key_value_heads * head_dim,
    )


def activation_bytes(
    shape: Shape, tokens: int, kind: str, *, ternary: bool = True, checkpointing: bool = False
) -> float:
    """Bytes that the backward pass of one micro-step reads.

    Per token and layer: the residual stream before each of the two norms in fp32; q, k, v after RoPE (k and v repeated to the
    heads of q), the attention's output twice (for attention and for SubLN), gate and up; a ternary layer keeps int8 codes of
    the inputs of q/k/v, o, gate/up and down, a full-precision one keeps these inputs themselves.

    Args:
        shape: of the model that is trained. tokens: of the micro-step.
        kind: "cuda" (bf16 between the matrices) or "cpu" (fp32).
        ternary: see above. checkpointing: whether only the input of each layer is kept, and one layer computed again at a time.
    """
    item = {"cuda": 2, "cpu": 4}[kind]
    inputs = 2 * shape.hidden + shape.query_width + shape.intermediate
    layer = (
        4 * 2 * shape.hidden
        + item * (5 * shape.query_width + 2 * shape.intermediate)
        + inputs * (1 if ternary else item)
    )
    if checkpointing:
        return float(tokens * (shape.layers * 4 * shape.hidden + layer))
    return float(tokens * shape.layers * layer)


def memory_parts(work: Work, setting: Setting, world_size: int, kind: str) -> tuple[dict[str, float], float]:
    """({part: bytes on the device of one rank}, bytes in the host's memory per rank).

    Args:
        work: what is trained. setting: ZeRO, offload and checkpointing. world_size: ranks. kind: "cuda" or "cpu".
    """
    # Imported here because it loads PyTorch.
    from bitdistill.kernels.vocabulary import CHUNK_BYTES

    student, teacher, item = work.student, work.teacher, {"cuda": 2, "cpu": 4}[kind]
    shares = {0: (1, 1, 1), 1: (1, 1, world_size), 2: (1, world_size, world_size), 3: (world_size,) * 3}[setting.zero]
    names = ("weights", "gradients", "optimizer")
    parts = {
        name: size * student.parameters / share for name, size, share in zip(names, (4, 4, 8), shares, strict=True)
    }
    if setting.zero:  # DeepSpeed trains a flat copy of this rank's share of the weights
        parts["DeepSpeed's copy"] = 4 * student.parameters / world_size
    if work.ternary:
        parts["codes"] = float(student.linear_weights)
    host = 0.0
    if setting.offload:
        host += parts.pop("optimizer") + parts.pop("DeepSpeed's copy")
        if setting.zero == 3:
            host += parts.pop("weights")
    if setting.zero == 3:
        # Two layers' weights and one's gradient; the vocabulary's weight, its gradient, and that again while it is reduced.
        parts["gathered"] = 4.0 * (
            3 * student.linear_weights / student.layers + 3 * student.vocabulary * student.hidden
        )
    if teacher is not None:
        kept = teacher.vocabulary * teacher.hidden if work.teacher_cached else teacher.parameters
        stored = item * kept
        if setting.teacher_offload and not work.teacher_cached:
            host += stored / world_size
            parts["teacher"] = 2 * stored / teacher.layers
        else:
            parts["teacher"] = float(stored)
    how = {"ternary": work.ternary, "checkpointing": setting.checkpointing}
    parts["activations"] = activation_bytes(student, work.tokens_per_micro_step, kind, **how)
    if work.states:
        per_number = item + 4 * work.forced  # of the teacher, in its dtype; what a layer reads, in fp32
        parts["states"] = float(work.tokens_per_micro_step * student.layers * student.hidden * per_number)
    chunk = min(CHUNK_BYTES[kind], 12.0 * work.tokens_per_micro_step * student.vocabulary)
    parts["logits"] = chunk + 2.0 * student.vocabulary * student.hidden  # and the head in half precision
    alone = kind == "cpu" and world_size == 1 and setting.zero == 0  # then the main job does without DeepSpeed
    parts["process"] = PROCESS_BYTES[kind] + (DEEPSPEED_BYTES if kind == "cpu" and not alone else 0.0)
    return parts, host


def plans(
    work: Work,
    device: Device,
    world_size: int,
    *,
    tokens_per_second: float | None = None,
    host_bytes_per_rank: float = 128e9,
) -> list[Plan]:
    """Every ZeRO stage, offload and checkpointing; those that fit come first, the cheapest of them before the others.

    Args:
        work: what is trained. device: of every rank. world_size: ranks.
        tokens_per_second: measured, of one rank; the device's stated rate says it when absent.
        host_bytes_per_rank: main memory for what is offloaded.

    Raises:
        UserError: a number that is not above zero.
    """
    numbers = {"gpus": world_size, "tokens": work.total_tokens, "tokens_per_step": work.tokens_per_step}
    for name, value in numbers.items():
        if not value > 0:
            raise UserError(
                name, expected="a number above zero", got=f"{value:g}", do=f"Give --{name} a positive number."
            )
    runs_along = work.teacher is not None and not work.teacher_cached
    teacher_offloads = (False, True) if runs_along and device.kind == "cuda" else (False,)
    offloads = (False, True) if device.kind == "cuda" else (False,)
    found = []
    for zero, offload, teacher_offload, checkpointing in product(
        (0, 1, 2, 3), offloads, teacher_offloads, (False, True)
    ):
        if offload and zero == 0:
            continue  # DeepSpeed offloads only what ZeRO has partitioned
        setting = Setting(zero, offload, teacher_offload, checkpointing)
        parts, host = memory_parts(work, setting, world_size, device.kind)
        seconds, network = _step(work, setting, device, world_size, tokens_per_second)
        days = work.total_tokens / work.tokens_per_step * seconds / 86400
        fits = sum(parts.values()) <= FILLED * device.memory_bytes and host <= FILLED * host_bytes_per_rank
        cost = days * 24 * device.price_per_hour * world_size
        found.append(Plan(setting, world_size, parts, host, seconds, days, cost, network, disk_bytes(work), fits))
    simplest = lambda plan: (plan.setting.offload, plan.setting.teacher_offload, plan.setting.zero)  # noqa: E731
    return sorted(found, key=lambda plan: (not plan.fits, round(plan.days, 3), simplest(plan), plan.device_bytes))


def _step(
    work: Work, setting: Setting, device: Device, world_size: int, tokens_per_second: float | None
) -> tuple[float, float]:
    """(seconds of an optimizer step, bytes that a rank sends in it)."""
    student = work.student
    micro_steps = max(1, round(work.tokens_per_step / work.tokens_per_micro_step / world_size))
    ternary = student.linear_weights if work.ternary else 0
    table = student.vocabulary * student.hidden
    tied = table if student.parameters < student.linear_weights + 2 * table else 0
    sent = sent_bytes(student.parameters, ternary, setting.zero, world_size, micro_steps, tied)
    moved = 2 * 8 * student.parameters / world_size / PCIE_BYTES_PER_SECOND if setting.offload else 0.0
    if tokens_per_second is None:
        flop = (8 if setting.checkpointing else 6) * student.matrix_weights
        if work.teacher is not None:  # read from disk, its LM head alone
            head = work.teacher.vocabulary * work.teacher.hidden
            flop += 2 * (head if work.teacher_cached else work.teacher.matrix_weights)
        computing = flop * work.tokens_per_step / (device.flop_per_second * world_size)
    else:
        computing = work.tokens_per_step / (tokens_per_second * world_size) * (4 / 3 if setting.checkpointing else 1)
    return computing + sent / device.link_bytes_per_second + moved, sent


def sent_bytes(
    parameters: int,
    ternary: int,
    zero: int,
    world_size: int,
    micro_steps: int = 1,
    tied: int = 0,
    live: float = LIVE_PARAMETERS,
) -> float:
    """Bytes that a rank sends in an optimizer step, when the ranks pass parts around a ring. Counted by bench/communication.py.

    Everything is fp32. At ZeRO 0 the gradients are added up everywhere (an all-reduce sends each byte twice). DeepSpeed does
    so at ZeRO 1 and 2, too, and gathers the new weights besides; at ZeRO 2 and 3 the gradients of each micro-step are added up at
    once, at ZeRO 3 each where it belongs. ZeRO 3 gathers the weights in each micro-step; where more than `live` would have to
    stay gathered, again for the backward pass, and a tied vocabulary for each of the two layers that use it. Of ternary layers it
    gathers 2-bit codes, once per step.

    Args:
        parameters: of the model. ternary: of these, weights in ternary layers whose codes are gathered.
        zero: stage. world_size: ranks. micro_steps: of a rank in a step.
        tied: weights of a vocabulary that embedding and LM head share.
        live: parameters that DeepSpeed leaves gathered between the two passes.
    """
    around = (world_size - 1) / world_size
    if zero < 3:
        return around * 4 * parameters * (2 * (micro_steps if zero == 2 else 1) + (zero > 0))
    gathered = parameters - ternary
    if gathered > live:
        gathered = 2 * (gathered + tied)
    return around * (4 * (parameters + gathered) * micro_steps + ternary / 4)


def disk_bytes(work: Work) -> float:
    """What a stage writes: checkpoints of weights and both moments, and the result in fp32."""
    return float((CHECKPOINTS_ON_DISK * 12 + 4) * work.student.parameters)


def devices_of(text: str) -> tuple[int, str]:
    """("8xH200") -> (8, "H200"); a name without a number is one device.

    Raises:
        UserError: no such device, or no number before the x.
    """
    count, _, name = text.rpartition("x") if "x" in text[:-1] and text[0].isdigit() else ("1", "", text)
    names = {known.lower(): known for known in DEVICES}
    if not count.isdigit() or int(count) < 1 or name.lower() not in names:
        expected = f"a number and one of {', '.join(DEVICES)}, as in 8xH200"
        raise UserError(
            "gpus", expected=expected, got=text, do="Name the nearest device, and give its memory by --memory_gb."
        )
    return int(count), names[name.lower()]


def command_line(plan: Plan, model: str, kind: str) -> str:
    """The main job's command with the settings of a plan."""
    setting = plan.setting
    if kind == "cpu" and plan.world_size == 1 and setting == Setting(0):
        return f"python bitdistill/train.py --model {model}"  # one rank on a CPU needs no DeepSpeed
    several = f" --num_gpus {plan.world_size}" if kind == "cuda" else f" --num_accelerators {plan.world_size}"
    line = f"deepspeed{several} bitdistill/train.py --model {model} --zero {setting.zero}"
    line += " --offload cpu" if setting.offload else ""
    line += " --teacher_offload cpu" if setting.teacher_offload else ""
    stages = ("pretrain", "distill") if setting.checkpointing else ()
    return line + "".join(f" --{stage}.gradient_checkpointing true" for stage in stages)
