"""Students as Hugging Face folders of other tools: codes as drawn, and the tools' own readers multiply by what was trained."""

import copy
import json

import pytest
import torch
from test_gguf_file import byte_level, student
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitdistill.errors import UserError
from bitdistill.export.hugging_face import FORMATS, write_hugging_face
from bitdistill.export.tools import tool_answers
from bitdistill.student.layers import bit_linears

FAMILIES = ["llama", "llama_biases", "qwen2", "qwen3", "gemma3"]


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
LLAMA3 |= {"original_max_position_embeddings": 16}
FOR_MLX = {  # what mlx-lm's models of a family cannot compute is otherwise; their RoPE is not the default
    "llama": {"rope_parameters": LLAMA3},
    "qwen2": {"head_dim": 16, "use_sliding_window": False, "layer_types": None},
    "gemma3": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
}


def student_for(name, format):
    return student(name, **{"head_dim": 32} | (FOR_MLX.get(name, {}) if format == "mlx" else {}))


def dense(model):
    """The student as a stock model whose weights are codes times scale: what tools without activation rounding compute."""
    config = copy.deepcopy(model.config)
    stock = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    state = {key: value.clone() for key, value in model.state_dict().items() if "subln" not in key}
    for name, layer in bit_linears(model).items():
        codes, scale = layer.ternary()
        state[f"{name}.weight"] = codes * scale
    stock.load_state_dict(state)
    return stock


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_and_format_is_written_and_read_back(name, format, tmp_path):
    model = student_for(name, format)
    sizes = write_hugging_face(tmp_path / "s", model, byte_level(), format)
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert "bitdistill" not in config
    assert 2 < sizes["bits_per_weight"] < 4
    assert AutoTokenizer.from_pretrained(tmp_path / "s").eos_token == "<end>"


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("format", ["transformers", "compressed-tensors"])
def test_transformers_opens_it_and_answers_as_the_dense_student(name, format, tmp_path):
    if format == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    model = student(name, head_dim=32)
    write_hugging_face(tmp_path / "s", model, byte_level(), format)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "s", dtype=torch.float32).eval()
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        theirs, ours = loaded(ids).logits, dense(model)(ids).logits
    # Embedding, norms and, in compressed-tensors, the scales are stored in half precision.
    tolerance = 0.05 if name == "gemma3" else 0.01
    assert (theirs - ours).std() < tolerance * ours.std()
    assert loaded.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > 40


@pytest.mark.parametrize("name", FAMILIES)
def test_mlx_opens_it_and_answers_as_the_dense_student(name, tmp_path):
    pytest.importorskip("mlx_lm", reason='pip install "mlx[cpu]" mlx-lm')
    model, ids = student_for(name, "mlx"), list(range(3, 43))
    write_hugging_face(tmp_path / "s", model, byte_level(), "mlx")
    (theirs,), (continuation,) = tool_answers("mlx", tmp_path / "s", [ids], 2)
    with torch.no_grad():
        ours = dense(model)(torch.tensor([ids])).logits[0]
    tolerance = 0.05 if name == "gemma3" else 0.01  # half precision throughout
    assert (torch.from_numpy(theirs) - ours).std() < tolerance * ours.std()
    assert len(continuation) == 2


def test_mlx_words_by_hand(tmp_path):
    from safetensors.torch import load_file

    model = student("qwen3")
    write_hugging_face(tmp_path / "s", model, byte_level(), "mlx")
    held = load_file(tmp_path / "s" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    codes, scale = bit_linears(model)[name].ternary()
    word = int(held[f"{name}.weight"].view(torch.int32)[3, 1]) & 0xFFFFFFFF
    assert [(word >> 2 * j & 3) - 1 for j in range(16)] == codes[3, 16:32].tolist()
    assert held[f"{name}.scales"].shape == (64, 2)  # groups of 128 columns
    assert torch.equal(held[f"{name}.biases"], -held[f"{name}.scales"])
    assert held[f"{name}.scales"][0, 0] == scale.half()
    section = json.loads((tmp_path / "s" / "config.json").read_text())["quantization"]
    assert section["bits"] == 2
    assert section[name]["group_size"] == 128 if section["group_size"] != 128 else True


def test_mlx_refuses_rows_that_its_groups_do_not_divide(tmp_path):
    with pytest.raises(UserError, match="multiple of 32 columns"):
        write_hugging_face(tmp_path / "s", student("qwen3", intermediate_size=100), byte_level(), "mlx")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_subln_is_refused(format, tmp_path):
    with pytest.raises(UserError, match=r"no place for SubLN.*refine\.norms none"):
        write_hugging_face(tmp_path / "s", student("llama", "two"), byte_level(), format)


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("qwen2", {"head_dim": 32}, "heads of hidden_size / num_attention_heads, not of 32"),
        ("qwen2", {"head_dim": 16, "use_sliding_window": True, "sliding_window": 6}, "ignores the sliding window"),
        ("qwen3", {"hidden_act": "gelu_pytorch_tanh"}, "computes SiLU"),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "no regular pattern"),
    ],
)
def test_what_mlx_computes_otherwise_is_refused(name, changes, match, tmp_path):
    with pytest.raises(UserError, match=match):
        write_hugging_face(tmp_path / "s", student(name, **changes), byte_level(), "mlx")
    assert not (tmp_path / "s").exists()


def test_other_refusals(tmp_path):
    with pytest.raises(UserError, match="one of transformers"):
        write_hugging_face(tmp_path / "s", student("llama"), byte_level(), "onnx")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("mine")
    with pytest.raises(UserError, match="empty folder"):
        write_hugging_face(tmp_path / "kept", student("llama"), byte_level(), "mlx")
    assert (tmp_path / "kept" / "file").read_text() == "mine"
