"""A GGUF file as a base: the same model, the same tokens, or one line that says why not."""

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny_gguf import CONFIGS, TOKENS, byte_level_tokens, model_of, write_gguf
from transformers import AutoTokenizer

from bitdistill.errors import UserError
from bitdistill.student.gguf_base import convert_gguf, is_gguf
from bitdistill.student.loading import load_language_model, load_tokenizer

DATA = Path(os.environ.get("BITDISTILL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
IDS = torch.arange(2, 62)[None]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_gives_the_logits_of_the_model_that_was_written(tmp_path, name):
    model = model_of(name)
    found = convert_gguf(write_gguf(tmp_path / "tiny.gguf", model), tmp_path / "base")
    with torch.no_grad():
        wanted, got = model(IDS).logits, load_language_model(tmp_path / "base").eval()(IDS).logits
    # Gemma's norms went through "plus one" and back: half a unit in the last place of 1
    limit = 2e-5 if name == "gemma3" else 2e-6
    assert (wanted - got).abs().max() <= limit * wanted.abs().max()
    assert found.types.keys() == {"F32"}
    assert found.bits_per_weight == 32


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
def test_quantized_weights_are_what_the_dequantizer_gives(tmp_path, kind):
    model = model_of("qwen3")
    found = convert_gguf(write_gguf(tmp_path / "tiny.gguf", model, kind=kind), tmp_path / "base")
    loaded = load_language_model(tmp_path / "base")
    name = "model.layers.1.mlp.down_proj.weight"
    which = gguf.GGMLQuantizationType[kind]
    wanted = gguf.dequantize(gguf.quantize(model.state_dict()[name].numpy(), which), which)
    assert np.array_equal(loaded.state_dict()[name].numpy(), wanted)
    assert kind in str(found)
    assert found.bits_per_weight < 32


def test_a_head_that_repeats_the_embedding_is_tied_and_another_is_kept(tmp_path):
    model = model_of("llama")
    convert_gguf(write_gguf(tmp_path / "own.gguf", model), tmp_path / "own")
    assert not load_language_model(tmp_path / "own").config.tie_word_embeddings
    model.lm_head.weight.data = model.model.embed_tokens.weight.data.clone()
    found = convert_gguf(write_gguf(tmp_path / "same.gguf", model), tmp_path / "same")
    assert load_language_model(tmp_path / "same").config.tie_word_embeddings
    assert "tied" in str(found)


def test_the_tokenizer_splits_as_its_rule_says_and_keeps_special_tokens_whole(tmp_path):
    model, words = model_of("llama"), {}
    for rule in ("qwen2", "llama-bpe", "smollm", "gpt-2"):
        file = write_gguf(tmp_path / f"{rule}.gguf", model, lambda writer, rule=rule: byte_level_tokens(writer, rule))
        convert_gguf(file, tmp_path / rule)
        tokenizer = load_tokenizer(tmp_path / rule)
        text = "in the 123<think><|end|>é\n"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.convert_tokens_to_ids("<think>") in ids
        assert 0 in ids
        words[rule] = [TOKENS[i] for i in ids]
        assert (tokenizer("a")["input_ids"][0] == 1) == (rule == "llama-bpe")
    assert "123" in words["llama-bpe"]
    assert "123" not in words["qwen2"]  # a digit at a time
    assert "Ġ1" in words["gpt-2"]
    assert "Ġ1" not in words["smollm"]


def test_a_sentencepiece_tokenizer_gives_the_tokens_of_the_model_it_came_from(tmp_path):
    folder = DATA / "models/stories260K-hf"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set BITDISTILL_DATA to the folder with the real models")
    source = AutoTokenizer.from_pretrained(folder)
    tokens = [source.convert_ids_to_tokens(i) for i in range(512)]
    model = model_of("llama")

    def add(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(253)])
        writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * 253])
        for name, number in (("unk", 0), ("bos", 1), ("eos", 2)):
            getattr(writer, f"add_{name}_token_id")(number)

    model.resize_token_embeddings(512, mean_resizing=False)
    convert_gguf(write_gguf(tmp_path / "sp.gguf", model, add), tmp_path / "base")
    ours = load_tokenizer(tmp_path / "base")
    for text in ("Once upon a time, there was a little girl named Lily.", 'She said: "Ünïcödé!" 123', "a"):
        assert ours(text)["input_ids"] == source(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"], skip_special_tokens=True) == text


def test_a_chat_template_comes_along_and_a_broken_one_is_left_out_and_named(tmp_path):
    good = "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}"
    for name, template in (("good", good), ("broken", "{% for m in %}"), ("mute", "hello")):

        def add(writer, template=template):
            byte_level_tokens(writer)
            writer.add_chat_template(template)

        found = convert_gguf(write_gguf(tmp_path / f"{name}.gguf", model_of("qwen2"), add), tmp_path / name)
        assert load_tokenizer(tmp_path / name).chat_template == (good if name == "good" else None)
        assert ("left out" in str(found)) == (name != "good")


def test_what_is_not_known_is_refused_in_one_line(tmp_path):
    model = model_of("qwen2")
    cases = {
        "expert_count": {"expert_count": 8},
        "rope.scaling.type": {"rope__scaling__type": "longrope"},
        "partial RoPE of 8": {"rope__dimension_count": 8},
    }
    for said, extra in cases.items():
        with pytest.raises(UserError, match="safetensors repository") as error:
            convert_gguf(write_gguf(tmp_path / "tiny.gguf", model, **extra), tmp_path / "base")
        assert said in str(error.value)
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.pre"):
        convert_gguf(
            write_gguf(tmp_path / "tiny.gguf", model, lambda writer: byte_level_tokens(writer, None)), tmp_path / "base"
        )
    values = {  # of another kind than their keys have, as damage or another converter leaves them
        "rope__scaling__factor": "two",
        "attention__sliding_window": "wide",
        "rope__scaling__original_context_length": 0,
    }
    for key, value in values.items():
        with pytest.raises(UserError, match="of the right kind") as error:
            convert_gguf(write_gguf(tmp_path / "tiny.gguf", model, **{key: value}), tmp_path / "base")
        assert key.split("__")[-1] in str(error.value)
    model.config.model_type = "phi3"
    with pytest.raises(UserError, match="'phi3'"):
        convert_gguf(write_gguf(tmp_path / "tiny.gguf", model), tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_missing_and_surplus_tensors_are_named(tmp_path):
    model = model_of("qwen3")
    file = tmp_path / "tiny.gguf"
    whole = write_gguf(file, model).read_bytes()
    for old, new in ((b"blk.1.ffn_up.weight", b"blk.1.ffn_up.biases"), (b"blk.1.attn_norm", b"blk.1.post_norm")):
        file.write_bytes(whole.replace(old, new))
        with pytest.raises(UserError, match=r"ffn_up.biases|post_norm"):
            convert_gguf(file, tmp_path / "base")


def test_damaged_files_end_in_one_line_and_bounded_memory(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", model_of("llama")).read_bytes()
    damaged = tmp_path / "damaged.gguf"
    generator = np.random.default_rng(0)
    header = whole.index(b"blk.1") + 400
    for number in range(60):
        content = bytearray(whole)
        if number % 3 == 0:
            content = content[: int(generator.integers(0, len(content)))]
        for _ in range(4 if number % 3 else 0):
            content[int(generator.integers(0, header))] = int(generator.integers(0, 256))
        damaged.write_bytes(content)
        try:
            convert_gguf(damaged, tmp_path / "base")
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017 - a mutation may also leave a right file
    for key in (b".embedding_length", b".feed_forward_length"):
        content, place = bytearray(whole), whole.index(key) + len(key) + 4
        content[place : place + 4] = (2**31 - 2).to_bytes(4, "little")  # terabytes, if anything were made of it
        damaged.write_bytes(content)
        with pytest.raises(UserError, match="model"):
            convert_gguf(damaged, tmp_path / "base")
    damaged.write_bytes(whole[:24] + b"\xff" * 8 + whole[32:])
    with pytest.raises(UserError, match="whole GGUF file"):
        convert_gguf(damaged, tmp_path / "base")


def test_what_a_gguf_file_is(tmp_path):
    (tmp_path / "folder.gguf").mkdir()
    assert is_gguf("model-Q4_K_M.gguf")
    assert is_gguf("MODEL.GGUF")
    assert not is_gguf(None)
    assert not is_gguf("Qwen/Qwen3-0.6B")
    assert not is_gguf(tmp_path / "folder.gguf")
