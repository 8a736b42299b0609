"""Embeddings that are trained in the packed file's formats: one gradient for the master, the same numbers in training, in the
file and in the runtime, and refusals. Every family, tied and not."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_head import distillation
from test_train import job, world  # noqa: F401 -- a fixture
from transformers import AutoModelForCausalLM

from bitdistill.config import ExportConfig, RefineConfig, RunConfig
from bitdistill.errors import UserError
from bitdistill.export.parity import prove_parity
from bitdistill.export.write import write_packed
from bitdistill.kernels.tables import QUANTIZED_FORMATS, dequantize_table, quantize_table
from bitdistill.runtime.cpu import Runtime
from bitdistill.runtime.packed_file import read_packed
from bitdistill.student.embeddings import QuantizedEmbedding, QuantizedHead, embedding_format, quantize_embeddings
from bitdistill.student.refine import load_student, refine, save_student
from bitdistill.training.head import head_weight
from bitdistill.training.losses import cross_entropy, next_tokens
from bitdistill.training.pretrain import NextToken
from bitdistill.training.trainer import Counts
from tiny_students import CONFIGS, prompt

torch.set_num_threads(1)
PROMPTS = [prompt(20), prompt(40, seed=2)]


def plain(name, **changes):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    for field, value in changes.items():
        setattr(config, field, value)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()


def student(name, embedding, **changes):
    model = plain(name, **changes)
    refine(model, embedding=embedding)
    return model


def rounded_(model, embedding):
    """The full-precision model with the values that the format gives to its tables."""
    with torch.no_grad():
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            weight.copy_(dequantize_table(*quantize_table(weight, embedding)))
    return model


def assert_close(a, b):
    """Gradients that were summed in another order."""
    torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-6 * b.abs().max().item())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embedding", QUANTIZED_FORMATS)
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_trains_the_rounded_model_and_moves_the_master(name, embedding, tied):
    """Logits and every gradient are those of a model that holds the rounded tables: nothing is lost on the way to the master,
    from the head, from the lookup, or from the loss inside the head."""
    ids = torch.tensor([PROMPTS[0], PROMPTS[1][:20]])
    theirs = rounded_(plain(name, tie_word_embeddings=tied), embedding)
    ours = plain(name, tie_word_embeddings=tied)
    keys = list(ours.state_dict())
    quantize_embeddings(ours, embedding)
    assert list(ours.state_dict()) == keys
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    ours.tie_weights()
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    assert embedding_format(ours) == embedding
    assert torch.equal(ours.model.embed_tokens(ids), theirs.model.embed_tokens(ids))
    logits = theirs(ids).logits
    assert torch.equal(ours(ids).logits, logits)
    with head_weight(ours) as weight:
        assert torch.equal(weight, theirs.lm_head.weight)

    cross_entropy(logits, next_tokens(ids), 38).backward()
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    ((_, loss),) = NextToken(ours)(ours, batch, Counts(38, 40, 40, 0)).values()
    loss.backward()
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(parameter.grad, other.grad)
    ours.zero_grad()
    cross_entropy(ours(ids).logits, next_tokens(ids), 38).backward()
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(parameter.grad, other.grad)


def test_full_precision_is_left_alone():
    model, other = plain("qwen3"), plain("qwen3")
    classes = [type(module) for module in model.modules()]
    quantize_embeddings(model, "fp16")
    assert [type(module) for module in model.modules()] == classes
    assert embedding_format(model) == "fp16"
    with head_weight(model) as weight:
        assert weight is model.lm_head.weight
    refine(model)
    refine(other, embedding="fp16")
    assert model.config.bitdistill == other.config.bitdistill
    assert model.config.bitdistill["embedding"] == "fp16"


def test_refinement_says_and_remembers_it(tmp_path):
    model = plain("llama")
    said = str(refine(model, embedding="int4"))
    assert "21 of 21 linears ternary, embedding and LM head int4;" in said
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert isinstance(model.lm_head, QuantizedHead)
    save_student(tmp_path, model)
    state = load_file(tmp_path / "model.safetensors")
    assert torch.equal(state["lm_head.weight"], model.lm_head.weight)  # the master, not what it is rounded to
    back = load_student(tmp_path).eval()
    assert embedding_format(back) == "int4"
    ids = torch.tensor([PROMPTS[0]])
    assert torch.equal(back(ids).logits, model(ids).logits)
    record = json.loads((tmp_path / "config.json").read_text())
    del record["bitdistill"]["embedding"]  # as students were saved before there was a choice
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert embedding_format(load_student(tmp_path)) == "fp16"


@pytest.mark.parametrize(
    ("name", "embedding"),
    [("llama", "int8"), ("llama_biases", "ternary"), ("qwen2", "int4"), ("qwen3", "ternary"), ("gemma3", "int4")],
)
def test_the_file_is_what_was_trained(tmp_path, name, embedding):
    model = student(name, embedding)
    sizes = write_packed(tmp_path / "s", model, packing="2bit" if embedding == "int8" else "base3")
    assert sizes["embedding"] == embedding
    packed = read_packed(tmp_path / "s")
    with head_weight(model) as weight:
        np.testing.assert_array_equal(packed.table(packed.config.tables()[-1]), weight.detach().numpy())
    embedded = model.get_input_embeddings()(torch.arange(97)).detach().numpy()
    scale = np.float32(packed.config.embedding_scale)
    assert (scale != 1) == (name == "gemma3")
    np.testing.assert_array_equal(packed.table("model.embed_tokens") * scale, embedded)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    proof = prove_parity(tmp_path / "s", model, PROMPTS)
    assert proof["product_max_diff"] == 0
    assert proof["embedding_mean_kl"] == 0  # the student multiplies with the file's own numbers
    assert proof["embedding_same_top1"] == 1
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    runtime = Runtime(tmp_path / "s", threads=1, kv_cache="fp32")
    ids = list(PROMPTS[0])
    got = list(runtime.generate_ids(ids, 12))
    with torch.no_grad():
        logits = model(torch.tensor([ids + got])).logits[0, len(ids) - 1 : -1]
    chosen = logits[torch.arange(len(got)), torch.tensor(got)]
    assert len(got) >= 3
    assert (
        chosen == logits.amax(dim=1)
    ).float().mean() >= 0.9  # greedy, but for a near tie decided by a flipped int8 code


@pytest.mark.parametrize("embedding", QUANTIZED_FORMATS)
@pytest.mark.parametrize("what", ["entries", "scales"])
def test_parity_fails_on_another_table(tmp_path, embedding, what):
    """One code, or the scale, of the last row of an untied head."""
    model = student("llama", embedding)
    write_packed(tmp_path / "s", model)
    row = model.lm_head.weight.data[96]
    if what == "scales":
        row *= 2  # the codes stay
    else:
        codes = quantize_table(row[None], embedding)[0][0].abs()
        row[torch.where(codes == 0, 127, codes).argmin()] *= -1  # the smallest code that has a sign: the scale stays
    count = 97 * (2 if embedding == "int4" else 1) if what == "scales" else 97 * 64
    changed = 2 if what == "scales" and embedding == "int4" else 1
    with pytest.raises(RuntimeError, match=f"lm_head: {changed} of {count} {what} from row 0 on differ"):
        prove_parity(tmp_path / "s", model, PROMPTS)


def test_a_quantized_embedding_is_stored_as_it_was_trained_or_not_at_all(tmp_path):
    for embedding in QUANTIZED_FORMATS:
        model = student("qwen3", embedding)
        assert write_packed(tmp_path / "s", model, embedding=embedding)["embedding"] == embedding
        for other in {"fp16", *QUANTIZED_FORMATS} - {embedding}:
            with pytest.raises(
                UserError, match=f"expected {embedding}, in which .* was trained; got {other}"
            ) as caught:
                write_packed(tmp_path / "s", model, embedding=other)
            assert caught.value.field == "export.embedding"
    full = student("qwen3", "fp16")
    for embedding in ("fp16", *QUANTIZED_FORMATS):
        assert write_packed(tmp_path / "s", full, embedding=embedding)["embedding"] == embedding
    assert write_packed(tmp_path / "s", full)["embedding"] == "fp16"


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="expected one of fp16, int8, int4, ternary; got 'int2'"):
        student("qwen3", "int2")
    model = plain("qwen3", hidden_size=40)
    with pytest.raises(UserError, match="a hidden size that 32 divides, for int4; got 40"):
        refine(model, embedding="int4")
    refine(model, embedding="ternary")  # the refusal left it whole
    trained = RefineConfig(embedding="ternary")
    with pytest.raises(UserError, match=r"^export.embedding: .*got fp16"):
        RunConfig(refine=trained, export=ExportConfig(embedding="fp16")).validate()
    for stored in (None, "ternary"):
        RunConfig(refine=trained, export=ExportConfig(embedding=stored)).validate()
    RunConfig(export=ExportConfig(embedding="fp16")).validate()


@pytest.mark.parametrize("embedding", QUANTIZED_FORMATS)
def test_trained_by_both_stages_saved_and_packed(tmp_path, embedding):
    """A few steps of stage 2's and of stage 3's objective: the loss falls, the codes move, the file holds the last ones."""
    model, teacher = student("qwen3", embedding), plain("qwen3").requires_grad_(False)
    ids = torch.tensor([PROMPTS[0], PROMPTS[1][:20]])
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    before = quantize_table(model.lm_head.weight, embedding)[0]
    for objective in (NextToken(model), distillation(model, teacher)):
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
        for _ in range(6):
            loss = sum(weight * term for weight, term in objective(model, batch, Counts(38, 40, 40, 0)).values())
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < 0.8 * losses[0]
        after = quantize_table(model.lm_head.weight, embedding)[0]
        assert (after != before).any()
        before = after
    save_student(tmp_path / "student", model)
    back = load_student(tmp_path / "student")
    write_packed(tmp_path / "s", back)
    assert prove_parity(tmp_path / "s", model, PROMPTS)["embedding_mean_kl"] == 0
    assert np.array_equal(read_packed(tmp_path / "s").table_codes("model.embed_tokens")[0], before.numpy())


@pytest.mark.slow
def test_the_main_job(world, tmp_path):  # noqa: F811
    """All stages: masters of the tables move, students on disk know the format, and the files are what was trained."""
    run, short = tmp_path / "run", ["--max_steps", "3", "--export.speed_tokens", "0", "--report", "false"]
    output = job(world, run, *short, "--refine.embedding", "ternary")
    assert "14 of 14 linears ternary, embedding and LM head ternary; 4 SubLN added" in output
    teacher = load_file(run / "teacher" / "model.safetensors")
    assert "lm_head.weight" not in teacher  # tied: it would count twice in the sizes
    folders = [run / stage for stage in ("refine", "pretrain", "distill", "baseline")]
    masters = [load_file(folder / "model.safetensors")["model.embed_tokens.weight"] for folder in folders]
    assert len({master.sum().item() for master in masters}) == 4
    for file, master in (("student", masters[2]), ("baseline", masters[3])):
        packed = read_packed(run / "export" / f"{file}.safetensors")
        assert packed.config.embedding == "ternary"
        want = dequantize_table(*quantize_table(master, "ternary"))
        assert torch.equal(torch.from_numpy(packed.table("model.embed_tokens")), want)
    assert json.loads((run / "export" / "proof.json").read_text())["embedding_mean_kl"] == 0
    output = job(world, tmp_path / "other", *short, "--student", str(run / "pretrain"), code=2)
    assert "refine.embedding: expected ternary" in output
    assert "teacher: runs" not in output
