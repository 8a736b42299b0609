"""A frozen full-precision teacher that works beside a student of any ZeRO stage.

Two ways to hold it, one way to call it:

* resident: the plain Hugging Face model, whole, on the device of each rank;
* offloaded: a DeepSpeed ZeRO-3 engine without optimizer. Each rank keeps 1/N of the parameters on CPU or NVMe, and a layer
  is gathered on the device while it computes. Its logits equal those of the resident model bit for bit.

Hugging Face decides *while loading* whether parameters are partitioned, by a process-wide configuration that the student's
TrainingArguments also set. It is replaced by the teacher's and restored afterwards. Otherwise a resident teacher beside a
stage-3 student would be partitioned without an engine, or the student would take over the teacher's configuration.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bitdistill.distributed import presets, process_group
from bitdistill.names import FROM_DISK

PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Teacher:
    """A frozen causal LM. `teacher(input_ids=..., attention_mask=...)` gives its output without gradients.

    Attributes:
        module: the Hugging Face model, for hooks and its config. Under offload its parameters are empty outside a call.
        forward: what is called: the module, or the DeepSpeed engine around it.
        products: the dtype of its matrix products, where everything between them keeps another.
    """

    module: nn.Module
    forward: nn.Module
    products: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return getattr(self.forward, "device", None) or self.module.device

    def __call__(self, **batch):
        """The model's output for a batch on `device`.

        Not inference mode: its tensors could not take part in a loss. Autocast of the student is off inside: the
        teacher computes in its own dtype, or multiplies in `products`. Under offload every rank must call it equally
        often, since gathering is collective.
        """
        autocast = torch.autocast(self.device.type, self.products, enabled=self.products is not None)
        with torch.no_grad(), autocast:
            return self.forward(**batch)


def load_teacher(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: str,
    products: torch.dtype | None = None,
    offload: str = "none",
    nvme_path: str | None = None,
) -> Teacher:
    """Loads a causal LM, frozen and in eval mode. With offload it is collective: every rank calls it.

    Args:
        path: a Hugging Face folder or model name.
        dtype: of its parameters: torch.float32, bfloat16 or float16.
        device: "cpu" or "cuda", where it computes; `process_group.initialize(device)` came before.
        products: of its matrix products, if not `dtype`: the weights of its linear layers are rounded to it once, what stands
            between the products stays in `dtype`. For a resident teacher.
        offload: "none" (resident), "cpu" or "nvme" (where the parameters wait).
        nvme_path: folder on a fast disk, for "nvme".

    Returns: the Teacher.

    Raises:
        UserError: see presets.teacher_config and process_group.require_nvme.
    """
    from transformers import AutoModelForCausalLM

    if offload == "none":
        with _deepspeed_while_loading(None):
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **FROM_DISK)
        model = _frozen(model).to(device)
        if products is not None:
            _round_linears(model, products)
        return Teacher(module=model, forward=model, products=products)

    assert products is None, "an offloaded teacher multiplies in its own dtype"

    config = presets.teacher_config(offload, precision=PRECISION[dtype], device=device, nvme_path=nvme_path)
    if offload == "nvme":
        process_group.require_nvme(nvme_path)
    import deepspeed

    with _deepspeed_while_loading(config):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **FROM_DISK)
    engine = deepspeed.initialize(model=_frozen(model), config=config)[0]
    engine.eval()
    _recompute_rope(engine.module, engine.device)
    assert all(hasattr(parameter, "ds_id") for parameter in model.parameters()), "a parameter was not partitioned"
    return Teacher(module=engine.module, forward=engine)


def _round_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """The linear layers' weights in `dtype`, but for a head that shares its weight with the embedding."""
    embedding = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not embedding:
            module.to(dtype)


def _frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def _deepspeed_while_loading(config: dict | None) -> Iterator[None]:
    """Inside, `from_pretrained` partitions as `config` says (None: not at all); afterwards all is as it was."""
    from transformers.integrations import deepspeed as integration

    before = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        keep_alive = config and integration.HfDeepSpeedConfig(config)  # it is found through a weak reference
        yield
        del keep_alive
    finally:
        integration._hf_deepspeed_config_weak_ref = before


def _recompute_rope(model: nn.Module, device: torch.device) -> None:
    """RoPE frequencies in fp32, as a resident model has them.

    transformers 5.17 to 5.20 create them in the dtype of the parameters when they load under ZeRO-3: bf16 frequencies
    move the logits by 1e-2, more with each position.
    """
    for module in list(model.modules()):
        if type(module).__name__.endswith("RotaryEmbedding"):
            for name, buffer in type(module)(module.config).named_buffers():
                assert buffer.dtype == torch.float32, f"{name} is {buffer.dtype}"
                module.register_buffer(name, buffer.to(device), persistent=False)
