"""What is in a model folder, according to config.json and the headers of its weights: everything that can be found before
loading.

A model is either loaded as it is meant to be, or refused. As it is meant to be means: in full precision; of one of the
supported families; with every tensor of the architecture under its name and in its shape, and no tensor left over; with the
head that the file has; with special tokens inside the embedding; and with nothing in the config that the runtimes would get
wrong. transformers itself continues with random weights where a name is missing, and runs code of the repository or
unpickles files if it is allowed to; here neither happens.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bitdistill.errors import UserError
from bitdistill.kernels.numerics import ACTIVATIONS
from bitdistill.student.model_weights import (
    Tensors,
    has_own_head,
    layer_count,
    names_and_shapes,
    quantized_model,
    quantized_tensors,
    read_json,
    tensors_of,
    with_prefix,
)
from bitdistill.text_files import user_path

# model_type -> the only class that is a base: a language model with a head
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
ROPE_KINDS = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the length of the text
MOST_FREQUENCIES = 1_000_000  # of all rotary embeddings together; a config may say anything
LAYER_KINDS = ("full_attention", "sliding_attention")
WITHOUT_A_STEP = ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention")
QUANTIZED_KEYS = ("quantization_config", "quantization", "compression_config")
QUANTIZED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
# What is fetched of a hub repository: no pickle, no code.
SMALL_FILES = ("*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken")
NOT_A_CONFIG = (ValueError, TypeError, LookupError, AttributeError, AssertionError, RuntimeError, ArithmeticError)


@dataclass
class ModelFolder:
    """A checked folder.

    Attributes:
        path: the folder (of a hub repository: its local copy).
        config: transformers' configuration, whose tie_word_embeddings says what the file has.
        tensors: name -> (file, shape, safetensors' name of the type).
        notes: what is worth saying although it is right.
    """

    path: Path
    config: Any
    tensors: Tensors = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """Numbers in the file."""
        return sum(int(torch.Size(shape).numel()) for _, shape, _ in self.tensors.values())

    @property
    def bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(file.stat().st_size for file in {file for file, _, _ in self.tensors.values()})


def open_model(name_or_path: str | Path, setting: str = "model") -> ModelFolder:
    """`read_model`, with the first problem raised.

    Args:
        name_or_path: a local Hugging Face folder or a hub id. setting: what messages call it.

    Raises:
        UserError: see read_model.
    """
    found, problems = read_model(name_or_path, setting)
    for problem in problems:
        raise problem
    assert found is not None
    return found


def read_model(name_or_path: str | Path, setting: str = "model") -> tuple[ModelFolder | None, list[UserError]]:
    """A folder and all that is wrong with it, without loading a weight (two tables are read where both could be the head).

    Args:
        name_or_path: a local Hugging Face folder or a hub id. setting: what messages call it.

    Returns: (what was found, None where nothing could be read; the problems).
    """
    try:
        path = local_folder(name_or_path, setting, SMALL_FILES)
        written = _config_of(path, setting)
        problems = list(_kind_problems(path, written, setting))
        if problems:
            return None, problems[:1]  # whatever else is wrong follows from it
        path = local_folder(name_or_path, setting, (*SMALL_FILES, "*.safetensors"))
        tensors = tensors_of(path, setting)
        problems = list(quantized_tensors(path, tensors, setting))
        if problems:
            return None, problems
        problems = [*layer_count(path, written, tensors, setting), *_special_tokens(path, written, setting)]
        if problems:
            return None, problems
        config, expected = architecture(path, written, setting)
        _check_generation(path)
    except UserError as problem:
        return None, [problem]
    tensors = with_prefix(tensors)
    found, tied = ModelFolder(path, config, tensors), config.tie_word_embeddings
    problems = [*runtime_problems(config), *names_and_shapes(path, tensors, expected, tied, setting)]
    if not problems and tied and has_own_head(tensors):
        config.tie_word_embeddings = False
        found.notes.append("its LM head differs from its embedding: untied, although config.json says tied")
    return found, problems


def read_config(name_or_path: str | Path, setting: str = "model") -> Any:
    """The configuration of a model of which nothing but config.json needs to be there.

    Args:
        name_or_path: a local folder or a hub id. setting: what messages call it.

    Returns: transformers' configuration.

    Raises:
        UserError: no config.json, one that describes no model, or a model that cannot be converted.
    """
    path = local_folder(name_or_path, setting, ("config.json",))
    written = _config_of(path, setting)
    for problem in _kind_problems(path, written, setting):
        raise problem
    return architecture(path, written, setting)[0]


def check_family(config) -> None:
    """Raises UserError when the model type is not one that stage 1 knows how to convert."""
    if config.model_type not in FAMILIES:
        hint = "Take the text model of the family (for Gemma3: a gemma3_text checkpoint)."
        raise UserError(
            "model", expected=f"a model_type among {', '.join(FAMILIES)}", got=repr(config.model_type), do=hint
        )


def runtime_problems(config) -> Iterator[UserError]:
    """What a configuration asks for that the runtimes would get wrong."""
    ropes = getattr(config, "rope_parameters", None) or {}
    ropes = ropes if all(isinstance(one, dict) for one in ropes.values()) else {"": ropes}
    for rope in ropes.values():
        kind = rope.get("rope_type", "default")
        if kind not in ROPE_KINDS:
            expected = (
                f"a RoPE scaling whose frequencies do not depend on the length of the text ({', '.join(ROPE_KINDS)})"
            )
            do = "Set rope_parameters of the base model to a fixed type before training."
            yield UserError("config.json: rope_parameters", expected=expected, got=str(kind), do=do)
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            got = f"partial_rotary_factor {rope['partial_rotary_factor']}"
            yield UserError(
                "config.json: rope_parameters",
                expected="RoPE over the whole head",
                got=got,
                do="Take another base model.",
            )
    if config.max_position_embeddings < 2:
        got, do = str(config.max_position_embeddings), "Copy config.json again from the model's repository."
        yield UserError("config.json: max_position_embeddings", expected="two positions or more", got=got, do=do)
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in ACTIVATIONS:
        expected = f"one of {', '.join(ACTIVATIONS)}"
        yield UserError("config.json: hidden_act", expected=expected, got=str(activation), do="Use another base model.")
    for name in WITHOUT_A_STEP:
        if getattr(config, name, None):
            got = str(getattr(config, name))
            do = "Set it to null in the base model's config.json, or take another base model."
            yield UserError(f"config.json: {name}", expected="none (the runtime has no such step)", got=got, do=do)
    yield from _number_problems(config)


def _number_problems(config) -> Iterator[UserError]:
    """Values that transformers accepts, and with which the first forward pass would fail or give NaN."""
    kinds = set(getattr(config, "layer_types", None) or [])
    found = {
        "layer_types": (kinds <= {*LAYER_KINDS}, f"layers among {', '.join(LAYER_KINDS)}"),
        "rms_norm_eps": (0 < config.rms_norm_eps < 1, "a number between 0 and 1"),
        "attention_dropout": (0 <= config.attention_dropout < 1, "a share from 0 to below 1"),
    }
    if "sliding_attention" in kinds:
        found["sliding_window"] = (config.sliding_window >= 1, "one position or more")
    for name, (right, expected) in found.items():
        if not right:
            do = "Copy config.json again from the model's repository, or take another base model."
            yield UserError(f"config.json: {name}", expected=expected, got=str(getattr(config, name)), do=do)


def _check_rotary(model: torch.nn.Module, config) -> None:
    """Raises ValueError where the frequencies that a config asks for are no numbers above zero."""
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            if sum(found.numel() for found in module.buffers()) > MOST_FREQUENCIES:
                raise ValueError("heads too wide for any model")
            rotary = type(module)(config=config)
            if not all(bool((torch.isfinite(found) & (found > 0)).all()) for found in rotary.buffers()):
                raise ValueError("rope_parameters whose frequencies are not finite and above zero")


def local_folder(name_or_path: str | Path, setting: str, patterns: tuple[str, ...]) -> Path:
    """A local folder as it is; of a hub repository the local copy of the files that match."""
    name, path = str(name_or_path), user_path(name_or_path, setting)
    if path.is_dir():
        return path
    if path.is_file():
        kind, do = "a file", "Give the folder that holds config.json and model.safetensors."
        if path.suffix.lower() == ".gguf" or _begins(path, b"GGUF"):
            kind = "a GGUF file"
            do = "The main job takes it under a name in .gguf; elsewhere convert it first (gguf_base.convert_gguf)."
        elif path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            kind = "a file of pickled weights, which is never read"
        raise UserError(setting, expected="a Hugging Face model folder", got=f"{name}, {kind}", do=do)
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or path.parent.is_dir():
        do = "Check the path, or give a hub id like Qwen/Qwen3-0.6B."
        raise UserError(setting, expected="an existing folder or a hub id", got=f"{name} (no such folder)", do=do)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            setting,
            expected="a local folder with config.json, model.safetensors and a tokenizer, or a reachable hub id",
            got=f"{name} ({first_line})",
            do=f"Without a network give a local folder: --{setting} /path/to/folder.",
        ) from error


def _begins(file: Path, mark: bytes) -> bool:
    with file.open("rb") as content:
        return content.read(len(mark)) == mark


def _config_of(path: Path, setting: str) -> dict[str, Any]:
    """config.json of a folder that is a model's, not something that only looks like one."""
    adapter = path / "adapter_config.json"
    expected = "a folder with a full-precision model (config.json, model.safetensors, tokenizer)"
    if adapter.is_file():
        base = read_json(adapter, setting).get("base_model_name_or_path") or "an unnamed base model"
        got = f"{path}, a LoRA adapter of {base}"
        do = "Adapters hold differences only: merge it into its base (peft: merge_and_unload) and save_pretrained that."
        raise UserError(setting, expected=expected, got=got, do=do)
    if (path / "config.json").is_file():
        return read_json(path / "config.json", setting)
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    if ggufs:
        got = f"{path}, a folder of GGUF files ({', '.join(ggufs[:3])})"
        raise UserError(setting, expected=expected, got=got, do=f"Give one of them: --{setting} {path / ggufs[0]}.")
    snapshots = sorted(str(found.parent) for found in path.glob("snapshots/*/config.json"))
    if snapshots:
        got, do = f"{path}, a repository in the hub's cache", f"Give the snapshot in it: --{setting} {snapshots[-1]}."
    elif (path / "config.yaml").is_file() and (path / "distill").is_dir():
        got, do = f"{path}, a run of this project", "Give the base model, or another output_dir to train it again."
    elif any(path.glob("adapter_model.*")):
        got = f"{path}, a LoRA adapter without its adapter_config.json"
        do = "Adapters hold differences only: merge it into its base (peft: merge_and_unload) and save_pretrained that."
    elif (path / "params.json").is_file() or any(path.glob("consolidated.*")):
        got, do = f"{path}, a model in its authors' own format", "Take its repository in Hugging Face's format."
    else:
        names = ", ".join(sorted(file.name for file in path.iterdir())[:4]) or "nothing"
        got, do = f"{path} without config.json (it holds {names})", "Check the path."
    raise UserError(setting, expected=expected, got=got, do=do)


def _kind_problems(path: Path, written: dict[str, Any], setting: str) -> Iterator[UserError]:
    """A student, a quantized model, another family, a model without a head: from config.json alone."""
    if written.get("bitdistill"):
        got = f"{path}, a ternary student of this project"
        do = "Give the base model, or --student to start stage 3 from this student."
        yield UserError(setting, expected="a full-precision model", got=got, do=do)
    for key in QUANTIZED_KEYS:
        if found := written.get(key):
            method = found.get("quant_method") if isinstance(found, dict) else None
            named = f"quant_method {method}" if method else f"{key} {json.dumps(found)[:80]}"
            yield quantized_model(f"{path}, quantized with {named}", setting)
    for name in QUANTIZED_FILES:
        if (path / name).is_file():
            yield quantized_model(f"{path} with a {name}", setting)
    kind, classes = written.get("model_type"), written.get("architectures")
    if not isinstance(kind, str) or kind not in FAMILIES:
        own = ", which only code of its own can build (auto_map): it is never run" if written.get("auto_map") else ""
        do = "Take the text model of the family (for Gemma3: a gemma3_text checkpoint)."
        expected = f"a model_type among {', '.join(FAMILIES)}"
        yield UserError(setting, expected=expected, got=f"{path} with {kind!r}{own}", do=do)
    elif classes is not None and classes != [FAMILIES[kind]]:
        # The class without a head is saved by AutoModel; whether the head is there shows in the names.
        headless = [FAMILIES[kind].replace("ForCausalLM", "Model"), FAMILIES[kind].replace("ForCausalLM", "TextModel")]
        if not (isinstance(classes, list) and len(classes) == 1 and classes[0] in headless):
            got, do = f"{path} with architectures {classes!r}", "Take the language model that it was made from."
            yield UserError(setting, expected=f"a {FAMILIES[kind]}", got=got, do=do)


def architecture(path: Path, written: dict[str, Any], setting: str) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """transformers' configuration, and name -> shape of the model that it describes."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    count = written.get("num_hidden_layers", 1)
    if not isinstance(count, int) or not 0 < count < 10_000:
        raise UserError(
            setting,
            expected="num_hidden_layers from 1 on",
            got=f"{path} with {count!r}",
            do="Write the file again as transformers saves it, or download the model again.",
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        _check_rotary(empty, config)
    except (*NOT_A_CONFIG, StrictDataclassError, OSError) as error:
        text = str(error).strip().splitlines()
        got = f"{path} ({type(error).__name__}: {' '.join(' '.join(text[-1:]).split())[:160]})"
        do = "Correct config.json, or copy it again from the model's repository."
        raise UserError(setting, expected="a config.json that describes a model", got=got, do=do) from error
    return config, {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}


def _check_generation(path: Path) -> None:
    """Raises UserError for a generation_config.json that transformers would refuse while it loads the weights."""
    from transformers import GenerationConfig

    if not (path / "generation_config.json").is_file():
        return
    try:
        GenerationConfig.from_pretrained(path, local_files_only=True).validate()
    except (ValueError, TypeError, AttributeError, OSError) as error:
        got, do = " ".join(str(error).split())[:200], "Correct it, or remove the file: training does not need it."
        raise UserError(
            f"{path / 'generation_config.json'}", expected="settings of generation", got=got, do=do
        ) from error


def _special_tokens(path: Path, written: dict[str, Any], setting: str) -> Iterator[UserError]:
    """Ids of config.json and generation_config.json that the embedding has no row for."""
    rows, sources, generation = written.get("vocab_size"), {"config.json": written}, path / "generation_config.json"
    if type(rows) is not int:
        return
    if generation.is_file():
        sources[generation.name] = read_json(generation, setting)
    for source, content in sources.items():
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = content.get(name)
            for one in value if isinstance(value, list) else [value]:
                if one is not None and not (type(one) is int and 0 <= one < rows):
                    yield UserError(
                        f"{path / source}: {name}",
                        expected=f"a row of the embedding, 0 to {rows - 1}, or none",
                        got=str(one),
                        do="Give an id in that range; a padding token that does not exist can be null.",
                    )
