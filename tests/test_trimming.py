"""Trimmed vocabularies: what kept tokens can encode is encoded as before, everything else still is, logits keep their bits."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from bitdistill.errors import UserError
from bitdistill.student.loading import load_language_model, load_tokenizer
from bitdistill.student.vocabulary import trim_folder, trim_model
from bitdistill.trimmed_tokenizer import count_tokens, kept_tokens, trim_tokenizer
from tiny_students import CONFIGS

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "the film was a charming film, and the dog was there",
    "naïve 你好 the thesis of the theatre",
    "x1 = 12; y22 = 3.5\n\tindented",
]
SEEN = ["the film was charming", "the dog jumps"]


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=["<end>", "<pad>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def sentencepiece():
    """Sentencepiece-like: a space is written ▁, unknown characters fall back to bytes, <s> comes first."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "<end>", "<pad>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    tokenizer.train_from_iterator(TEXTS[:2] * 3, trainers.BpeTrainer(vocab_size=360, special_tokens=special))
    description = json.loads(tokenizer.to_str())  # the bytes are pieces of text, not special tokens
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"][1] != "0"]
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


TOKENIZERS = {"byte-level": byte_level(), "sentencepiece": sentencepiece()}


def trimmed(full, threshold=0):
    description = json.loads(full.to_str())
    counts, _ = count_tokens(full, SEEN)
    kept = kept_tokens(description, counts, threshold)
    return kept, Tokenizer.from_str(json.dumps(trim_tokenizer(description, kept)))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_fewer_tokens_and_all_that_is_needed(kind):
    full = TOKENIZERS[kind]
    kept, small = trimmed(full)
    assert 256 <= len(kept) == small.get_vocab_size() < full.get_vocab_size()
    for name in ("<end>", "<pad>"):
        assert kept[small.token_to_id(name)] == full.token_to_id(name)
    for text in SEEN:
        new, old = small.encode(text), full.encode(text)
        assert new.tokens == old.tokens
        assert kept[new.ids].tolist() == old.ids  # with <s>, whose id the post-processor puts in
    fewer, _ = trimmed(full, threshold=1)
    assert set(fewer) < set(kept)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_text_is_encoded_and_known_ones_as_before(kind, data):
    full = TOKENIZERS[kind]
    kept, small = trimmed(full)
    pieces = st.one_of(st.sampled_from(" ".join(TEXTS).split(" ")), st.text(max_size=4))
    text = " ".join(data.draw(st.lists(pieces, max_size=8)))
    old, new = full.encode(text), small.encode(text)
    assert small.decode(new.ids) == full.decode(old.ids)
    if set(old.ids) <= set(kept.tolist()):
        assert kept[new.ids].tolist() == old.ids if new.ids else not old.ids


def test_a_hand_example():
    """Of merges a+b, ab+c, b+c only those of `abc` are kept; `bc` falls back to its letters."""
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "bc": 5, "d": 6}
    merges = [["a", "b"], ["ab", "c"], ["b", "c"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    description = json.loads(tokenizer.to_str())
    counts = np.zeros(7, np.int64)
    counts[4] = 1
    kept = kept_tokens(description, counts)
    assert kept.tolist() == [0, 1, 2, 3, 4, 6]  # d is in the byte alphabet
    small = trim_tokenizer(description, kept)
    assert small["model"]["merges"] == [["a", "b"], ["ab", "c"]]
    assert small["model"]["vocab"] == {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "d": 5}
    assert Tokenizer.from_str(json.dumps(small)).encode("abcbc").tokens == ["abc", "b", "c"]


@pytest.mark.parametrize("model", [models.WordLevel({"a": 0}, unk_token="a"), models.Unigram([("a", 0.0)], 0)])
def test_tokenizers_without_merges_are_refused(model):
    description = json.loads(Tokenizer(model).to_str())
    with pytest.raises(UserError, match=r"refine\.vocabulary: expected a byte-pair encoding"):
        kept_tokens(description, np.zeros(1, np.int64))


def test_a_tokenizer_that_cannot_encode_every_text_is_refused():
    description = json.loads(Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).to_str())
    with pytest.raises(UserError, match="with neither"):
        kept_tokens(description, np.zeros(1, np.int64))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("tied", [True, False])
def test_model_keeps_its_bits(family, tied, tmp_path):
    full = TOKENIZERS["byte-level"]
    config = CONFIGS[family]
    fields = {
        name: value for name, value in config.to_dict().items() if name != "bitdistill"
    }  # of another test's surgery
    config = type(config)(
        **{
            **fields,
            "vocab_size": full.get_vocab_size() + 5,  # padded, as many vocabularies are
            "tie_word_embeddings": tied,
            "eos_token_id": full.token_to_id("<end>"),
            "bos_token_id": None,
            "pad_token_id": full.token_to_id("<pad>"),
        }
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=full, eos_token="<end>", pad_token="<pad>")
    ids = torch.tensor([tokenizer(SEEN[0])["input_ids"]])
    with torch.no_grad():
        before = model(ids).logits
    result = trim_folder(model, tokenizer, SEEN, tmp_path)
    small, tokens = load_language_model(tmp_path), load_tokenizer(tmp_path)
    new = torch.tensor([tokens(SEEN[0])["input_ids"]])
    assert result.kept[new.numpy()].tolist() == ids.tolist()
    with torch.no_grad():
        after = small.eval()(new).logits
    assert after.shape[-1] == len(result.kept) == result.vocabulary_after < result.vocabulary_before
    torch.testing.assert_close(after, before[..., torch.from_numpy(result.kept)], rtol=0, atol=0)
    assert (small.lm_head.weight is small.model.embed_tokens.weight) == tied
    assert small.config.eos_token_id == tokens.eos_token_id == tokens.convert_tokens_to_ids("<end>")
    assert small.config.pad_token_id == tokens.pad_token_id
    assert (result.tokens_before, result.texts_changed, result.texts) == (result.tokens_after, 0, 2)
    assert np.load(tmp_path / "kept_tokens.npy").tolist() == result.kept.tolist()


def test_a_model_with_too_few_rows_is_refused():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    with pytest.raises(UserError, match="an embedding row for every token id"):
        trim_model(model, np.array([0, 10**6]))
