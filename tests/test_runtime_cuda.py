"""The GPU runtime (interpreted without a GPU) against the student itself: every family, norm placement and table format,
prompts and steps, and what a user can get wrong."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Qwen3Config

from bitdistill.errors import UserError
from bitdistill.export.write import write_packed
from bitdistill.kernels.gpu import decode_attention, decoder
from bitdistill.runtime import cuda as runtime_cuda
from bitdistill.runtime.cuda import CudaRuntime
from bitdistill.runtime.sampling import Sampling
from bitdistill.student.refine import refine
from tiny_students import CONFIGS, prompt, student


@pytest.fixture(autouse=True)
def few_splits(monkeypatch, device):
    """The interpreter runs one program after another."""
    if device == "cpu":
        monkeypatch.setattr(decode_attention, "MAX_SPLITS", 2)


def talker(eos=None):
    """The smallest student that talks: interpreted steps are slow."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.5,
        eos_token_id=eos, bos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    refine(model)
    return model.eval()


def packed_runtime(folder, model, device, kv_cache="fp32", context=None, **options):
    write_packed(folder / "s", model, **options)
    return CudaRuntime(folder / "s", device, context=context, kv_cache=kv_cache)


def file_embedding(model, runtime):
    """The student with the embedding that the file holds, so that only float noise and flipped codes remain."""
    with torch.no_grad():
        for name in runtime.model.config.tables():
            model.get_submodule(name).weight.copy_(torch.from_numpy(runtime.model.table(name)))
    return model


def student_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def assert_same_function(got, want, noise=5e-5):
    """Float noise at most positions; an ulp in front of a quantizer may flip a code here and there."""
    difference = np.abs(got - want).max(axis=1) / want.std()
    assert got.shape == want.shape
    assert got.dtype == np.float32
    assert difference.max() < 0.2
    assert (difference < noise).mean() >= 0.6, difference


def assert_greedy(model, ids, new_ids):
    """Each new token is the student's choice, where that is not a near-tie."""
    logits = student_logits(model, ids + new_ids)[len(ids) - 1 : -1]
    for row, token in zip(logits, new_ids, strict=True):
        assert row[token] >= row.max() - 0.2 * logits.std()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_greedy_steps(tmp_path, device, name):
    """A prompt longer than every sliding window, then steps."""
    model = student(name)
    runtime = packed_runtime(tmp_path, model, device)
    file_embedding(model, runtime)
    ids = prompt(9)
    with runtime._sequences(1, len(ids)) as sequences:
        rows = [sequences.prompt(ids[:8], 0, 0, "all").cpu().numpy()]
        for token in ids[8:]:
            sequences.ids.fill_(token)
            sequences.step()
            rows.append(sequences.logits.cpu().numpy())
        assert sequences.positions.tolist() == [9]
        assert sequences.ids.tolist() == [rows[-1].argmax()]
    assert_same_function(np.concatenate(rows), student_logits(model, ids))


@pytest.mark.parametrize(
    ("name", "norms"), [("llama_biases", "all"), ("gemma3", "all"), ("qwen3", "none"), ("qwen2", "none")]
)
def test_other_norms(tmp_path, device, name, norms):
    model = student(name, norms)
    runtime = packed_runtime(tmp_path, model, device)
    ids = prompt(4)
    assert_same_function(runtime.logits(ids), student_logits(file_embedding(model, runtime), ids))


@pytest.mark.parametrize(
    ("name", "embedding", "packing"),
    [  # an untied head; an embedding with a scale of its own; tied
        ("llama", "int8", "2bit"),
        ("llama", "int4", "base3"),
        ("llama", "ternary", "base3"),
        ("gemma3", "int4", "2bit"),
        ("qwen2", "ternary", "2bit"),
    ],
)
def test_embedding_formats(tmp_path, device, name, embedding, packing):
    model = student(name)
    runtime = packed_runtime(tmp_path, model, device, embedding=embedding, packing=packing)
    ids = prompt(3)
    noise = 4e-4  # integer heads see activations of 16 bits
    assert_same_function(runtime.logits(ids), student_logits(file_embedding(model, runtime), ids), noise)


def test_long_prompts_go_through_in_pieces(tmp_path, device, monkeypatch):
    runtime = packed_runtime(tmp_path, talker(), device)
    ids = prompt(9, seed=6)
    whole = runtime.logits(ids)
    monkeypatch.setattr(runtime_cuda, "PREFILL_TOKENS", 4)
    assert_same_function(runtime.logits(ids), whole)
    assert_same_function(runtime.logits(ids, last_only=True), whole[-1:])


def test_bfloat16_cache(tmp_path, device):
    model = student("qwen3")
    runtime = packed_runtime(tmp_path, model, device, kv_cache="bf16")
    ids = prompt(6)
    want = torch.from_numpy(student_logits(file_embedding(model, runtime), ids)).log_softmax(-1)
    got = torch.from_numpy(runtime.logits(ids)).log_softmax(-1)
    assert torch.nn.functional.kl_div(got, want, log_target=True, reduction="batchmean") < 0.02
    assert runtime.cache_bytes == 3 * 2 * 2 * 64 * 24 * 2  # layers, k and v, heads, positions, width, bytes


def test_batches_are_single_sequences(tmp_path, device):
    model = talker()
    runtime = packed_runtime(tmp_path, model, device)
    prompts = [prompt(5, seed=1), prompt(2, seed=2)]
    answers = runtime.greedy_batch(prompts, 4)
    assert runtime.stats.new_tokens == 8
    file_embedding(model, runtime)
    for ids, answer in zip(prompts, answers, strict=True):
        assert list(runtime.generate_ids(ids, 4)) == answer
        assert_greedy(model, ids, answer)
    stats = runtime.stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.decoded_tokens, stats.stopped_by) == (2, 4, 3, "length")
    assert stats.kv_read_bytes == (3 + 4 + 5) * 2 * 16 * 4  # positions, k and v, width, bytes
    assert stats.kv_cache_bytes == 2 * 64 * 16 * 4
    assert min(stats.prompt_seconds, stats.decode_seconds) > 0
    assert runtime.greedy_batch([], 3) == []


def test_device_bytes(tmp_path, device):
    """2 bits per weight where 64 divides the width, a scale and perhaps a bias a row; tables and norms as in the file."""
    model = student("qwen3")
    runtime = packed_runtime(tmp_path, model, device, embedding="int8")
    bytes_ = 0
    for linear in runtime.model.config.linears.values():
        padded = -(-linear.in_features // 64) * 64
        bytes_ += linear.out_features * (padded * 2 // 8 + 4) + (4 * linear.in_features if linear.subln_eps else 0)
    bytes_ += 97 * 64 + 4 * 97 + 4 * sum(runtime.model.config.norms.values())
    assert runtime.device_bytes == runtime.weight_bytes == bytes_
    assert runtime.cache_bytes == 0
    assert runtime.file_bytes == (tmp_path / "s").stat().st_size


# --- generation -------------------------------------------------------------------------------------------------------


def test_sampling(tmp_path, device):
    runtime = packed_runtime(tmp_path, talker(), device, embedding="int8")
    ids = prompt(3)
    greedy = list(runtime.generate_ids(ids, 3))
    assert list(runtime.generate_ids(ids, 3, Sampling(temperature=1.0, top_k=1, seed=3))) == greedy
    first = list(runtime.generate_ids(ids, 3, Sampling(temperature=5.0, seed=1)))
    assert list(runtime.generate_ids(ids, 3, Sampling(temperature=5.0, seed=1))) == first
    assert list(runtime.generate_ids(ids, 3, Sampling(temperature=5.0, seed=2))) != first
    penalized = list(runtime.generate_ids(ids, 3, Sampling(repetition_penalty=1e9)))
    assert len({*ids, *penalized}) == len(set(ids)) + 3


def test_ends(tmp_path, device):
    runtime = packed_runtime(tmp_path, talker(eos=list(range(97))), device, context=6)
    assert list(runtime.generate_ids(prompt(2), 5)) == []
    assert runtime.stats.stopped_by == "eos"
    assert runtime.greedy_batch([prompt(2)], 5) == [[]]
    runtime = packed_runtime(tmp_path, talker(), device, context=6)
    assert len(list(runtime.generate_ids(prompt(4), 9))) == 3  # the sixth position still predicts a seventh token
    assert runtime.stats.stopped_by == "context"
    assert [len(answer) for answer in runtime.greedy_batch([prompt(4), prompt(6)], 9)] == [3, 1]
    assert len(list(runtime.generate_ids(prompt(6), 9))) == 1


def test_two_answers_at_once(tmp_path, device):
    """Two generators of one runtime do not touch each other's sequences; one left early gives its slots back."""
    runtime = packed_runtime(tmp_path, talker(), device)
    prompts = [prompt(3, seed=1), prompt(4, seed=2)]
    alone = [list(runtime.generate_ids(ids, 3)) for ids in prompts]
    first, second = (runtime.generate_ids(ids, 3) for ids in prompts)
    together = [(next(first), next(second)) for _ in range(3)]
    assert [list(answer) for answer in zip(*together, strict=True)] == alone
    first.close()
    second.close()
    assert len(runtime._free) == 2
    assert not runtime._busy


def test_text(tmp_path, device):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:97]
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    runtime = packed_runtime(tmp_path, talker(), device, tokenizer_json=tokenizer.to_str().encode())
    ids = list(runtime.generate_ids(tokenizer.encode("AB").ids, 4))
    assert "".join(runtime.generate("AB", 4)) == tokenizer.decode(ids)
    stop = tokenizer.decode(ids[1:2])
    text = "".join(runtime.generate("AB", 4, stop=stop))
    assert text == tokenizer.decode(ids).partition(stop)[0]
    assert runtime.stats.stopped_by == "stop"


def test_a_graph_that_cannot_be_captured(tmp_path, device, monkeypatch, capsys):
    """Steps go on kernel by kernel, said in one line."""
    runtime = packed_runtime(tmp_path, talker(), device)
    with runtime._sequences(1, 4) as sequences:
        sequences.prompt(prompt(2), 0, 0, "last")
        token, position = sequences.ids.item(), sequences.positions.item()

        @contextmanager
        def refuse(_graph):
            raise RuntimeError("operation not permitted\nmore")
            yield

        stream = SimpleNamespace(wait_stream=lambda _: None)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
        monkeypatch.setattr(torch.cuda, "graph", refuse)
        sequences._eager = False
        sequences._capture()
        assert (sequences.ids.item(), sequences.positions.item()) == (token, position)
        sequences.step()
        assert sequences.positions.item() == position + 1
    line = capsys.readouterr().err
    assert line.startswith("bitdistill: no CUDA graph could be captured (operation not permitted)")
    assert line.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_graph_is_the_step(tmp_path):
    model = student("gemma3")
    runtime = packed_runtime(tmp_path, model, "cuda", embedding="int8")
    ids = prompt(9)
    graphed = list(runtime.generate_ids(ids, 30))
    assert runtime._free[0]._graph is not None
    runtime._free.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "interpreted", lambda: True)
        assert list(runtime.generate_ids(ids, 30)) == graphed


def test_refusals(tmp_path, device):
    runtime = packed_runtime(tmp_path, student("qwen3"), device)
    path = tmp_path / "s"
    cases = {
        "kv_cache": lambda: CudaRuntime(path, device, kv_cache="int8"),
        "context": lambda: CudaRuntime(path, device, context=65),
        "RUN_OR_FILE": lambda: list(runtime.generate("text")),
        "max_new_tokens": lambda: list(runtime.generate_ids([3], max_new_tokens=0)),
        "device": lambda: CudaRuntime(path, "cuda:77"),
    }
    for field, call in cases.items():
        with pytest.raises(UserError) as caught:
            call()
        assert caught.value.field == field
    for ids in ([], [97], [-1], [3] * 65):
        for call in (
            runtime.logits,
            lambda ids: list(runtime.generate_ids(ids)),
            lambda ids: runtime.greedy_batch([ids]),
        ):
            with pytest.raises(UserError, match=r"^prompt: expected"):
                call(ids)


def test_devices_that_cannot(monkeypatch):
    def refused(name):
        with pytest.raises(UserError) as caught:
            runtime_cuda.usable_device(name)
        text = str(caught.value)
        assert text.startswith("device: expected an NVIDIA GPU with capability >= 7.5; got ")
        return text

    assert "'tpuu'" in refused("tpuu")
    assert "'meta'" in refused("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    assert "Tesla V100 with 7.0" in refused("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert runtime_cuda.usable_device("cuda:0") == torch.device("cuda", 0)
    assert "1 usable" in refused("cuda:1")
    monkeypatch.setattr(runtime_cuda.importlib.util, "find_spec", lambda _: None)
    assert "without Triton" in refused("cuda:0")
