"""The packed file: what is in it, and what is refused."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig

from bitdistill.errors import UserError
from bitdistill.export.write import write_packed
from bitdistill.kernels.reference import quantize_weight
from bitdistill.kernels.tables import quantize_table
from bitdistill.runtime import packed_file
from bitdistill.runtime.packed_file import read_packed
from bitdistill.student.layers import bit_linears
from bitdistill.student.refine import refine
from tiny_students import CONFIGS, student

TOKENIZER = Tokenizer(WordLevel({"ünicode": 0, "?": 1}, unk_token="?")).to_str().encode()


@pytest.fixture
def qwen3(tmp_path):
    model = student("qwen3")
    path = tmp_path / "student.safetensors"
    sizes = write_packed(path, model, tokenizer_json=TOKENIZER, metadata={"stage": "distill", "loss": 0.25})
    return path, model, sizes


def rewritten(path, tensors=None, **changes):
    """The file again, with other tensors or header entries; checksums stay right unless they are named."""
    with safe_open(path, framework="np") as file:
        header = file.metadata()
    tensors = load_file(path) if tensors is None else tensors
    header.update({key: value for key, value in changes.items() if value is not None})
    header["data_sha256"] = changes.get("data_sha256", packed_file.data_checksum(tensors))
    header["config_sha256"] = changes.get("config_sha256", packed_file.config_checksum(header))
    save_file(
        tensors, path, metadata={key: value for key, value in header.items() if key not in changes or changes[key]}
    )


# --- what is in the file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["2bit", "base3"])
@pytest.mark.parametrize("norms", ["two", "all", "none"])
@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_are_the_students(tmp_path, name, norms, packing):
    model = student(name, norms)
    write_packed(tmp_path / "s", model, packing=packing)
    got = read_packed(tmp_path / "s")
    assert got.config.model_type == model.config.model_type
    assert got.config.packing == packing
    assert list(got.config.linears) == list(bit_linears(model))
    for key, layer in bit_linears(model).items():
        codes, scale = quantize_weight(layer.weight)
        np.testing.assert_array_equal(got.weight_codes(key), codes.numpy())
        assert got.tensors[f"{key}.weight_scale"] == scale.numpy()
        assert (f"{key}.bias" in got.tensors) == (layer.bias is not None)
        assert (f"{key}.subln" in got.tensors) == (layer.subln is not None)
        if layer.bias is not None:
            np.testing.assert_array_equal(got.tensors[f"{key}.bias"], layer.bias.detach().numpy())
        if layer.subln is not None:
            np.testing.assert_array_equal(got.tensors[f"{key}.subln"], layer.subln.weight.detach().numpy())
            assert got.config.linears[key].subln_eps == layer.subln.eps
    norm = model.model.layers[1].post_attention_layernorm.weight.detach().numpy()
    want = norm + np.float32(1) if name == "gemma3" else norm
    np.testing.assert_array_equal(got.tensors["model.layers.1.post_attention_layernorm.gain"], want)
    assert not any(tensor.flags.writeable for tensor in got.tensors.values())


def test_sizes_add_up(qwen3):
    path, model, sizes = qwen3
    assert sizes["file_bytes"] == path.stat().st_size
    assert sizes["linear_bytes"] + sizes["embedding_bytes"] + sizes["other_bytes"] == sizes["file_bytes"]
    shapes = [layer.weight.shape for layer in bit_linears(model).values()]
    assert sizes["linear_weights"] == sum(rows * columns for rows, columns in shapes)
    blocks = [-(-rows // 16) * -(-columns // 4) for rows, columns in shapes]
    assert sizes["linear_bytes"] == sum(-(-count // 5) * 64 + 4 for count in blocks)
    assert sizes["bits_per_weight"] == 8 * sizes["linear_bytes"] / sizes["linear_weights"]
    assert sizes["embedding_bytes"] == 97 * 64 * 2
    assert sizes["parameters"] == sum(p.numel() for p in model.parameters())
    assert sizes["model_bits_per_parameter"] == 8 * sizes["file_bytes"] / sizes["parameters"]
    untied = write_packed(path, student("llama"), embedding="int4", packing="2bit")
    assert untied["embedding_bytes"] == 2 * (112 * 32 + 112 * 2 * 2)  # 97 rows in seven groups of 16


def test_tokenizer_and_metadata_travel(qwen3, tmp_path):
    got = read_packed(qwen3[0])
    assert got.tokenizer_json() == TOKENIZER.decode()
    assert got.metadata == {"stage": "distill", "loss": 0.25}
    assert got.config.eos_token_ids == [2]
    write_packed(tmp_path / "bare", student("qwen3"))
    assert read_packed(tmp_path / "bare").tokenizer_json() is None


def test_equal_students_are_equal_files(tmp_path, qwen3):
    """Also when another process writes them: the library alone orders its metadata at random in each call."""
    _, model, _ = qwen3
    files = []
    for name in "abcdef":
        write_packed(tmp_path / name, model, metadata={"é": 1, "task": "sst2", "stage": "x"})
        files.append((tmp_path / name).read_bytes())
    assert len(set(files)) == 1
    assert read_packed(tmp_path / "a").metadata["é"] == 1


def test_written_atomically(qwen3):
    path, model, _ = qwen3
    write_packed(path, model, packing="2bit")  # over the old one
    assert read_packed(path).config.packing == "2bit"
    (path.parent / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_packed(path.parent / "taken", model)
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["student.safetensors", "taken"]


# --- formats of the embedding -----------------------------------------------------------------------------------------


def encode(table, format):
    """The writer's codes and scales, as arrays."""
    return tuple(tensor.numpy() for tensor in quantize_table(torch.from_numpy(table), format))


FLOATS = st.floats(-8, 8, width=32).map(lambda x: 0.0 if abs(x) < 1e-3 else x)


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.sampled_from([32, 64, 96])), elements=FLOATS))
def test_embedding_codecs_against_plain_loops(table):
    codes, scale = encode(table, "int8")
    back8 = packed_file.decode_rows(codes, scale)
    codes4, scale4 = encode(table, "int4")
    back4 = packed_file.decode_int4(codes4, scale4)
    codes1, scale1 = encode(table, "ternary")
    assert (codes4.shape, scale4.shape) == (table.shape, (len(table), table.shape[1] // 32))
    for row in range(len(table)):
        step = np.float32(max(abs(x) for x in table[row])) / np.float32(127)
        mean = np.float32(max(sum(abs(float(x)) for x in table[row]) / table.shape[1], 1e-5))
        assert scale1[row] == mean
        for column, x in enumerate(table[row]):
            want = round(float(x / step)) if step else 0  # Python rounds half to even
            assert codes[row, column] == want
            assert back8[row, column] == np.float32(want) * step
            assert codes1[row, column] == min(1, max(-1, round(float(x / mean))))
        for group in range(0, table.shape[1], 32):
            values = table[row, group : group + 32]
            step = np.float16(max(values, key=abs) / np.float32(-8))
            assert scale4[row, group // 32] == step
            for offset, x in enumerate(values):
                want = min(7, max(-8, round(float(x / np.float32(step))))) if step else 0
                assert codes4[row, group + offset] == want
                assert back4[row, group + offset] == np.float32(want) * np.float32(step)


@pytest.mark.parametrize("packing", ["base3", "2bit"])
@pytest.mark.parametrize("embedding", packed_file.EMBEDDINGS)
def test_table_rows_equal_rows_of_the_table(tmp_path, embedding, packing):
    model = student("llama")
    write_packed(tmp_path / "s", model, embedding=embedding, packing=packing)
    got = read_packed(tmp_path / "s")
    rows = np.array([5, 5, 96, 0])
    for name, weight in (("model.embed_tokens", model.model.embed_tokens.weight), ("lm_head", model.lm_head.weight)):
        table, want = got.table(name), weight.detach().numpy()
        assert table.dtype == np.float32
        np.testing.assert_array_equal(got.table(name, rows), table[rows])
        if embedding == "fp16":
            np.testing.assert_array_equal(table, want.astype(np.float16).astype(np.float32))
        relative = np.sqrt(((table - want) ** 2).mean() / (want**2).mean())
        assert relative < {"fp16": 3e-4, "int8": 0.01, "int4": 0.11, "ternary": 0.6}[embedding]


# --- what is refused when writing -------------------------------------------------------------------------------------


def refused(field, call):
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.field == field, caught.value
    return str(caught.value)


def test_writing_refuses(tmp_path):
    path = tmp_path / "s"
    refused("export.packing", lambda: write_packed(path, student("qwen3"), packing="1bit"))
    refused("export.embedding", lambda: write_packed(path, student("qwen3"), embedding="int3"))
    refused("output_dir", lambda: write_packed(tmp_path / "no" / "s", student("qwen3")))
    plain = AutoModelForCausalLM.from_config(CONFIGS["qwen3"])
    refused("model", lambda: write_packed(path, plain))
    name = "model.layers.0.self_attn.q_proj.weight"
    message = refused(name, lambda: write_packed(path, student("qwen3").bfloat16()))
    assert "bfloat16" in message
    model = student("qwen3")
    model.get_parameter(name).data[3, 3] = torch.nan
    refused(name, lambda: write_packed(path, model))
    model = student("qwen3")
    model.model.norm.weight.data[3] = torch.inf
    refused("model.norm", lambda: write_packed(path, model))
    model = student("qwen3")
    model.model.embed_tokens.weight.data[3] = 70000.0
    refused("export.embedding", lambda: write_packed(path, model))
    write_packed(path, model, embedding="int8")
    narrow = LlamaConfig(vocab_size=9, hidden_size=24, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(narrow)
    refine(model)
    refused("export.embedding", lambda: write_packed(path, model, embedding="int4"))


def test_writing_refuses_what_the_runtime_lacks(tmp_path):
    model = student("gemma3")
    model.config.final_logit_softcapping = 30.0
    refused("config.json: final_logit_softcapping", lambda: write_packed(tmp_path / "s", model))
    config = LlamaConfig(**{**CONFIGS["llama"].to_dict(), "hidden_act": "relu"})
    model = AutoModelForCausalLM.from_config(config)
    refine(model)
    refused("config.json: hidden_act", lambda: write_packed(tmp_path / "s", model))
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**CONFIGS["llama"].to_dict(), "rope_parameters": rope}))
    refine(model)
    refused("config.json: rope_parameters", lambda: write_packed(tmp_path / "s", model))
    model = student("llama")
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.bfloat16()
    assert "bfloat16" in refused("model", lambda: write_packed(tmp_path / "s", model))
    assert not list(tmp_path.iterdir())


# --- what is refused when reading -------------------------------------------------------------------------------------


def test_reading_refuses_other_files(tmp_path, qwen3):
    path = qwen3[0]
    assert "no such file" in refused("RUN_OR_FILE", lambda: read_packed(tmp_path / "absent"))
    refused("RUN_OR_FILE", lambda: read_packed(tmp_path))
    (tmp_path / "empty").touch()
    refused("RUN_OR_FILE", lambda: read_packed(tmp_path / "empty"))
    (tmp_path / "text").write_text("not safetensors, but long enough to have a header length")
    refused("RUN_OR_FILE", lambda: read_packed(tmp_path / "text"))
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "foreign")
    assert "something else" in refused("RUN_OR_FILE", lambda: read_packed(tmp_path / "foreign"))
    for version in ("1", "5"):
        rewritten(path, version=version)
        assert "Update bitdistill, or export the student again" in refused("RUN_OR_FILE", lambda: read_packed(path))


@pytest.mark.parametrize(
    ("version", "unsaid"), [("2", ("weight_scale", "group_size", "act_scale")), ("3", ("act_scale",))]
)
def test_files_of_earlier_versions_are_read(qwen3, version, unsaid):
    """2 did not say that a linear has one scale; neither said that a token has one, and that no input is divided."""
    path = qwen3[0]
    now = read_packed(path)
    with safe_open(path, framework="np") as file:
        config = json.loads(file.metadata()["config"])
    for name in unsaid:
        del config[name]
    for linear in config["linears"].values():
        del linear["input_scale"]
    rewritten(path, version=version, config=json.dumps(config))
    before = read_packed(path)
    assert before.config == now.config
    assert all(np.array_equal(before.tensors[name], tensor) for name, tensor in now.tensors.items())


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.999])
def test_reading_notices_truncation(qwen3, share):
    path = qwen3[0]
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "truncated" in refused("RUN_OR_FILE", lambda: read_packed(path))


def test_reading_notices_every_flipped_bit(qwen3):
    """One bit anywhere: in the header it may also break the JSON or the format's name, but it never passes."""
    path = qwen3[0]
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    places = [*np.random.default_rng(0).integers(0, len(data), 60).tolist(), 3, 8, start - 1, start, len(data) - 1]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        if damaged[place : place + 1] == b" " or data[place : place + 1] == b" ":
            continue  # white space that pads the header carries nothing
        path.write_bytes(damaged)
        refused("RUN_OR_FILE", lambda: read_packed(path))


def test_reading_names_missing_extra_and_misshapen_tensors(qwen3):
    path = qwen3[0]
    whole = load_file(path)
    name = "model.layers.1.mlp.down_proj.subln"
    rewritten(path, {key: value for key, value in whole.items() if key != name})
    message = refused("RUN_OR_FILE", lambda: read_packed(path))
    assert f"1 missing: {name}" in message
    rewritten(path, {**whole, "model.layers.9.bias": np.zeros(3, np.float32)})
    assert "1 extra: model.layers.9.bias" in refused("RUN_OR_FILE", lambda: read_packed(path))
    for other in (whole[name][:-1], whole[name].astype(np.float16), whole[name].astype(np.float64)):
        rewritten(path, {**whole, name: other})
        assert f"1 of another dtype or shape: {name}" in refused("RUN_OR_FILE", lambda: read_packed(path))
    rewritten(path, whole)
    read_packed(path)


def test_reading_notices_edits(qwen3):
    path = qwen3[0]
    with safe_open(path, framework="np") as file:
        header = file.metadata()
    config = json.loads(header["config"])
    edited = json.dumps({**config, "rms_norm_eps": 1e-3})
    rewritten(path, config=edited, config_sha256=header["config_sha256"])
    assert "damaged or edited" in refused("RUN_OR_FILE", lambda: read_packed(path))
    rewritten(path, config=header["config"], config_sha256=None)
    assert "damaged or edited" in refused("RUN_OR_FILE", lambda: read_packed(path))
