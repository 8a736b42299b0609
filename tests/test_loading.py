"""Models and tokenizers come in right, or are refused in one line that names what is wrong: a folder for each way to be so."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_gguf import LLAMA3, MERGES, TOKENS
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from bitdistill.errors import UserError
from bitdistill.student.loading import check_same_tokenizer, load_language_model, load_tokenizer, tokens_beyond
from bitdistill.student.model_folder import read_model
from bitdistill.student.model_weights import EMBEDDING, HEAD, INDEX
from bitdistill.student.refine import load_student, refine, save_student

ROWS = len(TOKENS) + 5  # a padded vocabulary, as many models have
SIZES = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": None,
}
IDS = torch.arange(2, 40)[None]


def tokenizer(tokens=TOKENS, merges=MERGES) -> PreTrainedTokenizerFast:
    pairs = [tuple(merge.split(" ")) for merge in merges]
    backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=tokens[1], eos_token=tokens[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A right model folder, tied."""
    path = tmp_path_factory.mktemp("models") / "base"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=True), dtype=torch.float32)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def base(folder, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(folder, tmp_path / "base"))


def change_config(path: Path, **values) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_tensors(path: Path, change) -> None:
    tensors = change(load_file(path / "model.safetensors"))
    save_file({name: value.contiguous() for name, value in tensors.items()}, path / "model.safetensors")


def refused(path: Path, *words: str) -> str:
    with pytest.raises(UserError) as error:
        load_language_model(path)
    said = str(error.value)
    assert "\n" not in said
    for word in words:
        assert word in said, said
    return said


def test_a_right_folder_has_no_problems_and_gives_the_saved_logits(folder):
    found, problems = read_model(folder)
    assert problems == []
    assert found.notes == []
    assert found.parameters == sum(value.numel() for value in load_file(folder / "model.safetensors").values())
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
        assert torch.equal(load_language_model(folder).eval()(IDS).logits, wanted)


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
        ("quantization_config", {"quant_method": "awq", "bits": 4}, "awq"),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ("quantization_config", {"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ("quantization_config", {"quant_method": "bitnet"}, "bitnet"),
        ("quantization_config", {"quant_method": "fp8"}, "fp8"),
        ("quantization_config", {"quant_method": "mxfp4"}, "mxfp4"),
        ("quantization_config", {"load_in_8bit": True}, "load_in_8bit"),
        ("quantization", {"group_size": 64, "bits": 4}, "group_size"),
        ("compression_config", {"format": "pack-quantized"}, "pack-quantized"),
    ],
)
def test_models_quantized_by_others_are_refused_by_the_name_of_the_method(base, key, value, word):
    change_config(base, **{key: value})
    refused(base, "full-precision weights", word)


def test_quantized_weights_are_known_by_their_files_and_types_where_the_config_is_silent(base):
    (base / "quantize_config.json").write_text("{}")
    refused(base, "quantize_config.json")
    (base / "quantize_config.json").unlink()
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(base, lambda tensors: tensors | {name: tensors[name].to(torch.float8_e4m3fn)})
    refused(base, "F8_E4M3", name)


def test_folders_that_are_no_model_are_called_what_they_are(base, tmp_path):
    (base / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/base"}))
    refused(base, "LoRA adapter of somebody/base", "merge")
    ggufs = tmp_path / "ggufs"
    ggufs.mkdir()
    (ggufs / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    refused(ggufs, "GGUF", "model.gguf")
    refused(ggufs / "model.gguf", "GGUF file")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "params.json").write_text("{}")
    refused(tmp_path / "meta", "authors' own format")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "without config.json", "nothing")
    refused(tmp_path / "nowhere", "no such folder")


@pytest.mark.parametrize(
    ("content", "word"),
    [("{", "in JSON"), ("[1]", "keys and values"), ("\ufeff{}", "byte order mark"), ("", "in JSON")],
)
def test_a_config_that_is_no_json_object(base, content, word):
    (base / "config.json").write_text(content, encoding="utf-8")
    refused(base, word)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Model"}}, "never run"),
        ({"model_type": None}, "None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"num_attention_heads": 0}, "config.json that describes a model"),
        ({"num_attention_heads": 5}, "not a multiple"),
        ({"num_hidden_layers": 3}, "2 layers, and 3"),
        ({"num_hidden_layers": 10**9}, "2 layers, and 1000000000"),
        ({"vocab_size": -3}, "token_id"),
        ({"hidden_act": "gelu"}, "silu"),
        ({"hidden_act": "unheard-of"}, "unheard-of"),
        ({"dtype": "float7"}, "float7"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "unheard-of", "rope_theta": 1e4}}, "unheard-of"),
        ({"intermediate_size": 50}, "[32, 48]"),
        ({"pad_token_id": ROWS}, "pad_token_id"),
        ({"eos_token_id": [0, ROWS + 3]}, "eos_token_id"),
        ({"bos_token_id": -1}, "bos_token_id"),
        ({"bitdistill": {"format_version": 1}}, "ternary student"),
    ],
)
def test_what_the_config_says_wrongly_is_named(base, values, word):
    change_config(base, **values)
    refused(base, word)


def test_remote_code_is_never_run_and_pickles_are_never_read(base):
    (base / "mine.py").write_text("raise SystemExit('this code ran')")
    change_config(base, auto_map={"AutoModelForCausalLM": "mine.Model", "AutoConfig": "mine.Config"})
    load_language_model(base)  # Llama needs no code of the folder's
    torch.save({}, base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    refused(base, "pickled weights", "pytorch_model.bin")


def test_weights_under_other_names_are_never_replaced_by_random_ones(base):
    right = load_file(base / "model.safetensors")
    for prefix in ("_orig_mod.", "module.", "language_model.", "base_model.model."):
        change_tensors(base, lambda _, prefix=prefix: {prefix + name: value for name, value in right.items()})
        refused(base, "missing", prefix, "off")
    change_tensors(base, lambda _: {name.removeprefix("model."): value for name, value in right.items()})
    loaded = load_language_model(base)  # saved by AutoModel, without its head: a tied head is the embedding
    assert torch.equal(loaded.lm_head.weight, right[EMBEDDING])
    change_tensors(base, lambda _: right | {"model.layers.0.extra.weight": torch.zeros(2)})
    refused(base, "1 more", "extra")
    change_tensors(base, lambda _: right | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    load_language_model(base)  # Llama 2 kept its frequencies in the file
    change_tensors(base, lambda _: {name: value for name, value in right.items() if "1.mlp.up" not in name})
    refused(base, "1 of", "model.layers.1.mlp.up_proj.weight")


def test_shards_must_be_there_whole_and_listed(base):
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    parts = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    where = {name: parts[".layers.1." in name] for name in tensors}
    for part in parts:
        save_file({name: value for name, value in tensors.items() if where[name] == part}, base / part)
    refused(base, "no index")
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    load_language_model(base)
    (base / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": {n: p for n, p in where.items() if p == parts[0]}})
    )
    refused(base, "tensors of 1 layers, and 2")
    (base / INDEX).write_text(json.dumps({"weight_map": where}))
    refused(base, "metadata")
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where | {"model.more": parts[1]}}))
    refused(base, "model.more")
    (base / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": where | {"model.more": "../elsewhere.safetensors"}})
    )
    refused(base, "every shard")
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    whole = (base / parts[1]).read_bytes()
    (base / parts[1]).write_bytes(whole[:-40])
    refused(base, "whole safetensors", parts[1])
    (base / parts[1]).unlink()
    refused(base, "1 of 2 shards", parts[1])


def test_the_head_is_as_the_file_has_it(base, tmp_path):
    right = load_file(base / "model.safetensors")
    own = right[EMBEDDING].roll(1, 0) * 0.5
    change_tensors(base, lambda tensors: tensors | {HEAD: own})
    found, problems = read_model(base)
    assert not problems
    assert "untied" in found.notes[0]
    model = load_language_model(base)
    assert torch.equal(model.lm_head.weight, own)
    refine(model)
    with torch.no_grad():
        wanted = model.eval()(IDS).logits
        save_student(tmp_path / "student", model, load_tokenizer(base))
        assert torch.equal(load_student(tmp_path / "student").eval()(IDS).logits, wanted)
    change_tensors(base, lambda tensors: tensors | {HEAD: right[EMBEDDING].clone()})
    model = load_language_model(base)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    change_tensors(base, lambda _: {n: v for n, v in (right | {HEAD: right[EMBEDDING]}).items() if n != EMBEDDING})
    assert torch.equal(load_language_model(base).model.embed_tokens.weight, right[EMBEDDING])
    change_tensors(base, lambda _: right)
    change_config(base, tie_word_embeddings=False)
    refused(base, "tie_word_embeddings", HEAD)


def test_embedding_rows_config_and_tokenizer_must_fit(base):
    change_config(base, vocab_size=ROWS - 1)
    refused(base, "vocab_size", str(ROWS), str(ROWS - 1))
    change_config(base, vocab_size=len(TOKENS) - 3)
    with pytest.raises(UserError, match=r"3 beyond"):
        load_tokenizer(base)


def test_added_tokens_beyond_the_embedding_are_taken_out(base, tmp_path):
    own = tokenizer()
    own.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": [f"<more_{i}>" for i in range(6)]})
    own.chat_template = "{{ messages[0]['content'] }}"
    own.save_pretrained(base)
    assert tokens_beyond(base) == ["<more_4>", "<more_5>"]
    change_config(base, vocab_size=len(TOKENS))
    assert len(tokens_beyond(base)) == 7
    loaded = load_tokenizer(base)
    assert loaded.pad_token == loaded.eos_token
    assert max(loaded("the [PAD]<more_4>")["input_ids"]) < len(TOKENS)
    assert loaded.decode(loaded("the [PAD]")["input_ids"]) == "the [PAD]"
    loaded.save_pretrained(tmp_path / "again")
    assert max(load_tokenizer(tmp_path / "again").get_vocab().values()) < len(TOKENS)
    assert loaded.chat_template == own.chat_template


# The Rust code of the tokenizers library cuts the prefix off the second token of each merge, and panics where it is shorter.
PANIC = json.dumps(
    {
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "ab": 2},
            "merges": ["a b"],
            "continuing_subword_prefix": "###",
        }
    }
)


@pytest.mark.parametrize(
    "content", ["", "{", "{}", "[]", '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}}', PANIC]
)
def test_a_damaged_tokenizer_is_one_line(base, content):
    (base / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer") as error:
        load_tokenizer(base)
    assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_named(base):
    name = "model.layers.1.self_attn.o_proj.weight"

    def spoil(tensors):
        tensors[name][3, 4] = torch.nan
        return tensors

    change_tensors(base, spoil)
    refused(base, name, "1 of")
    change_tensors(base, lambda tensors: tensors | {name: torch.full_like(tensors[name], 1e5)})
    load_language_model(base)
    with pytest.raises(UserError, match=r"float16"):
        load_language_model(base, torch.float16)


@pytest.mark.parametrize("rope", [None, {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, LLAMA3])
def test_ropes_that_the_runtimes_know_come_in(tmp_path, rope):
    config = LlamaConfig(**SIZES, rope_parameters=rope)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    load_language_model(tmp_path)


def test_other_families_with_their_own_ropes_come_in(tmp_path):
    for name, config in (
        ("gemma", Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=8)),
        ("qwen", Qwen3Config(**SIZES, head_dim=16)),
    ):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        load_language_model(tmp_path / name)


def test_a_teacher_must_read_texts_as_the_student_does(base, folder, tmp_path):
    check_same_tokenizer(base, folder)
    swapped = [*TOKENS]
    swapped[40], swapped[41] = swapped[41], swapped[40]
    tokenizer(swapped).save_pretrained(tmp_path / "swapped")
    with pytest.raises(UserError, match=r"2 tokens differ: .* is 41 there and 40 here"):
        check_same_tokenizer(tmp_path / "swapped", folder)
    tokenizer(TOKENS[:-1]).save_pretrained(tmp_path / "smaller")
    with pytest.raises(UserError, match="no token"):
        check_same_tokenizer(tmp_path / "smaller", folder)
    tokenizer(TOKENS, MERGES[::-1][:2]).save_pretrained(tmp_path / "merges")
    with pytest.raises(UserError, match="which reads"):
        check_same_tokenizer(tmp_path / "merges", folder)


def test_mutated_files_end_in_a_right_model_or_one_line(base):
    generator = np.random.default_rng(0)
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    right = {name: (base / name).read_bytes() for name in names}
    for number in range(120):
        name = names[number % len(names)]
        content = bytearray(right[name])
        for _ in range(3):
            place = int(generator.integers(0, min(len(content), 3000)))
            content[place] = int(generator.integers(32, 127))
        if number % 7 == 0:
            content = content[: int(generator.integers(0, len(content)))]
        (base / name).write_bytes(content)
        try:
            load_language_model(base)
            load_tokenizer(base)
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017 - some mutations leave a right folder
        (base / name).write_bytes(right[name])
