"""DeepSpeed configurations as plain dicts: ZeRO stage x offload x precision for a student, and one for a frozen teacher.

Imports neither torch nor deepspeed, and reads nothing from disk. What a preset fixes, and why:

* **The parameters are fp32 in every combination**, because the ternary codes are taken from the fp32 master weights.
  bf16 and fp16 are `torch_autocast` (matmuls in half precision), never DeepSpeed's `bf16`/`fp16` modes, which make the
  parameters themselves half precision (and whose stage 0 with bf16 takes no optimizer step at all). So leave
  `TrainingArguments(bf16=False, fp16=False)`; the Trainer refuses the mismatch.
* Weights and gradients travel between ranks in fp32 (`lower_precision_safe_modules: []`): the ZeRO stage decides about
  memory and never about numbers.
* Nothing is compiled: the optimizer is torch's AdamW from the Trainer, also on offloaded state. Only NVMe needs
  DeepSpeed's async_io (`process_group.require_nvme`).
* "auto" is what the Trainer fills in from its own arguments.

What is moved off the device by `offload`:

    zero    "cpu"                                   "nvme"
    0       refused: nothing is partitioned         refused
    1, 2    optimizer state                         refused: DeepSpeed swaps to NVMe only at stage 3
    3       optimizer state and parameters          optimizer state and parameters
"""

from bitdistill.errors import UserError

STAGES = (0, 1, 2, 3)
DEFAULT_ZERO = 1  # saves the most memory for its traffic: half as much again as 0 (planning.sent_bytes)
OFFLOADS = ("none", "cpu", "nvme")
AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}


def products(precision: str, device: str, *, ternary: bool, has_bf16: bool) -> tuple[str, str | None]:
    """In which precision a stage multiplies: what "auto" means, and what the user's own word means.

    On a CPU a ternary model multiplies integers; bf16 would only round what stands between them. Its LM head is an ordinary
    product, and the largest: that one takes bf16.

    Args:
        precision: "auto", "fp32" or "bf16". device: "cpu" or "cuda".
        ternary: whether the stage trains a ternary model. has_bf16: whether this CPU has instructions for bf16.

    Returns: (precision of the products, that of the LM head where it differs, else None).
    """
    if precision != "auto":
        return precision, None
    if device == "cuda":
        return "bf16", None
    if not has_bf16:
        return "fp32", None
    return ("fp32", "bf16") if ternary else ("bf16", None)


def deepspeed_config(
    zero: int,
    offload: str = "none",
    *,
    precision: str,
    device: str,
    nvme_path: str | None = None,
) -> dict:
    """The DeepSpeed section for a student, for `TrainingArguments(deepspeed=...)`.

    Args:
        zero: ZeRO stage. 0 replicates all, 1 partitions the optimizer state, 2 also gradients, 3 also parameters.
        offload: "none", "cpu" or "nvme"; see the table above.
        precision: of the matmuls: "fp32", "bf16" or "fp16". Parameters and optimizer state are fp32 in any case.
        device: "cpu" or "cuda", where the student trains.
        nvme_path: folder on a fast disk for offload "nvme".

    Returns: a new dict, JSON-serializable.

    Raises:
        UserError: a combination that DeepSpeed does not support or gets wrong: which, and what to do.
    """
    _check_combination(zero, offload, precision, device, nvme_path)
    zero_optimization = {"stage": zero, "contiguous_gradients": True, "reduce_bucket_size": "auto"}
    if zero == 3:
        zero_optimization |= {
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            # What is gathered on save is fp32 here: "16bit" is DeepSpeed's name for "in the parameters' dtype".
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    if offload != "none":
        zero_optimization["offload_optimizer"] = _offload_section(offload, device, nvme_path)
        if zero == 3:
            zero_optimization["offload_param"] = _offload_section(offload, device, nvme_path)
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": zero_optimization,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "steps_per_print": 2**31 - 1,
    }
    if precision in AUTOCAST:
        autocast = {"enabled": True, "dtype": AUTOCAST[precision], "lower_precision_safe_modules": []}
        config["torch_autocast"] = autocast
    return config


def _check_combination(zero: int, offload: str, precision: str, device: str, nvme_path: str | None) -> None:
    if zero not in STAGES:
        raise UserError(
            "zero", expected=f"one of {STAGES}", got=repr(zero), do="Use 2 when unsure, 3 when the model does not fit."
        )
    if precision not in ("fp32", *AUTOCAST):
        raise UserError(
            "precision", expected="fp32, bf16 or fp16", got=repr(precision), do="Use bf16 when unsure, fp32 on CPU."
        )
    if device not in ("cpu", "cuda"):
        raise UserError(
            "device", expected="cpu or cuda", got=repr(device), do="Choose the device that the student trains on."
        )
    if precision == "fp16" and device == "cpu":
        raise UserError(
            "precision", expected="fp32 or bf16 on CPU", got="'fp16'", do="Use bf16: fp16 needs loss scaling on a GPU."
        )
    _check_offload(offload, nvme_path)
    if offload != "none" and zero == 0:
        raise UserError(
            "offload", expected="'none' with zero 0", got=repr(offload), do="Set zero to 2: stage 0 partitions nothing."
        )
    if offload == "nvme" and zero != 3:
        raise UserError(
            "offload", expected=f"'none' or 'cpu' with zero {zero}", got="'nvme'", do="Set zero to 3 for NVMe."
        )


def teacher_config(offload: str, *, precision: str, device: str, nvme_path: str | None = None) -> dict:
    """ZeRO-3 without an optimizer, parameters on CPU or NVMe: for a frozen teacher.

    Args:
        offload: "cpu" or "nvme". A teacher that stays on its device needs no DeepSpeed.
        precision: the dtype of the teacher's parameters: "fp32", "bf16" or "fp16".
        device: "cpu" or "cuda", where it computes.
        nvme_path: folder on a fast disk for offload "nvme".

    Returns: a new dict for `deepspeed.initialize(config=...)`.

    Raises:
        UserError: offload "none", or no nvme_path for "nvme".
    """
    _check_offload(offload, nvme_path)
    if offload == "none":
        raise UserError(
            "offload", expected="'cpu' or 'nvme'", got="'none'", do="Load the teacher resident on its device instead."
        )
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed asks for one; a teacher's batches may have any size
        "zero_optimization": {"stage": 3, "offload_param": _offload_section(offload, device, nvme_path)},
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "steps_per_print": 2**31 - 1,
    }


def _check_offload(offload: str, nvme_path: str | None) -> None:
    if offload not in OFFLOADS:
        raise UserError(
            "offload", expected=f"one of {OFFLOADS}", got=repr(offload), do="Use 'none' when the model fits."
        )
    if offload == "nvme" and nvme_path is None:
        raise UserError(
            "nvme_path", expected="a folder on a fast disk, for offload 'nvme'", got="none", do="Set it, or use 'cpu'."
        )


def _offload_section(offload: str, device: str, nvme_path: str | None) -> dict:
    section = {"device": offload, "pin_memory": device == "cuda"}
    return section | {"nvme_path": str(nvme_path)} if offload == "nvme" else section
