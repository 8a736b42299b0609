"""GGUF files of students: blocks exact and as drawn, the third party's reader and model agree, impossible ones are refused."""

import copy

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from bitdistill.errors import UserError
from bitdistill.export.gguf_blocks import TYPES, decode_bytes, encode_codes
from bitdistill.export.gguf_file import gguf_obstacles, write_gguf
from bitdistill.student.layers import bit_linears
from bitdistill.student.refine import refine
from tiny_students import CONFIGS, randomize

gguf = pytest.importorskip("gguf")
TEXTS = ["the quick brown fox jumps over the lazy dog", "a charming film, 12 of 34 liked it: naïve ☃"]


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>", "<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<s>", pad_token="<end>")


def student(name, norms="none", **changes):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    fields = {**config.to_dict(), "vocab_size": 320, "hidden_size": 64, "intermediate_size": 256, "bos_token_id": 1}
    fields |= {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}} if name != "gemma3" else {}
    config = type(config)(**fields | {"eos_token_id": 0, "pad_token_id": 0} | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    refine(model, norms=norms)
    return randomize(model).eval()


def codes_and_scale(rows, columns, groups, seed=0):
    generator = np.random.default_rng(seed)
    codes = generator.integers(-1, 2, (rows, columns)).astype(np.int8)
    codes[0] = 0
    return codes, generator.random((rows, groups), np.float32).astype(np.float16).astype(np.float32) + np.float32(
        2**-10
    )


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("groups", [1, 2])
def test_blocks_hold_codes_and_scales_exactly(kind, groups):
    codes, scale = codes_and_scale(6, 512, groups)
    scale = scale.astype(np.float16).astype(np.float32)
    data = encode_codes(codes, scale, kind)
    assert data.nbytes * 8 == codes.size * TYPES[kind].bits_per_weight
    expected = codes * np.repeat(scale, 512 // groups, axis=1)
    assert np.array_equal(decode_bytes(data, codes.shape, kind), expected)
    one = encode_codes(codes, scale[:1, :1], kind)
    assert np.array_equal(decode_bytes(one, codes.shape, kind), codes * scale[0, 0])


def test_blocks_by_hand():
    codes = np.zeros((1, 64), np.int8)
    codes[0, [0, 1, 16, 33]] = [1, -1, -1, 1]
    scale = np.array([[0.5]], np.float32)
    assert np.float16(0.5).tobytes() == b"\x00\x38"
    q4 = encode_codes(codes, scale, "q4_0")[0]
    assert q4[:4].tolist() == [0x00, 0x38, 0x79, 0x87]  # column 0 is 9, 16 is 7; column 1 is 7, 17 is 8
    assert q4[18:22].tolist() == [0x00, 0x38, 0x88, 0x89]
    q2 = encode_codes(codes, scale, "q2_0")[0]
    assert q2[:3].tolist() == [0x00, 0x38, 0b01_01_00_10]  # columns 3, 2, 1, 0: 0, 0, -1, 1, each plus one
    assert q2[2 + 33 // 4] == 0b01_01_10_01
    wide = np.zeros((1, 256), np.int8)
    wide[0, [0, 33, 128]] = [1, -1, 1]
    q2k = encode_codes(wide, scale, "q2_k")[0]
    assert q2k[:16].tolist() == [0x11] * 16  # scale and offset of 16 columns: once d each
    assert q2k[16:18].tolist() == [0b01_01_01_10, 0b01_01_00_01]  # columns 96, 64, 32, 0; 97, 65, 33, 1
    assert q2k[16 + 32] == 0b01_01_01_10
    assert q2k[80:].tolist() == [0x00, 0x38, 0x00, 0x38]


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["auto", "f16", "q4_0", "q2_0"])
@pytest.mark.parametrize("name", ["llama", "llama_biases", "qwen2", "qwen3"])
def test_every_family_and_type_is_written_and_read_back(name, kind, tmp_path):
    changes = {"qwen2": {"use_sliding_window": False}, "llama": {}}.get(name, {"head_dim": 32})
    model = student(name, **changes)
    sizes = write_gguf(tmp_path / "s.gguf", model, byte_level(), linear_type=kind)
    reader = gguf.GGUFReader(tmp_path / "s.gguf")
    assert reader.fields["general.architecture"].contents() == sizes["architecture"]
    assert sizes["file_bytes"] == (tmp_path / "s.gguf").stat().st_size
    assert sum(sizes["types"].values()) == len(bit_linears(model))
    if kind == "auto":  # 256 columns of down_proj fill a block of TQ2_0, 64 of the others do not
        assert sizes["types"] == {"q4_0": 18, "tq2_0": 3}
    assert list(tmp_path.iterdir()) == [tmp_path / "s.gguf"]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_transformers_reads_the_same_model(name, tmp_path):
    """A third party's reader: what it multiplies by are the ternary weights, and the text it makes ids of is the same."""
    changes = {"use_sliding_window": False} if name == "qwen2" else {}
    model, tokenizer = student(name, tie_word_embeddings=name == "qwen2", **changes), byte_level()
    write_gguf(tmp_path / "s.gguf", model, tokenizer, linear_type="q4_0", embedding_type="f16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="s.gguf", dtype=torch.float32)
    for path, layer in bit_linears(model).items():
        codes, scale = layer.ternary()
        theirs = loaded.get_submodule(path).weight
        torch.testing.assert_close(theirs, codes * scale.half().float(), rtol=0, atol=0)
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="s.gguf")
    for text in TEXTS:
        assert (
            read(text, add_special_tokens=False)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
        )
    assert read.eos_token_id == tokenizer.eos_token_id


def test_subln_goes_into_bitnet(tmp_path):
    model = student("llama", norms="two", tie_word_embeddings=True)
    for layer in bit_linears(model).values():
        if layer.subln is not None:
            layer.subln.eps = model.config.rms_norm_eps
    sizes = write_gguf(tmp_path / "s.gguf", model, byte_level())
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "s.gguf").tensors}
    assert sizes["architecture"] == "bitnet"
    gain = model.model.layers[1].mlp.down_proj.subln.weight.detach().numpy()
    assert np.array_equal(stored["blk.1.ffn_sub_norm.weight"], gain)
    assert "output.weight" not in stored


def test_gemma_norms_are_multipliers(tmp_path):
    layers = ["full_attention" if layer == 5 else "sliding_attention" for layer in range(6)]
    rope = {"rope_type": "default"}
    model = student(
        "gemma3",
        num_hidden_layers=6,
        layer_types=layers,
        query_pre_attn_scalar=16,
        rope_parameters={
            "sliding_attention": {**rope, "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    )
    write_gguf(tmp_path / "s.gguf", model, byte_level())
    reader = gguf.GGUFReader(tmp_path / "s.gguf")
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    expected = 1 + model.model.layers[2].pre_feedforward_layernorm.weight.detach().numpy()
    assert np.array_equal(stored["blk.2.ffn_norm.weight"], expected)
    assert reader.fields["gemma3.rope.freq_base"].contents() == 1e6
    assert reader.fields["gemma3.rope.scaling.factor"].contents() == 8.0


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "norms", "changes", "match"),
    [
        ("llama", "all", {}, "each of the seven projections"),
        ("qwen3", "two", {}, "no llama.cpp architecture has SubLN for qwen3"),
        ("llama", "two", {"tie_word_embeddings": False}, "ties the LM head"),
        ("llama", "two", {"attention_bias": True, "tie_word_embeddings": True}, "no biases"),
        ("qwen2", "none", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}, "sliding window"),
        ("qwen3", "none", {"hidden_act": "gelu_pytorch_tanh"}, "computes SiLU"),
        ("gemma3", "none", {}, "query_pre_attn_scalar 40 differs"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(name, norms, changes, match, tmp_path):
    model = student(name, norms, **changes)
    assert any(match in reason for reason in gguf_obstacles(model.config, norms))
    with pytest.raises(UserError, match=match):
        write_gguf(tmp_path / "s.gguf", model, byte_level())
    assert not list(tmp_path.iterdir())


def test_types_that_do_not_fit_are_refused_by_name(tmp_path):
    model = student("qwen3")
    with pytest.raises(UserError, match=r"divides the 64 columns of blk\.0\.attn_q .*f16, q4_0, q2_0; got tq2_0"):
        write_gguf(tmp_path / "s.gguf", model, byte_level(), linear_type="tq2_0")
    with pytest.raises(UserError, match="auto or one of"):
        write_gguf(tmp_path / "s.gguf", model, byte_level(), linear_type="q3_k")
    with pytest.raises(UserError, match="embedding: expected one of"):
        write_gguf(tmp_path / "s.gguf", model, byte_level(), embedding_type="int3")


def test_an_unknown_pre_tokenizer_is_refused(tmp_path):
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="knows rules by name only"):
        write_gguf(tmp_path / "s.gguf", student("qwen3"), tokenizer)
    assert not list(tmp_path.iterdir())
