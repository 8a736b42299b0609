"""Stage 1, modeling refinement: surgery on a Hugging Face model, in place, without forked modeling code.

    Y = X + SubLN(concat(heads)) W_o          X' = Y + SubLN((Y W_up) * act(Y W_gate)) W_down

Each of the seven projections of a decoder layer becomes a BitLinear, and an extra RMSNorm (SubLN) stands before o_proj and
down_proj (the paper's two, `norms="two"`) or before all seven (the authors' code, `norms="all"`). The MLP around three of
them becomes a GatedMLP: the same computation, which a GPU may fuse. Embedding and LM head stay in full precision, or are
quantized, too (embeddings.py). Everything else, the model's own norms and biases, stays as it is. The config remembers the
surgery, so that a saved student is loaded by building, converting, and then filling it strictly: `from_pretrained` alone
would drop the SubLN gains with a mere warning.

Source: BitNet Distillation, arXiv 2510.13998, section 3.1.
"""

import copy
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitdistill.distributed.divide import divide
from bitdistill.errors import UserError
from bitdistill.files import apply_umask
from bitdistill.names import PROJECTIONS, SIBLINGS, SUBLN_BEFORE
from bitdistill.student.calibration import InputStatistics, calibrate_gains, calibrate_inputs
from bitdistill.student.embeddings import FULL_PRECISION, quantize_embeddings
from bitdistill.student.layers import BitLinear, GatedMLP, SubLN, bit_linears
from bitdistill.student.loading import tied_keys
from bitdistill.student.model_folder import architecture, check_family
from bitdistill.student.model_weights import read_json, tensors_of
from bitdistill.student.quantizers import ACT_SCALES, WeightQuantizer, quantizer_named
from bitdistill.student.sharing import Siblings

# 1 is read, and written where there is one scale per tensor: it knows no others. 2 knows activation scales per token only.
FORMAT_VERSION = 3


@dataclass(frozen=True)
class Refinement:
    """What the surgery did: counts to be printed."""

    ternary: int
    kept: tuple[str, ...]
    sublns: int
    biases: int
    ternary_weights: int
    parameters: int
    embedding: str = FULL_PRECISION

    def __str__(self) -> str:
        total = self.ternary + len(self.kept)
        kept = f", kept in full precision: {', '.join(self.kept)}" if self.kept else ""
        kept += "" if self.embedding == FULL_PRECISION else f", embedding and LM head {self.embedding}"
        share = 100 * self.ternary_weights / self.parameters
        return (
            f"{self.ternary} of {total} linears ternary{kept}; {self.sublns} SubLN added; {self.biases} biases kept; "
            f"{self.ternary_weights:,} of {self.parameters:,} parameters ({share:.1f} %) are ternary"
        )


def refine(
    model: nn.Module,
    norms: str = "two",
    gains: dict[str, float] | None = None,
    subln_eps: float | None = None,
    embedding: str = FULL_PRECISION,
    weight_quantizer: str = "absmean",
    weight_scale: str = "tensor",
    group_size: int = 128,
    inputs: dict[str, InputStatistics] | None = None,
    act_scale: str = "token",
) -> Refinement:
    """Converts a causal language model in place.

    Args:
        model: Llama, Qwen2, Qwen3 or Gemma3 text, any dtype, also with ZeRO-3 partitioned parameters.
        norms: "two" | "all" | "none" ("none" is the BitNet-SFT baseline).
        gains: initial SubLN gain by layer name, from `calibrate_gains`; 1 where absent.
        subln_eps: eps of SubLN; the model's own rms_norm_eps by default (the authors' code has 1e-8).
        embedding: "fp16" (full precision) | "int8" | "int4" | "ternary": embedding and LM head while they are trained.
        weight_scale: what has a scale of its own: "tensor" | "row" | "group". group_size: columns of a group.
        weight_quantizer: a name of quantizers.py. inputs: what "gptq" and "awq" are calibrated on, by layer name, from
            `calibrate_inputs`; without, the layer is absmean until its buffers are loaded.
        act_scale: what has an activation scale of its own: "token" | "block" (32 columns of a token).

    Returns: the counts.

    Raises:
        UserError: unknown family, norms, embedding or quantizer, or a model that is converted already.
    """
    check_family(model.config)
    if norms not in SUBLN_BEFORE:
        raise UserError(
            "refine.norms", expected=f"one of {', '.join(SUBLN_BEFORE)}", got=repr(norms), do="Choose one of these."
        )
    quantizer = quantizer_named(weight_quantizer, weight_scale, group_size)
    if act_scale not in ACT_SCALES:
        expected = f"one of {', '.join(ACT_SCALES)}"
        raise UserError("refine.act_scale", expected=expected, got=repr(act_scale), do="Choose one of these.")
    if bit_linears(model):
        raise UserError("model", expected="a full-precision model", got="a converted one", do="Load the base model.")
    eps = model.config.rms_norm_eps if subln_eps is None else subln_eps
    quantize_embeddings(model, embedding)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = {name: linear for name, linear in linears.items() if name.rpartition(".")[2] in PROJECTIONS}
    expected = model.config.num_hidden_layers * len(PROJECTIONS)
    assert len(chosen) == expected, f"expected {expected} projections in the decoder, found {len(chosen)}"
    sublns = [_convert(model, name, norms, gains or {}, eps, quantizer, inputs, act_scale) for name in chosen]
    _introduce_siblings(model)
    activation = getattr(model.config, "hidden_activation", None) or model.config.hidden_act
    for name in [name for name, module in model.named_modules() if hasattr(module, "down_proj")]:
        model.set_submodule(name, GatedMLP(model.get_submodule(name), activation))
    about = {"norms": norms, "subln_eps": eps, "embedding": embedding, "weight_quantizer": weight_quantizer}
    model.config.bitdistill = _described(about, weight_scale, group_size, act_scale)
    return Refinement(
        ternary=len(chosen),
        kept=tuple(name for name in linears if name not in chosen),
        sublns=sum(sublns),
        biases=sum(linear.bias is not None for linear in chosen.values()),
        ternary_weights=sum(_numel(linear.weight) for linear in chosen.values()),
        parameters=sum(_numel(parameter) for parameter in model.parameters()),
        embedding=embedding,
    )


def _described(about: dict[str, Any], weight_scale: str, group_size: int, act_scale: str) -> dict[str, Any]:
    """The entry `bitdistill` of a student's config.json. One scale per tensor and per token is the default and left out, as in
    version 1."""
    version = 3 if act_scale != "token" else 1 if weight_scale == "tensor" else 2
    described = {"format_version": version, **about}
    if weight_scale != "tensor":
        described["weight_scale"] = weight_scale
    if weight_scale == "group":
        described["group_size"] = group_size
    if act_scale != "token":
        described["act_scale"] = act_scale
    return described


def _convert(
    model: nn.Module,
    name: str,
    norms: str,
    gains: dict[str, float],
    eps: float,
    quantizer: WeightQuantizer,
    inputs: dict[str, InputStatistics] | None,
    act_scale: str,
) -> bool:
    """Puts a BitLinear in the place of one linear; whether a SubLN stands before it."""
    linear, subln = model.get_submodule(name), None
    if name.rpartition(".")[2] in SUBLN_BEFORE[norms]:
        subln = SubLN(linear.in_features, eps, device=linear.weight.device)
        if name in gains:
            nn.init.constant_(subln.weight, gains[name])
    layer = BitLinear(linear, subln, quantizer, act_scale)
    if inputs is not None and quantizer.calibrated:
        quantizer.calibrate(layer, inputs[name])
    model.set_submodule(name, layer)
    return subln is not None


def refine_on_corpus(
    model: nn.Module,
    blocks: Callable[[], Iterable[dict[str, Tensor]]],
    *,
    norms: str,
    gain: str,
    subln_eps: float | None,
    embedding: str,
    weight_quantizer: str,
    weight_scale: str = "tensor",
    group_size: int = 128,
    act_scale: str = "token",
) -> tuple[Refinement, dict[str, float] | None]:
    """`refine` after the calibration that its settings ask for.

    Args:
        model: as in `refine`. blocks: makes the batches that are calibrated on; called for each calibration, or never.
        gain: "one", or "calibrated" by `calibrate_gains`.
        norms, subln_eps, embedding, weight_quantizer, weight_scale, group_size, act_scale: as in `refine`.

    Returns: (the counts, the calibrated gains by layer name, or None).

    Raises:
        UserError: what `refine`, `calibrate_gains` and `calibrate_inputs` refuse.
    """
    gains = inputs = None
    if gain == "calibrated" and norms != "none":
        gains = calibrate_gains(model, blocks(), norms)
    if quantizer_named(weight_quantizer).calibrated:
        inputs = calibrate_inputs(model, blocks(), norms, subln_eps)
    quantizer = (weight_quantizer, weight_scale, group_size)
    return refine(model, norms, gains, subln_eps, embedding, *quantizer, inputs, act_scale), gains


def _introduce_siblings(model: nn.Module) -> None:
    """Tells the layers that read the same tensor of each other, where nothing else (SubLN, bias) tells them apart."""
    for parent in model.modules():
        for names in SIBLINGS:
            layers = [getattr(parent, name, None) for name in names]
            alike = all(isinstance(layer, BitLinear) and layer.subln is None for layer in layers)
            if alike and len({layer.bias is None for layer in layers}) == 1:
                siblings = Siblings(layers)
                for layer in layers:
                    layer.siblings = siblings


def _numel(parameter: Tensor) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # a ZeRO-3 partitioned parameter is empty itself


def save_student(folder: str | Path, model: nn.Module, tokenizer=None, state_dict: dict | None = None) -> None:
    """Writes config.json, model.safetensors (fp32 masters, SubLN gains) and the tokenizer.

    Args:
        folder: created when absent; for an atomic result give a temporary folder and rename it.
        model: a refined model (its parameters may be partitioned when state_dict is given).
        state_dict: full tensors, from `distributed.checkpoint.full_state_dict`; the model's own by default.
        tokenizer: saved beside the model; none by default.
    """
    from safetensors.torch import save_file

    assert all(layer.annealing == 1 for layer in bit_linears(model).values()), "a student is saved when it is ternary"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if state_dict is None else state_dict
    drop = tied_keys(model)
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items() if key not in drop}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    apply_umask(folder / "model.safetensors")
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def student_record(folder: str | Path) -> dict:
    """What the surgery wrote into a saved student's config.json.

    Raises:
        UserError: not a student of this project, or a newer format.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError("student", expected=f"a folder with {name}", got=str(folder), do="Give a finished stage.")
    written = read_json(folder / "config.json", "student").get("bitdistill")
    if not isinstance(written, dict):
        raise UserError(
            "student",
            expected="a config.json with a `bitdistill` section",
            got=f"{folder}, a foreign checkpoint",
            do="Convert it with --stage refine.",
        )
    if written.get("format_version") not in range(1, FORMAT_VERSION + 1):
        raise UserError(
            "student",
            expected=f"format_version {FORMAT_VERSION} or less",
            got=str(written.get("format_version")),
            do="Update bitdistill.",
        )
    eps, size = written.get("subln_eps"), written.get("group_size", 128)
    words = {name: written.get(name, "") for name in ("norms", "embedding", "weight_quantizer", "weight_scale")}
    right = all(isinstance(word, str) for word in words.values()) and words["norms"] in SUBLN_BEFORE
    right = right and isinstance(eps, float | int) and 0 <= eps < 1
    if not right or not isinstance(size, int | None):
        record = words | {"subln_eps": eps, "group_size": size}
        got = f"{folder} with {', '.join(f'{name} {value!r:.40}' for name, value in record.items())}"
        do = "Run the stage again, or copy the folder again."
        raise UserError("config.json: bitdistill", expected="what stage 1 writes", got=got, do=do)
    return written


def require_quantizers(
    folder: str | Path,
    weight_quantizer: str,
    embedding: str,
    weight_scale: str = "tensor",
    group_size: int = 128,
    act_scale: str = "token",
) -> None:
    """Raises UserError, naming the setting, when a saved student was trained with other quantizers."""
    record = student_record(folder)
    wanted = {"weight_quantizer": ("absmean", weight_quantizer), "embedding": (FULL_PRECISION, embedding)}
    wanted |= {"weight_scale": ("tensor", weight_scale), "act_scale": ("token", act_scale)}
    if weight_scale == record.get("weight_scale") == "group":
        wanted["group_size"] = (128, group_size)
    for name, (usual, given) in wanted.items():
        trained = record.get(name, usual)
        if trained != given:
            expected = f"{trained}, with which {folder} was trained"
            raise UserError(f"refine.{name}", expected=expected, got=str(given), do=f"Give --refine.{name} {trained}.")


def load_student(folder: str | Path, zero_optimization: dict | None = None) -> PreTrainedModel:
    """A saved ternary student, bit for bit as it was, SubLN gains included, in fp32 with sdpa attention.

    Args:
        folder: of the student.
        zero_optimization: DeepSpeed's section for ZeRO 3, on every rank: each layer is read and divided among the ranks before
            the next one is read, so that no rank ever has the whole model. None loads it whole.

    Raises:
        UserError: not a student of this project, a newer format, a truncated file, missing or extra tensors, or a
            tensor of another shape.
    """
    from accelerate import init_empty_weights
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder, written = Path(folder), student_record(folder)
    config, shapes = architecture(folder, read_json(folder / "config.json", "student"), "student")
    wanted = sum(math.prod(shape) for shape in shapes.values())
    there = sum(math.prod(shape) for _, shape, _ in tensors_of(folder, "student").values())
    if wanted > 2 * there + 1_000_000:  # nothing is allocated for a config that has nothing to do with the weights
        got = f"{folder}: {wanted:,} weights by config.json, {there:,} in model.safetensors"
        raise UserError("student", expected="weights that fit config.json", got=got, do="Run the stage again.")
    with nullcontext() if zero_optimization is None else init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    model.tie_weights()  # which does not survive where tensors without values were put in
    embedding = written.get("embedding", FULL_PRECISION)
    weight_quantizer = written.get("weight_quantizer", "absmean")
    scales = {"weight_scale": written.get("weight_scale", "tensor"), "group_size": written.get("group_size", 128)}
    scales["act_scale"] = written.get("act_scale", "token")
    refine(model, written["norms"], None, written["subln_eps"], embedding, weight_quantizer, **scales)
    try:
        if zero_optimization is None:
            load_strictly(model, load_file(folder / "model.safetensors"), where=str(folder))
        else:
            _load_divided(model, folder / "model.safetensors", zero_optimization, where=str(folder))
    except SafetensorError as error:
        raise UserError(
            "model.safetensors", expected="a whole file", got=f"{folder} ({error})", do="Run the stage again."
        ) from error
    return model


def _load_divided(model: nn.Module, path: Path, zero_optimization: dict, where: str) -> None:
    """`load_strictly` from a safetensors file into a model without values, one decoder layer at a time.

    The file is mapped into memory again for each layer: the ranks write into what they divide, and pages of a mapping that
    are written to stay in memory, a second whole model in the end, as long as the mapping does.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        shapes = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118
    check_strictly(model, shapes, where)
    filled: dict[int, nn.Parameter] = {}  # by the parameter without values, which tied modules share
    empty = []  # as long as they live, their ids are their own
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    prefix = next(name for name, module in model.named_modules() if module is layers)
    for module, name in (*((layer, f"{prefix}.{index}.") for index, layer in enumerate(layers)), (model, "")):
        with safe_open(path, framework="pt") as file:
            _fill(module, name, file, filled, empty)
        divide(module, zero_optimization)


def _fill(module: nn.Module, prefix: str, file: Any, filled: dict[int, nn.Parameter], empty: list[Tensor]) -> None:
    """Gives the parameters and buffers that have no values yet those of the file."""
    for path, owner in module.named_modules():
        for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
            if not tensor.is_meta:
                continue
            whole = f"{prefix}{path}.{name}" if path else f"{prefix}{name}"
            if isinstance(tensor, nn.Parameter):
                if id(tensor) not in filled:
                    filled[id(tensor)] = nn.Parameter(file.get_tensor(whole).float())
                    empty.append(tensor)
                setattr(owner, name, filled[id(tensor)])
            else:
                owner.register_buffer(name, file.get_tensor(whole))


def load_strictly(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Fills a model from full tensors; a missing, extra or misshapen tensor is a UserError that names it."""
    check_strictly(model, state, where)
    model.load_state_dict(state, strict=False)
    model.tie_weights()


def check_strictly(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Raises UserError that names a missing, extra or misshapen tensor of a state for a model."""
    own = model.state_dict()
    wanted = set(own) - tied_keys(model)
    missing, extra = sorted(wanted - set(state)), sorted(set(state) - set(own))
    misshapen = [key for key in wanted & set(state) if own[key].shape != state[key].shape]
    for problem, keys in (("missing", missing), ("extra", extra), ("of another shape", misshapen)):
        if keys:
            shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise UserError(
                "model.safetensors",
                expected=f"the {len(wanted)} tensors of this student",
                got=f"{where} with {len(keys)} {problem}: {shown}",
                do="Take the folder that bitdistill saved, whole.",
            )
