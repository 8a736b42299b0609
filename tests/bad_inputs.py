"""Bad inputs as people bring them, for test_bad_inputs.py: a name, the command, words of the one line that is to be said, and
what spoils the small world in which the command runs.

The world is a folder with everything right in it, and is the current folder of the command:

    base/          a model of two layers with its tokenizer          task.yaml, rows.jsonl   eight reviews
    corpus.txt     text for stage 2                                  summaries.yaml, summaries.jsonl   a generation task
    run/           a finished run: config.yaml, distill/, export/student.safetensors, evaluate/predictions.jsonl
    prompts.txt    prompts                                           bare.safetensors   a packed file without a tokenizer

`train ...` is train.py with this world's files and `--stage check`; `train.py ...` has the options that are written here and no
others; anything else is `bitdistill ...`.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from bitdistill.runtime.packed_file import config_checksum

Spoil = Callable[[Path], object]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
PAGE = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body></body></html>\n"
WEIGHTS = "base/model.safetensors"


@dataclass(frozen=True)
class Case:
    """One bad input.

    Args:
        name: of the test. command: what is typed. words: what the line on stderr holds, with "|" between the fragments.
        spoil: makes the input bad; the right world by default. status: of the process.
    """

    name: str
    command: str
    words: str
    spoil: Spoil = lambda root: None
    status: int = 2


# ------------------------------------------------------------------------------------------------ ways to spoil a world


def write(name: str, content: str | bytes) -> Spoil:
    """Puts something else into a file."""
    data = content if isinstance(content, bytes) else content.encode("utf-8")
    return lambda root: (root / name).write_bytes(data)


def append(name: str, content: str | bytes) -> Spoil:
    data = content if isinstance(content, bytes) else content.encode("utf-8")
    return lambda root: (root / name).write_bytes((root / name).read_bytes() + data)


def cut(name: str, size: int) -> Spoil:
    """Keeps the beginning of a file; a negative size drops so much of its end."""
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:size])


def edit(name: str, **values) -> Spoil:
    """Other values in a JSON file."""

    def spoil(root: Path) -> None:
        content = json.loads((root / name).read_text(encoding="utf-8"))
        (root / name).write_text(json.dumps(content | values), encoding="utf-8")

    return spoil


def replaced(name: str, old: str, new: str) -> Spoil:
    def spoil(root: Path) -> None:
        text = (root / name).read_text(encoding="utf-8")
        assert old in text, f"nothing to spoil in {name}"
        (root / name).write_text(text.replace(old, new), encoding="utf-8")

    return spoil


def remove(*names: str) -> Spoil:
    return lambda root: [(root / name).unlink() for name in names]


def folder(name: str) -> Spoil:
    """A folder where a file is wanted."""

    def spoil(root: Path) -> None:
        (root / name).unlink(missing_ok=True)
        (root / name).mkdir()

    return spoil


def tensors(change: Callable[[dict], dict], name: str = WEIGHTS) -> Spoil:
    """Other tensors in a safetensors file."""

    def spoil(root: Path) -> None:
        found = {key: value.contiguous() for key, value in change(load_file(root / name)).items()}
        save_file(found, root / name, metadata={"format": "pt"})

    return spoil


def header(**values: str) -> Spoil:
    """Another header of the packed file, with a checksum that fits it."""

    def spoil(root: Path) -> None:
        path = root / "run/export/student.safetensors"
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        content = json.loads(data[8 : 8 + size])
        known = content["__metadata__"]
        known |= values
        known["config_sha256"] = config_checksum(known)
        text = json.dumps(content).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return spoil


def both(*spoils: Spoil) -> Spoil:
    return lambda root: [spoil(root) for spoil in spoils]


def copied(source: str, target: str) -> Spoil:
    return lambda root: shutil.copytree(root / source, root / target)


def variables(**values: str) -> Spoil:
    """Variables of the environment, which the test puts back."""
    return lambda root: os.environ.update(values)


def sharded(root: Path) -> None:
    """The weights as two shards, of which the second is not there."""
    shutil.move(root / WEIGHTS, root / "base/model-00001-of-00002.safetensors")
    names = load_file(root / "base/model-00001-of-00002.safetensors")
    where = {name: f"model-0000{1 + ('layers.1' in name)}-of-00002.safetensors" for name in names}
    index = {"metadata": {}, "weight_map": where}
    (root / "base/model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def rows(*lines: str) -> Spoil:
    return write("rows.jsonl", "\n".join(lines) + "\n")


def task(old: str, new: str) -> Spoil:
    return replaced("task.yaml", old, new)


GOOD = '{"text": "a good one", "label": 1}'

# ------------------------------------------------------------------------------------------------ the command line

COMMAND_LINE = [
    Case("unknown setting", "train --learning_rat 1", "learning_rat|Did you mean base.learning_rate or teacher.learning_rate"),
    Case("unknown setting of a section", "train --distill.lambda_logit 3", "Did you mean distill.lambda_logits"),
    Case("setting of another section", "train --pretrain.gamma_attention 3", "Did you mean distill.gamma_attention"),
    Case("unknown switch", "train --restrat", "Did you mean restart"),
    Case("unknown setting with equals", "train --max_lenght=64", "Did you mean max_length"),
    Case("nothing like it", "train --frobnicate 1", "frobnicate|--help"),
    Case("word without a setting", "train foo", "foo"),
    Case("setting without its value", "train --seed", "seed"),
    Case("text for a number", "train --max_length many", "max_length|many"),
    Case("fraction for a whole number", "train --max_length 12.5", "max_length|12.5"),
    Case("truth for a number", "train --seed true", "seed|a whole number|True"),
    Case("text for a truth", "train --report perhaps", "report|perhaps"),
    Case("text for a list", "train --distill.relation_layers last", "distill.relation_layers|last"),
    Case("list for a number", "train --teacher.learning_rate [1,2]", "teacher.learning_rate"),
    Case("section for a number", "train --distill 3", "distill"),
    Case("choice that is none", "train --precision fp8", "precision|fp8"),
    Case("ZeRO stage that is none", "train --zero 5", "zero|5"),
    Case("norms that are none", "train --refine.norms three", "refine.norms|three"),
    Case("group size that is none", "train --refine.group_size 100", "refine.group_size|100"),
    Case("quantizer that is none", "train --refine.weight_quantizer absmeam", "refine.weight_quantizer|absmeam"),
    Case("recipe that is none", "train.py --recipe best", "recipe|best|demo"),
    Case("stage that is none", "train --stage pretrian", "stage|pretrian"),
    Case("stage of another kind of run", "train --stage base", "stage|base"),
    Case("stage before those it needs", "train --stage distill", "stage|pretrain|--stage all"),
    Case("length of zero", "train --max_length 0", "max_length|got 0"),
    Case("length below zero", "train --pretrain.block_size -4", "pretrain.block_size|got -4"),
    Case("seed below zero", "train --seed -1", "seed|got -1"),
    Case("seed too large", "train --seed 99999999999", "seed|99999999999"),
    Case("batch of zero", "train --distill.per_device_train_batch_size 0", "per_device_train_batch_size|got 0"),
    Case("steps of zero", "train --pretrain.max_steps 0", "pretrain.max_steps|got 0"),
    Case("no steps for a stream", "train --pretrain.max_steps -1 --max_steps null", "pretrain.max_steps|a token stream"),
    Case("rate of zero", "train --teacher.learning_rate 0", "teacher.learning_rate|got 0"),
    Case("rate that is no number", "train --teacher.learning_rate .nan", "teacher.learning_rate|nan"),
    Case("rate without end", "train --teacher.learning_rate 1e999", "teacher.learning_rate|inf"),
    Case("temperature of zero", "train --distill.kd_temperature 0", "distill.kd_temperature|got 0"),
    Case("weight below zero", "train --distill.lambda_logits -1", "distill.lambda_logits|got -1"),
    Case("decay of one", "train --teacher.adam_beta2 1", "teacher.adam_beta2|got 1"),
    Case("rows of zero", "train --max_train_rows 0", "max_train_rows|got 0"),
    Case("number beyond every float", f"train --distill.learning_rate {'9' * 400}", "numbers below 1e300|400 digits"),
    Case("number beyond every float in a section", f"train --distill '{{learning_rate: {'9' * 400}}}'", "numbers below 1e300"),
    Case("empty folder name", "train --output_dir ''", "output_dir|a text"),
    Case("blank task", "train --task ' '", "task|a text"),
    Case("scheduler mistyped", "train --teacher.lr_scheduler_type cosin", "teacher.lr_scheduler_type|cosine"),
    Case("scheduler that needs more", "train --distill.lr_scheduler_type reduce_lr_on_plateau", "distill.lr_scheduler_type"),
    Case("tracker mistyped", "train --report_to [tensorbord]", "report_to|tensorbord"),
    Case("tracker not installed", "train --report_to [neptune]", "report_to|neptune|Install"),
    Case("length beyond the model", "train --max_length 4096", "max_length|at most 128|4096"),
    Case("block beyond the model", "train --pretrain.block_size 4096", "pretrain.block_size|at most 128"),
    Case("layer that is not there", "train --distill.relation_layers [7]", "distill.relation_layers|7"),
    Case("layer twice", "train --distill.relation_layers [1,-1]", "relation_layers|once"),
    Case("no layers", "train --distill.relation_layers []", "distill.relation_layers|at least one"),
    Case("teacher's layers of another count", "train --distill.teacher_relation_layers [0,1]", "teacher_relation_layers"),
    Case("heads that cannot be split", "train --distill.split_heads 5", "split_heads|5"),
    Case("annealing that ends before it starts", "train --pretrain.annealing_start 0.9", "pretrain.annealing_start|at most"),
    Case("annealing that starts at one", "train --pretrain.annealing_start 1.0", "pretrain.annealing_start|got 1"),
    Case("forcing without states", "train --pretrain.teacher_forcing 0.5", "pretrain.teacher_forcing|lambda_hidden"),
    Case("forcing to the end", "train --distill.teacher_forcing 1.0", "distill.teacher_forcing|got 1"),
    Case("length groups of blocks", "train --pretrain.train_sampling_strategy group_by_length", "random|group_by_length"),
    Case("finished teacher without one", "train --teacher.finetuned true", "teacher.finetuned|teacher.model"),
    Case("two formats of an embedding", "train --refine.embedding int8 --export.embedding int4", "export.embedding|int8"),
    Case("quantizer that cannot be partitioned", "train --refine.weight_quantizer seq --zero 3", "weight_quantizer"),
    Case("groups of a quantizer without them", "train --refine.weight_quantizer seq --refine.weight_scale group", "weight_scale"),
    Case("offload without partitions", "train --zero 0 --offload cpu", "offload|zero"),
    Case("disk offload without a disk", "train --zero 3 --offload nvme", "nvme_path"),
    Case("disk offload to nowhere", "train --zero 3 --offload nvme --nvme_path nowhere", "nvme_path|nowhere"),
    Case("task without a model", "train.py --task sst2 --output_dir out", "model|--model"),
    Case("model without a task", "train.py --model base --output_dir out", "task|--task"),
    Case("model without a corpus", "train.py --model base --task task.yaml --output_dir out", "corpus|--corpus"),
    Case("results in the model's folder", "train --output_dir base", "output_dir|base"),
    Case("results below the model's folder", "train --output_dir base/runs/1", "output_dir|base"),
    Case("results in the corpus", "train --corpus texts --output_dir texts/run", "output_dir|corpus",
         lambda root: [(root / "texts").mkdir(), shutil.copy(root / "corpus.txt", root / "texts")]),
    Case("model in the results", "train --model out/teacher", "model|output_dir", copied("base", "out/teacher")),
    Case("results in a file", "train --output_dir task.yaml", "output_dir|task.yaml"),
    Case("results below a file", "train --output_dir task.yaml/run", "output_dir"),
    Case("splits that the task lacks", "train --extra_validation_files.other rows.jsonl", "extra_validation_files|other"),
    Case("token of the hub in a setting", f"train --model https://hf_{'a' * 34}@huggingface.co/a/b", "no token|***"),
    Case("password in a setting", "train --corpus https://me:secret@host/a.txt", "no token or password|***@host"),
    Case("address for a hub id", "train --model https://huggingface.co/Qwen/Qwen3-0.6B", "model|hub id"),
    Case("rank beyond the world", "train", "RANK|WORLD_SIZE", variables(RANK="2", WORLD_SIZE="2")),
    Case("rank that is no number", "train", "RANK|'one'", variables(RANK="one", WORLD_SIZE="1")),
    Case("world without a meeting place", "train", "MASTER_ADDR", variables(RANK="0", WORLD_SIZE="2", MASTER_ADDR="")),
]  # fmt: skip

# ------------------------------------------------------------------------------------------------ files of settings

SETTINGS = [
    Case("no such file", "train --config nowhere.yaml", "config|nowhere.yaml"),
    Case("a folder", "train --config base", "config|base"),
    Case("broken YAML", "train --config my.yaml", "config|my.yaml|line 2", write("my.yaml", "seed: [1\nmax_length: 3")),
    Case("tabs in YAML", "train --config my.yaml", "config|my.yaml", write("my.yaml", "distill:\n\tlambda_logits: 3\n")),
    Case("a list of settings", "train --config my.yaml", "config|my.yaml|keys and values", write("my.yaml", "- seed: 1\n")),
    Case("a text of settings", "train --config my.yaml", "config|my.yaml", write("my.yaml", "just words\n")),
    Case("unknown setting in a file", "train --config my.yaml", "lambda_logit|Did you mean distill.lambda_logits",
         write("my.yaml", "distill: {lambda_logit: 3}\n")),
    Case("unknown section in a file", "train --config my.yaml", "distil|Did you mean distill", write("my.yaml", "distil: {seed: 3}\n")),
    Case("wrong type in a file", "train --config my.yaml", "max_length|long", write("my.yaml", "max_length: long\n")),
    Case("number with a unit", "train --config my.yaml", "learning_rate|5e-5x",
         write("my.yaml", "teacher: {learning_rate: 5e-5x}\n")),
    Case("the same setting twice", "train --config my.yaml", "config|seed|twice", write("my.yaml", "seed: 1\nseed: 2\n")),
    Case("another encoding", "train --config my.yaml", "config|UTF-8", write("my.yaml", "task: caf\xe9\n".encode("latin-1"))),
    Case("binary", "train --config my.yaml", "config|my.yaml", write("my.yaml", bytes(range(256)))),
    Case("an object of Python", "train --config my.yaml", "config|my.yaml",
         write("my.yaml", "seed: !!python/object/apply:os.getpid []\n")),
    Case("nested too deep", "train --config my.yaml", "config|my.yaml", write("my.yaml", "seed: " + "[" * 3000)),
    Case("a section that is a list", "train --config my.yaml", "config|settings below `distill:`|['x']", write("my.yaml", "distill:\n- x\n")),
    Case("a number beyond every float", "train --config my.yaml", "config|line 1|too large", write("my.yaml", f"seed: {'9' * 400}\n")),
    Case("the recipe's name as a file", "train.py --recipe quick.yaml", "recipe|quick"),
]  # fmt: skip

# ------------------------------------------------------------------------------------------------ models and tokenizers

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
LAYER = "model.layers.1.mlp.up_proj.weight"


def without(name: str) -> Callable[[dict], dict]:
    return lambda found: {key: value for key, value in found.items() if key != name}


MODELS = [
    Case("no such folder", "train --model ./nowhere", "model|no such folder"),
    Case("no such hub id", "train --model nobody/nothing", "model|nobody/nothing"),
    Case("an empty folder", "train --model empty", "model|without config.json|nothing", folder("empty")),
    Case("a repository in the hub's cache", "train --model models--a--b", "hub's cache|snapshots/abc", copied("base", "models--a--b/snapshots/abc")),
    Case("a run", "train --model run", "model|a run of this project"),
    Case("an adapter without its settings", "train --model lora", "LoRA adapter|merge",
         both(folder("lora"), write("lora/adapter_model.safetensors", b"..."))),
    Case("a GGUF file under another name", "train --model m.bin", "GGUF file|.gguf", write("m.bin", b"GGUF\x03\x00\x00\x00")),
    Case("quantized by mlx", "train", "full-precision|quantization", edit("base/config.json", quantization={"group_size": 64, "bits": 4})),
    Case("quantized as compressed-tensors", "train", "full-precision|compressed-tensors",
         edit("base/config.json", quantization_config={"quant_method": "compressed-tensors"})),
    Case("a file", f"train --model {WEIGHTS}", "model|a file"),
    Case("pickled weights", "train --model old.bin", "model|pickled", write("old.bin", b"\x80\x02}q\x00.")),
    Case("a GGUF file that is none", "train --model m.gguf", "m.gguf", write("m.gguf", b"not a model at all")),
    Case("a GGUF file cut short", "train --model m.gguf", "m.gguf", write("m.gguf", b"GGUF\x03\x00\x00\x00\x01")),
    Case("an empty GGUF file", "train --model m.gguf", "m.gguf", write("m.gguf", b"")),
    Case("no config.json", "train", "model|without config.json", remove("base/config.json")),
    Case("empty config.json", "train", "config.json|JSON", write("base/config.json", "")),
    Case("config.json with a byte order mark", "train", "config.json|byte order mark",
         lambda root: (root / "base/config.json").write_bytes(b"\xef\xbb\xbf" + (root / "base/config.json").read_bytes())),
    Case("tokenizer.json with a byte order mark", "train", "tokenizer.json|byte order mark",
         lambda root: (root / "base/tokenizer.json").write_bytes(b"\xef\xbb\xbf" + (root / "base/tokenizer.json").read_bytes())),
    Case("config.json that is no JSON", "train", "config.json|JSON", write("base/config.json", "model_type: qwen3")),
    Case("config.json that is a list", "train", "config.json|list", write("base/config.json", "[1]")),
    Case("config.json that is binary", "train", "config.json|JSON", write("base/config.json", bytes(range(200, 256)))),
    Case("config.json that is a folder", "train", "model|config.json", folder("base/config.json")),
    Case("config.json that is a Git LFS pointer", "train", "config.json|git lfs pull", write("base/config.json", POINTER)),
    Case("config.json that is a web page", "train", "config.json|web page", write("base/config.json", PAGE)),
    Case("another architecture", "train", "model|gpt2", edit("base/config.json", model_type="gpt2")),
    Case("a mixture of experts", "train", "model|qwen3_moe", edit("base/config.json", model_type="qwen3_moe")),
    Case("a model with images", "train", "model|'gemma3'|gemma3_text", edit("base/config.json", model_type="gemma3")),
    Case("a classifier", "train", "architectures", edit("base/config.json", architectures=["Qwen3ForSequenceClassification"])),
    Case("a model of its own code", "train", "never run", edit("base/config.json", model_type="mine", auto_map={"AutoConfig": "m.C"})),
    Case("quantized with GPTQ", "train", "full-precision|gptq", edit("base/config.json", quantization_config={"quant_method": "gptq"})),
    Case("quantized by bitsandbytes", "train", "full-precision|load_in_4bit",
         edit("base/config.json", quantization_config={"load_in_4bit": True})),
    Case("quantized with AWQ by a file", "train", "quant_config.json", write("base/quant_config.json", "{}")),
    Case("weights in 8 bits", "train", "codes|F8_E4M3", tensors(lambda f: f | {LAYER: f[LAYER].to(torch.float8_e4m3fn)})),
    Case("a LoRA adapter", "train", "LoRA adapter|merge", write("base/adapter_config.json", '{"base_model_name_or_path": "a/b"}')),
    Case("a ternary student", "train --model run/distill", "model|ternary student"),
    Case("a packed file", "train --model run/export/student.safetensors", "model|a file"),
    Case("the authors' own format", "train", "own format", both(remove("base/config.json"), write("base/params.json", "{}"))),
    Case("no weights", "train", "without weights", remove(WEIGHTS)),
    Case("empty weights", "train", "model.safetensors", write(WEIGHTS, b"")),
    Case("weights cut short", "train", "whole safetensors|model.safetensors", cut(WEIGHTS, -100)),
    Case("weights that are a Git LFS pointer", "train", "model.safetensors|git lfs pull", write(WEIGHTS, POINTER)),
    Case("weights that are a web page", "train", "model.safetensors|web page", write(WEIGHTS, PAGE)),
    Case("weights that are a folder", "train", "model", folder(WEIGHTS)),
    Case("weights under other names", "train", "missing|_orig_mod.",
         tensors(lambda found: {f"_orig_mod.{name}": value for name, value in found.items()})),
    Case("a tensor missing", "train", f"1 of|{LAYER}", tensors(without(LAYER))),
    Case("a tensor too many", "train", "1 more|extra", tensors(lambda found: found | {"model.extra": torch.zeros(2)})),
    Case("a tensor of another shape", "train", f"{LAYER}|shape", tensors(lambda found: found | {LAYER: torch.zeros(3, 3)})),
    Case("a NaN in a weight", "train", f"model: expected finite weights|1 of|{LAYER}",
         tensors(lambda f: f | {LAYER: f[LAYER].index_fill(0, torch.tensor([3]), 0.0).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.nan))})),
    Case("a weight beyond float16", "train", "model: expected finite weights|float16", tensors(lambda f: f | {LAYER: f[LAYER] * 1e9})),
    Case("an infinity in the weights of a teacher that is not trained", "train --teacher.model other --teacher.finetuned true", "teacher.model: expected finite weights",
         both(copied("base", "other"), tensors(lambda f: f | {LAYER: f[LAYER] / 0}, "other/model.safetensors"))),
    Case("shard missing", "train", "1 of 2 shards|00002", sharded),
    Case("index that is no JSON", "train", "index.json", both(sharded, write("base/model.safetensors.index.json", "{"))),
    Case("fewer rows than the config says", "train", "vocab_size|rows", tensors(lambda f: f | {EMBEDDING: f[EMBEDDING][:-1].clone()})),
    Case("head announced and missing", "train", "tie_word_embeddings|lm_head", edit("base/config.json", tie_word_embeddings=False)),
    Case("width as a text", "train", "config.json|hidden_size", edit("base/config.json", hidden_size="64")),
    Case("no heads", "train", "config.json", edit("base/config.json", num_attention_heads=0)),
    Case("heads of another number", "train", "k_proj|shape", edit("base/config.json", num_key_value_heads=3)),
    Case("no layers", "train", "num_hidden_layers", edit("base/config.json", num_hidden_layers=0)),
    Case("more layers than there are", "train", "2 layers, and 9", edit("base/config.json", num_hidden_layers=9)),
    Case("no positions", "train", "max_position_embeddings", edit("base/config.json", max_position_embeddings=0)),
    Case("positions that are a text", "train", "max_position_embeddings", edit("base/config.json", max_position_embeddings="128")),
    Case("positions that are null", "train", "max_position_embeddings", edit("base/config.json", max_position_embeddings=None)),
    Case("dynamic RoPE", "train", "rope_parameters|dynamic",
         edit("base/config.json", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})),
    Case("heads too wide for any memory", "train", "model|heads too wide", edit("base/config.json", head_dim=2**31)),
    Case("RoPE without frequencies", "train", "config.json|frequencies",
         edit("base/config.json", rope_parameters={"rope_type": "default", "rope_theta": 0.0})),
    Case("RoPE of an unknown kind", "train", "config.json|clever",
         edit("base/config.json", rope_parameters={"rope_type": "clever", "factor": 2.0, "rope_theta": 1e4})),
    Case("layers of linear attention", "train", "config.json: layer_types|linear_attention",
         edit("base/config.json", layer_types=["linear_attention", "full_attention"])),
    Case("an epsilon below zero", "train", "config.json: rms_norm_eps|-1.0", edit("base/config.json", rms_norm_eps=-1.0)),
    Case("dropout of everything", "train", "config.json: attention_dropout|5.0", edit("base/config.json", attention_dropout=5.0)),
    Case("another activation", "train", "hidden_act|relu", edit("base/config.json", hidden_act="relu")),
    Case("end token outside the embedding", "train", "eos_token_id|999999", edit("base/config.json", eos_token_id=999999)),
    Case("padding token outside the embedding", "train", "pad_token_id|-1", edit("base/config.json", pad_token_id=-1)),
    Case("generation_config.json that is no JSON", "train", "generation_config.json", write("base/generation_config.json", "{")),
    Case("generation_config.json of another end token", "train", "generation_config.json|eos_token_id",
         write("base/generation_config.json", '{"eos_token_id": [0, 70000]}')),
    Case("generation_config.json of another version", "train", "generation_config.json|cache_implementation",
         write("base/generation_config.json", '{"cache_implementation": "clever"}')),
    Case("no tokenizer", "train", "tokenizer|tokenizer.json", remove("base/tokenizer.json")),
    Case("empty tokenizer.json", "train", "tokenizer.json", write("base/tokenizer.json", "")),
    Case("tokenizer.json of something else", "train", "tokenizer.json", write("base/tokenizer.json", '{"a": 1}')),
    Case("tokenizer.json that is a Git LFS pointer", "train", "tokenizer.json|git lfs pull", write("base/tokenizer.json", POINTER)),
    Case("tokenizer_config.json that is no JSON", "train", "tokenizer_config.json", write("base/tokenizer_config.json", "{'a'}")),
    Case("no end token", "train", "tokenizer|eos_token", write("base/tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast"}')),
    Case("end token that has no row", "train", "tokenizer|beyond|<none>",
         both(edit("base/tokenizer_config.json", eos_token="<none>"), edit("base/config.json", vocab_size=266),
              tensors(lambda f: f | {EMBEDDING: f[EMBEDDING][:266].clone()}))),
    Case("tokenizer of its own code alone", "train", "tokenizer",
         both(remove("base/tokenizer.json"), write("base/vocab.json", "{}"),
              edit("base/tokenizer_config.json", tokenizer_class="MyTokenizer", auto_map={"AutoTokenizer": ["my.MyTokenizer", None]}))),
    Case("more words than the embedding has", "train", "tokenizer|beyond",
         both(edit("base/config.json", vocab_size=200), tensors(lambda f: f | {EMBEDDING: f[EMBEDDING][:200].clone()}))),
    Case("broken chat template", "train", "chat_template",
         both(edit("base/tokenizer_config.json", chat_template="{% for %}"), append("task.yaml", "chat: true\n"))),
    Case("chat template that refuses", "train", "chat_template|no user",
         both(edit("base/tokenizer_config.json", chat_template="{{ raise_exception('no user') }}"), append("task.yaml", "chat: true\n"))),
    Case("teacher that is not there", "train --teacher.model nowhere/big", "teacher.model|nowhere"),
    Case("teacher of another family", "train --teacher.model other", "teacher.model|gpt2",
         both(copied("base", "other"), edit("other/config.json", model_type="gpt2"))),
    Case("teacher with another tokenizer", "train --teacher.model other", "teacher.model|tokens differ",
         both(copied("base", "other"), replaced("other/tokenizer.json", '"<think>"', '"<thinks>"'))),
    Case("student that is none", "train --student base", "student|bitdistill"),
    Case("student without weights", "train --student empty", "student|model.safetensors", folder("empty")),
    Case("student of a later version", "train --student run/distill", "format_version",
         edit("run/distill/config.json", bitdistill={"format_version": 99, "norms": "two", "subln_eps": 1e-6})),
    Case("student of other quantizers", "train --student run/distill --refine.embedding int8", "refine.embedding|fp16"),
    Case("student whose record is damaged", "train --student run/distill", "bitdistill|norms",
         edit("run/distill/config.json", bitdistill={"format_version": 1, "norms": 7, "subln_eps": "x"})),
    Case("trimmed vocabulary of a student", "train --student run/distill --refine.vocabulary trimmed", "refine.vocabulary"),
]  # fmt: skip

# ------------------------------------------------------------------------------------------------ rows and tasks

ROWS = [
    Case("no such file", "train --train_file nowhere.jsonl", "--train_file|nowhere.jsonl"),
    Case("a folder", "train --train_file base", "--train_file|base"),
    Case("a spreadsheet", "train --train_file rows.xlsx", "--train_file|.csv|rows.xlsx", write("rows.xlsx", b"PK\x03\x04")),
    Case("a spreadsheet under another name", "train --train_file a.csv", "zip archive", write("a.csv", b"PK\x03\x04\x14\x00")),
    Case("an old spreadsheet under another name", "train --train_file a.csv", "office document", write("a.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1")),
    Case("a column twice in Parquet", "train --train_file a.parquet", "text|2 times",
         lambda root: parquet.write_table(pyarrow.Table.from_arrays([["a"], ["b"], [1]], names=["text", "text", "label"]), root / "a.parquet")),
    Case("a database under another name", "train --train_file a.csv", "SQLite", write("a.csv", b"SQLite format 3\0")),
    Case("Parquet under another name", "train --train_file a.csv", "Parquet", write("a.csv", b"PAR1....PAR1")),
    Case("Parquet cut short", "train --train_file a.parquet", "a.parquet", write("a.parquet", b"PAR1....")),
    Case("a Git LFS pointer", "train", "git lfs pull", write("rows.jsonl", POINTER)),
    Case("Parquet that is a Git LFS pointer", "train --train_file a.parquet", "git lfs pull", write("a.parquet", POINTER)),
    Case("an empty file", "train", "rows.jsonl|at least one row", write("rows.jsonl", "")),
    Case("blank lines", "train", "rows.jsonl|at least one row", write("rows.jsonl", "\n \n")),
    Case("a header alone", "train --train_file a.csv", "a header and no data", write("a.csv", "text,label\n")),
    Case("a column missing", "train", "columns|sentence", rows('{"sentence": "x", "label": 1}')),
    Case("columns of another case", "train --train_file a.csv", "columns|Text", write("a.csv", "Text,Label\nx,1\n")),
    Case("the same column twice", "train --train_file a.csv", "text|2 times", write("a.csv", "text,text,label\nx,y,1\n")),
    Case("the same key twice", "train", "text|twice", rows('{"text": "x", "text": "y", "label": 1}')),
    Case("a line that is no JSON", "train", "row 2", rows(GOOD, '{"text": "x", "label"')),
    Case("two objects in a line", "train", "row 1", rows(GOOD + GOOD)),
    Case("a line that is a number", "train", "row 2", rows(GOOD, "3")),
    Case("single quotes", "train", "row 1", rows("{'text': 'x', 'label': 1}")),
    Case("an array cut short", "train", "rows.jsonl", write("rows.jsonl", f"[{GOOD},\n")),
    Case("columns in place of rows", "train", "text", rows('{"text": ["a", "b"], "label": [0, 1]}')),
    Case("a label that is none", "train", "label|got 7 in row 2", rows(GOOD, '{"text": "x", "label": 7}')),
    Case("a label that is a word", "train", "label|'good'", rows('{"text": "x", "label": "good"}')),
    Case("a label that is null", "train", "label|None in row 1", rows('{"text": "x", "label": null}')),
    Case("no label in a row", "train", "label|None in row 2", rows(GOOD, '{"text": "x"}')),
    Case("hidden labels of a test split", "train", "label|-1", rows('{"text": "x", "label": -1}')),
    Case("a text that is null", "train", "text|None in row 1", rows('{"text": null, "label": 1}')),
    Case("a text that is a list", "train", "text|a text|row 1", rows('{"text": ["x"], "label": 1}')),
    Case("not a number", "train", "text|nan in row 1", rows('{"text": NaN, "label": 1}')),
    Case("half a character", "train", "surrogate|row 1", rows('{"text": "\\ud83d", "label": 1}')),
    Case("cells too many", "train --train_file a.csv", "3 cells in row 2 (line 3)", write("a.csv", "text,label\nx,1\na, b,0\n")),
    Case("cells too few", "train --train_file a.csv", "1 cells in row 1", write("a.csv", "text,label\nx\n")),
    Case("an open quote", "train --train_file a.csv", "a.csv|quote", write("a.csv", 'text,label\n"x,1\ny,0\n')),
    Case("another encoding", "train --train_file a.csv", "line 2|0xe9|iconv", write("a.csv", "text,label\ncaf\xe9,1\n".encode("latin-1"))),
    Case("UTF-16 without a mark", "train --train_file a.csv", "UTF-16LE", write("a.csv", ("text,label\n" + "x,1\n" * 9).encode("utf-16-le"))),
    Case("compressed and cut short", "train --train_file a.csv.gz", "a.csv.gz", write("a.csv.gz", b"\x1f\x8b\x08\x00\x00\x00")),
    Case("compressed by name alone", "train --train_file a.jsonl.zst", "a.jsonl.zst", write("a.jsonl.zst", b"\x28\xb5\x2f\xfd....")),
    Case("validation rows of another kind", "train --validation_file a.csv", "a.csv|sentence",
         write("a.csv", "sentence,label\nx,1\n")),
    Case("every problem at once", "train --validation_file nowhere.csv --corpus nowhere.txt --report_to [x]",
         "4 problems|--validation_file|corpus|report_to|--train_file", remove("rows.jsonl")),
    Case("no room for the text", "train --max_length 4", "max_length|room"),
    Case("no room for the answer", "train --task summaries.yaml --train_file summaries.jsonl --validation_file summaries.jsonl --max_length 70",
         "max_length|row 2"),
    Case("an empty summary", "train --task summaries.yaml --train_file s.jsonl --validation_file s.jsonl", "summary|row 1",
         write("s.jsonl", '{"text": "x", "summary": " "}\n')),
    Case("no such task", "train --task sst3", "task|sst2|sst3"),
    Case("no such task file", "train --task mine.yaml", "task|mine.yaml"),
    Case("a folder as task", "train --task base", "task|base"),
    Case("task that is no YAML", "train", "task.yaml|YAML", write("task.yaml", "kind: [classification\n")),
    Case("an empty task", "train", "task.yaml|keys and values", write("task.yaml", "")),
    Case("a list as task", "train", "task.yaml|keys and values", write("task.yaml", "- kind\n")),
    Case("a task in another encoding", "train", "task.yaml|UTF-8", append("task.yaml", "# caf\xe9\n".encode("latin-1"))),
    Case("a binary task", "train", "task.yaml", write("task.yaml", bytes(range(128)))),
    Case("unknown key of a task", "train", "lables|Did you mean labels", task("labels:", "lables:")),
    Case("key of a task missing", "train", "truncate_column", task("truncate_column: text", "")),
    Case("kind that is none", "train", "kind|regression", task("classification", "regression")),
    Case("kind that is a list", "train", "kind", task("kind: classification", "kind: [classification]")),
    Case("prompt without a column", "train", "prompt|placeholders", task("{text}", "text")),
    Case("prompt that is a number", "train", "prompt", task('prompt: "{text}\\nIt was"', "prompt: 7")),
    Case("prompt that ends in a space", "train", "prompt|white space", task("It was", "It was ")),
    Case("prompt with a bare brace", "train", "prompt|braces", task("{text}", "{text} {")),
    Case("prompt with more than names", "train", "prompt|braces", task("{text}", "{text.__class__}")),
    Case("column to be cut that is none", "train", "truncate_column|txt", task("truncate_column: text", "truncate_column: txt")),
    Case("column to be cut that is a list", "train", "truncate_column", task("truncate_column: text", "truncate_column: [text]")),
    Case("no label column", "train", "label_column", task("label_column: label", "label_column: ")),
    Case("label column that is a number", "train", "label_column", task("label_column: label", "label_column: 3")),
    Case("label words that YAML takes for truths", "train", "labels|Quote", task("{0: bad, 1: good}", "{0: no, 1: yes}")),
    Case("one label", "train", "labels|two", task("{0: bad, 1: good}", "{0: bad}")),
    Case("labels as a list", "train", "labels|value: word", task("{0: bad, 1: good}", "[bad, good]")),
    Case("labels that differ in type alone", "train", "labels|differ", task("{0: bad, 1: good}", '{0: bad, "0": good}')),
    Case("label words of which one begins another", "train", "labels|begins", task("{0: bad, 1: good}", "{0: bad, 1: badly}")),
    Case("a label word missing", "train", "labels|word", task("{0: bad, 1: good}", "{0: bad, 1: }")),
    Case("splits as a list", "train", "splits", append("task.yaml", "splits: [train, validation]\n")),
    Case("splits that are no names", "train", "splits", append("task.yaml", "splits: {train: 3}\n")),
    Case("chat that is no truth", "train", "chat", append("task.yaml", "chat: perhaps\n")),
    Case("name that is a list", "train", "name", append("task.yaml", "name: [a]\n")),
    Case("answers of no tokens", "train --task summaries.yaml", "max_new_tokens", replaced("summaries.yaml", "60", "0")),
    Case("answers of many tokens", "train --task summaries.yaml", "max_new_tokens", replaced("summaries.yaml", "60", "many")),
]  # fmt: skip

# ------------------------------------------------------------------------------------------------ corpora

LINE = '{"text": "the thing in the thing"}\n'

CORPORA = [
    Case("no such file", "train --corpus nowhere.txt", "corpus|nowhere.txt"),
    Case("no such folder", "train --corpus ./nowhere", "corpus|nowhere"),
    Case("an empty folder", "train --corpus empty", "corpus|empty", folder("empty")),
    Case("a pattern without files", "train --corpus *.parquet", "corpus|*.parquet"),
    Case("an empty file", "train", "corpus|empty", write("corpus.txt", "")),
    Case("blank lines", "train", "corpus|tokens", write("corpus.txt", "\n\n\n")),
    Case("too short", "train", "corpus|at least 128 tokens", write("corpus.txt", "too short")),
    Case("hidden files alone", "train --corpus texts", "corpus|texts",
         lambda root: [(root / "texts").mkdir(), (root / "texts/.a.txt").write_text("x")]),
    Case("files of two kinds", "train --corpus texts", "one kind",
         lambda root: [(root / "texts").mkdir(), *((root / f"texts/a.{kind}").write_text(LINE) for kind in ("txt", "jsonl"))]),
    Case("a kind that is not read", "train --corpus corpus.docx", "corpus|.docx", write("corpus.docx", b"PK\x03\x04")),
    Case("a PDF under another name", "train", "corpus|PDF", write("corpus.txt", b"%PDF-1.7 ...")),
    Case("a Git LFS pointer", "train", "git lfs pull", write("corpus.txt", POINTER)),
    Case("another encoding at the end", "train", "corpus|line 401|0xe9", append("corpus.txt", "caf\xe9\n".encode("latin-1"))),
    Case("NUL at the end", "train", "corpus|NUL|line 401", append("corpus.txt", b"a\0b\n")),
    Case("binary", "train", "corpus", write("corpus.txt", bytes(range(256)) * 99)),
    Case("broken JSON at the end", "train --corpus a.jsonl", "a.jsonl|row 401", write("a.jsonl", LINE * 400 + '{"text": "x\n')),
    Case("a number at the end", "train --corpus a.jsonl", "texts|7 in row 401", write("a.jsonl", LINE * 400 + '{"text": 7}\n')),
    Case("half a character at the end", "train --corpus a.jsonl", "surrogate|row 401",
         write("a.jsonl", LINE * 400 + '{"text": "\\ud83d"}\n')),
    Case("a column missing", "train --corpus a.jsonl", "columns body|--corpus_column", write("a.jsonl", '{"body": "x"}\n')),
    Case("a column missing in the last file", "train --corpus texts", "columns body|b.jsonl",
         lambda root: [(root / "texts").mkdir(), (root / "texts/a.jsonl").write_text(LINE * 400),
                       (root / "texts/b.jsonl").write_text('{"body": "x"}\n')]),
    Case("a named column that is not there", "train --corpus a.jsonl --corpus_column body", "expected body|columns text", write("a.jsonl", LINE)),
    Case("a column of numbers", "train --corpus a.jsonl", "texts|7 in row 1", write("a.jsonl", '{"text": 7}\n')),
    Case("nulls alone", "train --corpus a.jsonl", "corpus|no text", write("a.jsonl", '{"text": null}\n' * 9)),
    Case("Parquet that is none", "train --corpus a.parquet", "a.parquet", write("a.parquet", b"PAR1 and so on")),
    Case("compressed and cut short", "train --corpus a.txt.gz", "a.txt.gz", write("a.txt.gz", b"\x1f\x8b\x08\x00\x00\x00")),
]  # fmt: skip

# ------------------------------------------------------------------------------------------------ bitdistill COMMAND

PACKED = "run/export/student.safetensors"
EVAL = "eval run --task task.yaml --validation_file rows.jsonl"

COMMANDS = [
    Case("no such command", "genrate run x", "COMMAND|Did you mean generate"),
    Case("env with an argument", "env now", "command line|now"),
    Case("generate: no such folder", "generate nowhere x", "RUN_OR_FILE|nowhere"),
    Case("generate: a run that is not finished", "generate base x", "RUN_OR_FILE|export"),
    Case("generate: nothing to read", "generate", "command line|run_or_file"),
    Case("generate: no prompt", "generate run", "prompt|neither"),
    Case("generate: an empty prompt", "generate bare.safetensors ''", "tokenizer"),
    Case("generate: prompt and file", "generate run x --prompts_file prompts.txt", "prompt|both"),
    Case("generate: unknown option", "generate run x --max_tokens 3", "max_tokens|max_new_tokens"),
    Case("generate: a word for a number", "generate run x --max_new_tokens many", "max_new_tokens|many"),
    Case("generate: no tokens", "generate run x --max_new_tokens 0", "max_new_tokens|got 0"),
    Case("generate: no threads", "generate run x --threads 0", "threads|got 0"),
    Case("generate: a slip of the finger", "generate run x --threads 100000", "threads|got 100,000"),
    Case("generate: no context", "generate run x --context 0", "context|got 0"),
    Case("generate: context beyond the model", "generate run x --context 5000", "context|128|5,000"),
    Case("generate: prompt beyond the context", f"generate run '{'the thing ' * 90}'", "prompt|at most"),
    Case("generate: temperature below zero", "generate run x --temperature -1", "temperature|-1"),
    Case("generate: temperature that is no number", "generate run x --temperature nan", "temperature|nan"),
    Case("generate: top_k of zero", "generate run x --temperature 1 --top_k 0", "top_k|got 0"),
    Case("generate: top_p above one", "generate run x --temperature 1 --top_p 2", "top_p|got 2"),
    Case("generate: top_k without a temperature", "generate run x --top_k 5", "temperature"),
    Case("generate: penalty of zero", "generate run x --repetition_penalty 0", "repetition_penalty"),
    Case("generate: seed below zero", "generate run x --temperature 1 --seed -1", "seed|-1"),
    Case("generate: cache that is none", "generate run x --kv_cache fp8", "kv_cache|fp8"),
    Case("generate: device that is none", "generate run x --device tpu", "device|tpu"),
    Case("generate: too many lines at once", "generate run --prompts_file prompts.txt --slots 99", "slots|99"),
    Case("generate: no such file of prompts", "generate run --prompts_file nowhere.txt", "prompts_file|nowhere.txt"),
    Case("generate: prompts in a folder", "generate run --prompts_file base", "prompts_file|base"),
    Case("generate: no prompts in a file", "generate run --prompts_file p.txt", "prompts_file|none", write("p.txt", "\n \n")),
    Case("generate: prompts in another encoding", "generate run --prompts_file p.txt", "prompts_file|UTF-8|line 2",
         write("p.txt", "fine\ncaf\xe9\n".encode("latin-1"))),
    Case("generate: a prompt of a file beyond the context", "generate run --prompts_file p.txt", "prompts_file|line 3",
         write("p.txt", "fine\n\n" + "the thing " * 90)),
    Case("generate: another safetensors file", f"generate {WEIGHTS} x", "RUN_OR_FILE|format pt"),
    Case("generate: an empty file", "generate e.safetensors x", "RUN_OR_FILE|safetensors", write("e.safetensors", b"")),
    Case("generate: a text file", "generate task.yaml x", "RUN_OR_FILE|safetensors"),
    Case("generate: a file cut short", "generate run x", "RUN_OR_FILE|truncated", cut(PACKED, -500)),
    Case("generate: a Git LFS pointer", "generate run x", "RUN_OR_FILE|git lfs pull", write(PACKED, POINTER)),
    Case("generate: a later version", "generate run x", "version 99|Update", header(version="99")),
    Case("generate: an earlier version", "generate run x", "version 1", header(version="1")),
    Case("generate: another format", "generate run x", "format gguf", header(format="gguf")),
    Case("generate: a config that is no JSON", "generate run x", "RUN_OR_FILE|config", header(config="{")),
    Case("generate: a config that is empty", "generate run x", "RUN_OR_FILE|config", header(config="{}")),
    Case("generate: a byte that changed", "generate run x", "RUN_OR_FILE|damaged",
         lambda root: (root / PACKED).write_bytes((root / PACKED).read_bytes()[:-9] + b"\x7f" + (root / PACKED).read_bytes()[-8:])),
    Case("predict: no such folder", "predict nowhere x", "RUN_OR_FILE|nowhere"),
    Case("predict: a file without a task", "predict bare.safetensors x", "RUN_OR_FILE"),
    Case("predict: unknown option", "predict run x --max_row 3", "max_row"),
    Case("consolidate: no such folder", "consolidate nowhere out", "source|nowhere"),
    Case("consolidate: no checkpoint", "consolidate base out", "source|base with none"),
    Case("consolidate: an output that is there", "consolidate run/checkpoints/distill/checkpoint-4 base", "source|no such folder"),
    Case("info: no such folder", "info nowhere", "RUN_OR_FILE|nowhere"),
    Case("info: another safetensors file", f"info {WEIGHTS}", "RUN_OR_FILE|format pt"),
    Case("serve: no such folder", "serve nowhere", "RUN_OR_FILE|nowhere"),
    Case("serve: a word for a port", "serve run --port http", "port|a whole number|'http'"),
    Case("chat: no such folder", "chat nowhere", "RUN_OR_FILE|nowhere"),
    Case("eval: no such folder", "eval nowhere --task task.yaml --validation_file rows.jsonl", "RUN_OR_FILE|nowhere"),
    Case("eval: no task", f"eval {PACKED}", "task|--task"),
    Case("eval: no such task", "eval run --task sst3", "task|sst3"),
    Case("eval: rows that are not there", "eval run --task task.yaml --validation_file nowhere.csv", "--validation_file"),
    Case("eval: rows of another task", "eval run --task summaries.yaml --validation_file rows.jsonl", "columns|summary"),
    Case("eval: no rows", f"{EVAL} --max_rows 0", "max_rows|got 0"),
    Case("eval: a word for a number", f"{EVAL} --max_rows all", "max_rows"),
    Case("eval: no length", f"{EVAL} --max_length 0", "max_length|got 0"),
    Case("eval: length beyond the model", f"{EVAL} --max_length 4096", "max_length|128"),
    Case("eval: no room", f"{EVAL} --max_length 4", "max_length|room"),
    Case("eval: no threads", f"{EVAL} --threads -1", "threads|got -1"),
    Case("eval: unknown option", f"{EVAL} --treads 1", "treads"),
    Case("eval: setting that is none", f"{EVAL} --setting FP16", "setting|FP16"),
    Case("eval: setting of a file", f"eval {PACKED} --task task.yaml --validation_file rows.jsonl --setting FP16-SFT", "setting|run directory"),
    Case("eval: setting that was not trained", f"{EVAL} --setting FP16-SFT", "teacher"),
    Case("eval: baseline that was not trained", f"{EVAL} --setting BitNet-SFT", "baseline"),
    Case("eval: splits that the task lacks", f"{EVAL} --extra_validation_files.other rows.jsonl", "extra_validation_files|other"),
    Case("eval: result into no folder", f"{EVAL} --json_file nowhere/out.json", "json_file|nowhere"),
    Case("eval: result into a folder", f"{EVAL} --json_file base", "json_file|base"),
    Case("eval: text that is not there", "eval run --perplexity nowhere.txt", "corpus|nowhere.txt"),
    Case("eval: text too short", "eval run --perplexity t.txt --block_size 64", "tokens", write("t.txt", "short")),
    Case("eval: text that is binary", "eval run --perplexity t.txt --block_size 64", "t.txt", write("t.txt", bytes(range(256)))),
    Case("eval: blocks of one", "eval run --perplexity corpus.txt --block_size 1", "block_size|got 1"),
    Case("eval: blocks beyond the model", "eval run --perplexity corpus.txt --block_size 4096", "block_size|128"),
    Case("eval: two kinds at once", "eval run --perplexity corpus.txt --lm_eval sst2", "perplexity|both"),
    Case("eval: settings that are no YAML", "eval run", "config.yaml|YAML", write("run/config.yaml", "a: [")),
    Case("eval: settings that are a list", "eval run", "config.yaml|keys and values", write("run/config.yaml", "[1]")),
    Case("eval: settings of something else", "eval run", "config.yaml|settings of a run", write("run/config.yaml", "model: x\n")),
    Case("eval: settings of other types", "eval run", "config.yaml|task",
         write("run/config.yaml", "model: x\ntask: [a]\nmax_length: long\n")),
    Case("eval: rows that have moved", "eval run", "--validation_file|gone.jsonl",
         replaced("run/config.yaml", "rows.jsonl", "gone.jsonl")),
    Case("export: no such folder", "export nowhere --format gguf", "RUN|nowhere"),
    Case("export: a run that is not finished", "export base --format gguf", "RUN|distill"),
    Case("export: format that is none", "export run --format onnx", "format|onnx"),
    Case("export: no format", "export run", "format"),
    Case("export: into no folder", "export run --format transformers --output nowhere/out", "output|nowhere"),
    Case("export: onto something", "export run --format transformers --output base", "output|base"),
    Case("export: file onto a folder", "export run --format gguf --output base --prove false", "base"),
    Case("export: type that is none", "export run --format gguf --type q9", "type|q9"),
    Case("export: embedding that is none", "export run --format gguf --embedding q9", "embedding|q9"),
    Case("export: no threads", "export run --format transformers --threads 0", "threads|got 0"),
    Case("export: a student without weights", "export run --format transformers", "RUN|distill", remove("run/distill/model.safetensors")),
    Case("export: a student cut short", "export run --format transformers", "safetensors", cut("run/distill/model.safetensors", -50)),
    Case("export: a student without a tokenizer", "export run --format transformers", "tokenizer", remove("run/distill/tokenizer.json")),
    Case("export: a student whose config is damaged", "export run --format transformers", "config.json", write("run/distill/config.json", "{")),
    Case("export: predictions that are damaged", "export run --format transformers", "predictions.jsonl",
         write("run/evaluate/predictions.jsonl", '{"text": "x"}\n{"text":')),
    Case("check: no such folder", "check nowhere/base", "model|nowhere"),
    Case("plan: a number beyond every float", f"plan --model base --tokens {'9' * 400}", "numbers below 1e300|400 digits"),
    Case("check: a file", "check task.yaml", "model|task.yaml"),
    Case("check: a folder without a config", "check empty", "model|config.json", folder("empty")),
    Case("check: a config that is no JSON", "check base", "config.json", write("base/config.json", "{")),
    Case("check: another architecture", "check base", "model_type|gpt2", edit("base/config.json", model_type="gpt2")),
    Case("check: an unknown architecture", "check base", "model", edit("base/config.json", model_type="mine")),
    Case("check: norms that are none", "check base --norms three", "norms|three"),
    *(Case(f"{command[:40]}: a home that is not there", command, "expected a path|~nobodyhere")
      for command in ("report ~nobodyhere/x", "generate ~nobodyhere/x y", "predict ~nobodyhere/x y", "info ~nobodyhere/x", "chat ~nobodyhere/x",
                      "export ~nobodyhere/x --format gguf", "export run --format transformers --output ~nobodyhere/x", "consolidate ~nobodyhere/x out",
                      "plan --model ~nobodyhere/x", f"{EVAL} --json_file ~nobodyhere/x", "eval ~nobodyhere/x",
                      "generate run --prompts_file ~nobodyhere/x", "serve ~nobodyhere/x")),
    *(Case(f"train: a record of a stage that is {content[:20]}", "train", "out/teacher/done.json|the record of a finished stage",
           lambda root, content=content: [(root / "out/teacher").mkdir(parents=True), (root / "out/teacher/done.json").write_text(content)])
      for content in ("[", "[]", "3", '{"settings": 3, "inputs": [], "id": "x"}', "[" * 100_000)),
    Case("report: no such folder", "report nowhere", "RUN|nowhere"),
    Case("report: a file", "report task.yaml", "RUN|task.yaml"),
    Case("report: a folder that is no run", "report base", "RUN|config.yaml"),
    Case("report: onto a folder", "report run", "report.html", folder("run/report.html")),
]  # fmt: skip

# ------------------------------------------------------------------------------------------------ odd, and right

RIGHT = [
    Case("everything right", "train", "", status=0),
    Case("rows of Windows", "train", "", write("rows.jsonl", ("\ufeff" + GOOD + "\r\n").encode()), 0),
    Case("rows of Excel", "train --train_file a.csv", "", write("a.csv", "sep=;\r\ntext;label\r\n007;1\r\n".encode("utf-16")), 0),
    Case("brackets and spaces in a path", "train --train_file 'my [v2] rows.jsonl'", "", write("my [v2] rows.jsonl", GOOD), 0),
    Case("a padding token without a row", "train", "", edit("base/tokenizer_config.json", pad_token="[PAD]"), 0),
    Case("a tokenizer with code of its own beside its file", "train", "",
         edit("base/tokenizer_config.json", tokenizer_class="MyTokenizer", auto_map={"AutoTokenizer": ["my.MyTokenizer", None]}), 0),
    Case("an end token in a padded row", "train", "", edit("base/tokenizer_config.json", eos_token="<none>"), 0),
    Case("control tokens in rows", "train", "", rows('{"text": "<|end|><|start|>", "label": 1}'), 0),
    Case("sampling without do_sample", "train", "", write("base/generation_config.json", '{"temperature": 0.6, "top_p": 0.9}'), 0),
    Case("a report of a run cut off", "report run", "", append("run/metrics.jsonl", '{"stage": "dist'), 0),
    Case("a report of odd numbers", "report run", "",
         write("run/evaluate/scores.json", '{"rows": [{}, 3, {"setting": "x", "score": "y"}], "paired": 3}'), 0),
    Case("a report of odd stages", "report run", "",
         lambda root: [(root / f"run/{name}").write_text('{"layers": 3, "rows": {}, "steps": "x", "seconds": []}')
                       for name in ("distill/done.json", "distill/weights.json", "export/speed.json", "export/proof.json")], 0),
    Case("a report of odd health", "report run", "", write("run/health.jsonl", '{"stage": "distill", "step": 1, "layers": {"a": 3}}\n'), 0),
    Case("a right answer", "generate run 'the thing' --max_new_tokens 2 --threads 1", "", status=0),
]  # fmt: skip

TABLE = {
    "command line": COMMAND_LINE,
    "settings file": SETTINGS,
    "model": MODELS,
    "rows": ROWS,
    "corpus": CORPORA,
    "command": COMMANDS,
    "right": RIGHT,
}
