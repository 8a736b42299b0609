"""Teacher logits on disk: what is kept, what rounding costs, that every block is trained on with its own, and what is refused."""

import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from test_corpus import byte_tokenizer, texts, write
from test_train import world  # noqa: F401 -- a fixture

import ranks
from bitdistill.data.corpus import TokenStream
from bitdistill.errors import UserError
from bitdistill.kernels.vocabulary import linear_top_k
from bitdistill.stages import RunDirectory
from bitdistill.training import teacher_cache
from bitdistill.training.head import head_distillation_top_k
from bitdistill.training.losses import cross_entropy, logits_distillation, next_tokens
from bitdistill.training.pretrain import NextTokenDistillation
from bitdistill.training.teacher_cache import Layout, TeacherCache, check_room, finish_cache, round_top_k, write_shards
from bitdistill.training.trainer import Counts, collate_blocks

DEPENDS_ON = {"base": (), "refine": ("base",), "cache": ("base",), "pretrain": ("refine", "cache")}

torch.set_num_threads(1)
V, T = 64, 6


def some_blocks(count, seed=3):
    tokens_BT = torch.randint(0, V, (count, T), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row.clone(), "block": i} for i, row in enumerate(tokens_BT)]


def loud(seed):
    """A tiny model whose distributions are far from uniform."""
    model = ranks.tiny_model(seed).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4)
    return model


def make(folder, blocks, model=None, **changes):
    """A finished cache, written by one process."""
    settings = {"blocks": len(blocks), "block_size": T, "top_k": 5, "temperature": 2.0, "vocabulary": V}
    layout = Layout(**settings | changes)
    for name in ("shards", "cache"):
        (folder / name).mkdir(parents=True)
    write_shards(folder / "shards", model or loud(7), blocks, layout, batch_size=4)
    finish_cache(folder / "shards", folder / "cache", layout)
    return folder / "cache"


def opened(folder, blocks=10, block_size=T, vocabulary=V):
    return TeacherCache(folder, blocks=blocks, block_size=block_size, vocabulary=vocabulary)


# ---------------------------------------------------------------------------------------------------- mathematics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "k", "chunk_bytes"), [(1, 1, 1), (7, 36, 1000), (7, 37, 10**9), (0, 3, 1), (5, 4, 444)])
def test_largest_logits_and_the_rest(N, k, chunk_bytes, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((N, 8), (37, 8)))
    indices, values, log_rest = linear_top_k(x, weight, k, temperature=3.0, chunk_bytes=chunk_bytes)
    logits = (x @ weight.T).double()
    expected, _ = logits.topk(k)
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, indices, False)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(logits.gather(1, indices), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(values.double(), expected - expected[:, :1], **tolerance)
    rest = ((logits - expected[:, :1]) / 3).masked_fill(~others, -math.inf).logsumexp(-1)
    torch.testing.assert_close(log_rest.double(), rest, **tolerance)
    assert (log_rest == -math.inf).all() == (k == 37 or N == 0)


def test_ties_and_equal_logits():
    indices, values, log_rest = linear_top_k(torch.zeros(2, 3), torch.ones(5, 3), 2, temperature=1.0)
    assert all(len(set(row)) == 2 for row in indices.tolist())
    assert values.eq(0).all()
    torch.testing.assert_close(log_rest, torch.full((2,), math.log(3)))


@pytest.mark.parametrize(("k", "width"), [(0, 3), (6, 3), (1, 4)])
def test_what_does_not_fit_is_refused(k, width):
    with pytest.raises(ValueError, match=r"^(k|x): expected"):
        linear_top_k(torch.zeros(2, width), torch.ones(5, 3), k, temperature=1.0)


@pytest.mark.parametrize(("spread", "temperature"), [(1.0, 1.0), (4.0, 1.0), (30.0, 1.0), (4.0, 5.0), (30.0, 5.0)])
def test_what_rounding_costs(spread, temperature):
    logits = spread * torch.randn(200, 1000, generator=torch.Generator().manual_seed(0))
    for k in (1, 32, 999, 1000):
        values, indices = logits.topk(k)
        values = values - values[:, :1]
        rest = (logits - logits.amax(-1, keepdim=True)).scatter(1, indices, -math.inf) / temperature
        log_rest = rest.double().logsumexp(-1).float()
        rounded, adjusted = round_top_k(values, log_rest, temperature)
        assert rounded.dtype == torch.float16
        log_p, log_q = (
            torch.cat([v.double() / temperature, r.double()[:, None]], 1).log_softmax(-1)
            for v, r in ((values, log_rest), (rounded, adjusted))
        )
        kl = (log_p.exp() * (log_p - log_q)).nan_to_num(0).sum(-1)
        bound = 2**-23 * (log_p[:, :-1].exp() * values.double().square()).sum(-1) / temperature**2
        assert (kl <= 1.01 * bound + 1e-12).all()
        assert k == 1 or kl.max() > 0
        torch.testing.assert_close(log_q[:, -1], log_p[:, -1], rtol=1e-6, atol=1e-6)  # the mass outside k, to fp32


def test_by_hand():
    """Three words, one cached: KL of (1/2, 1/2 for the others) to (1/4, 3/4) is log 2 / 2 + log(2/3) / 2."""
    hidden, weight = torch.ones(1, 1, 1), torch.log(torch.tensor([[1.0], [2.0], [1.0]]))
    known = torch.tensor([[[0]]]), torch.tensor([[[0.0]]]), torch.tensor([[0.0]])
    options = {"lambda_logits": 1.0, "temperature": 1.0, "ce_items": 1, "kl_items": 1}
    ce, kl = head_distillation_top_k(hidden, weight, torch.tensor([[1]]), *known, **options)
    assert ce.item() == pytest.approx(math.log(2))
    assert kl.item() == pytest.approx(math.log(2) / 2 + math.log(2 / 3) / 2, rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 5, V])
def test_objective_is_cross_entropy_and_kl_of_whole_logits(tmp_path, top_k):
    """With every word cached, the KL of losses.py; else that of distributions whose other words are one. Gradients too."""
    blocks, teacher, student = some_blocks(10), loud(7), ranks.tiny_model(1)
    cache = opened(make(tmp_path, blocks, teacher, top_k=top_k))
    batch = collate_blocks([blocks[i] for i in (8, 0, 3)])
    counts = Counts(answer_tokens=40, tokens=48, positions=48, step=0)
    terms = NextTokenDistillation(student, cache, 3.0)(student, batch, counts)
    assert [weight for weight, _ in terms.values()] == [1.0, 3.0]
    sum(weight * loss for weight, loss in terms.values()).backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()

    with torch.no_grad():
        t = teacher(batch["input_ids"]).logits
        peak = t.amax(-1, keepdim=True)
        t = (t - peak).half().float()  # as the cache has it; log_rest differs by what rounding does to the rest
    z = student(batch["input_ids"]).logits
    ce = cross_entropy(z, next_tokens(batch["labels"]), 40)
    if top_k == V:
        kl = logits_distillation(z, t, torch.ones(3, T, dtype=torch.bool), temperature=2.0, num_items=48)
    else:
        indices = t.topk(top_k).indices
        log_p, log_q = (
            torch.cat([x.gather(2, indices), x.scatter(2, indices, -math.inf).logsumexp(-1, keepdim=True)], 2)
            for x in ((t / 2).log_softmax(-1), (z / 2).log_softmax(-1))
        )
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="sum") / 48
    assert terms["ce"][1].item() == pytest.approx(ce.item(), rel=1e-6)
    assert terms["logits"][1].item() == pytest.approx(kl.item(), rel=1e-5 if top_k == V else 1e-3)
    (ce + 3 * kl).backward()
    for name, p in student.named_parameters():
        tolerance = 1e-5 if top_k == V else 1e-3
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=tolerance * p.grad.abs().max().item())


# ---------------------------------------------------------------------------------------------------- the file


def test_sizes_are_known_before():
    small, large = (Layout(1000, 512, 32, 1.0, vocabulary) for vocabulary in (2**16, 2**16 + 1))
    assert (small.index_dtype, small.bytes_per_token) == (np.uint16, 132)
    assert (large.index_dtype, large.bytes_per_token) == (np.uint32, 196)
    assert (small.blocks_per_shard, small.shards) == (16, 63)
    huge = Layout(10**6, 1024, 32, 1.0, 151_936)
    assert huge.blocks_per_shard * 1024 * 196 <= teacher_cache.SHARD_BYTES
    assert huge.shards * huge.blocks_per_shard >= 10**6
    assert "132 bytes per token, 0.0676 GB" in str(small)
    with pytest.raises(UserError, match="kd_top_k: expected 1 to 20"):
        Layout(1, 1, 21, 1.0, 20)


@pytest.mark.parametrize("blocks_per_shard", [1, 4, 1000])
def test_every_block_comes_back(tmp_path, monkeypatch, blocks_per_shard):
    monkeypatch.setattr(teacher_cache, "LEAST_SHARDS", 1)
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", blocks_per_shard * T * 24)
    blocks, model = some_blocks(11), loud(7)
    folder = make(tmp_path, blocks, model)
    cache = opened(folder, blocks=11)
    assert len(list(folder.glob("shard-*"))) == {1: 11, 4: 3, 1000: 1}[blocks_per_shard]
    total = sum(path.stat().st_size for path in folder.glob("shard-*"))
    assert 0 <= total - cache.layout.total_bytes < 600 * cache.layout.shards
    for chosen in ([10], [3, 4, 5], [9, 0, 6, 1]):
        batch = collate_blocks([blocks[i] for i in chosen])
        indices, values, log_rest = cache.read(batch["block"], batch["input_ids"])
        assert (indices.dtype, values.dtype, log_rest.dtype) == (torch.int32, torch.float16, torch.float32)
        log_p = model(batch["input_ids"]).logits.detach()
        expected = log_p.topk(5)
        torch.testing.assert_close(log_p.gather(2, indices.long()), expected.values, rtol=0, atol=1e-4)
        torch.testing.assert_close(values.float(), expected.values - expected.values[..., :1], rtol=2**-11, atol=1e-4)
        theirs = (log_p / 2).log_softmax(-1).scatter(2, indices.long(), -math.inf).logsumexp(-1)
        ours = torch.cat([values.float() / 2, log_rest[..., None]], 2).log_softmax(-1)[..., -1]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_indices_of_a_large_vocabulary(tmp_path):
    """More words than 16 bits can count."""
    head = torch.zeros(70_000, 2)
    head[65_999, 0] = 3.0
    embeddings = SimpleNamespace(weight=head, bias=None)

    class Model(torch.nn.Module):
        config, device = SimpleNamespace(), torch.device("cpu")

        def get_output_embeddings(self):
            return embeddings

        def forward(self, input_ids, **_):
            return SimpleNamespace(logits=embeddings.forward(torch.ones(*input_ids.shape, 2)))

    blocks = some_blocks(2)
    cache = opened(make(tmp_path, blocks, Model(), vocabulary=70_000, top_k=1), blocks=2, vocabulary=70_000)
    batch = collate_blocks(blocks)
    indices, _, log_rest = cache.read(batch["block"], batch["input_ids"])
    assert indices.unique().tolist() == [65_999]
    torch.testing.assert_close(log_rest, torch.full((2, T), math.log(69_999) - 1.5))


def test_a_restart_writes_what_is_missing(tmp_path, monkeypatch):
    blocks, calls, of_model = some_blocks(12), [], teacher_cache.teacher_logits
    expected = make(tmp_path / "whole", blocks)

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return of_model(*arguments)

    monkeypatch.setattr(teacher_cache, "teacher_logits", counted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "again", blocks)
    shards = tmp_path / "again" / "shards"
    assert sorted(path.name for path in shards.iterdir()) == [f"shard-{i:05d}.safetensors" for i in range(7)]
    layout = opened(expected, blocks=12).layout
    write_shards(shards, loud(7), blocks, layout, batch_size=4)
    assert len(calls) == 8 + 5
    finish_cache(shards, tmp_path / "again" / "cache", layout)
    again = tmp_path / "again" / "cache"
    assert (again / "cache.json").read_bytes() == (expected / "cache.json").read_bytes()
    for path in expected.glob("shard-*"):
        ours, theirs = load_file(again / path.name), load_file(path)
        assert ours.keys() == theirs.keys() == {"indices", "values", "log_rest", "token_hash"}
        for name, array in theirs.items():
            np.testing.assert_array_equal(ours[name], array)


def test_the_stream_numbers_its_blocks(tmp_path):
    """Also after resuming, and across the end of the corpus; so a block's number finds what the teacher said to it."""
    file = write(tmp_path / "corpus", "jsonl", texts(12))
    tokenizer = byte_tokenizer()
    stream = TokenStream(str(file), tokenizer, 16, window=4)
    one = iter(stream)
    taken = [next(one) for _ in range(60)]
    assert stream.epochs
    assert [block["block"] for block in taken] == list(range(60))
    for done in (1, 7, 31, 59):
        resumed, other = (
            TokenStream(str(file), tokenizer, 16, window=4),
            TokenStream(str(file), tokenizer, 16, window=4),
        )
        reader = iter(other)
        for _ in range(done):
            next(reader)
        resumed.load_state(other.state_for(done))
        block = next(iter(resumed))
        assert block["block"] == done
        assert torch.equal(block["input_ids"], taken[done]["input_ids"])


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def finished(tmp_path):
    return make(tmp_path, some_blocks(10))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"blocks": 11}, "blocks: expected at least 11; got 10"),
        ({"block_size": 7}, "block_size: expected 7; got 6"),
        ({"vocabulary": 65}, "vocabulary: expected 65; got 64"),
    ],
)
def test_made_for_something_else(finished, changes, said):
    opened(finished, blocks=3)  # fewer are fine
    with pytest.raises(UserError, match=f"{said}.*--stage cache"):
        opened(finished, **changes)


def test_a_file_that_is_not_what_it_was(finished):
    shard = finished / "shard-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(
        UserError, match=rf"shard-00002.safetensors: expected {len(whole)} bytes; got {len(whole) - 100}"
    ):
        opened(finished)
    shard.unlink()
    with pytest.raises(UserError, match="got no such file"):
        opened(finished)
    batch = collate_blocks([some_blocks(10)[2]])
    shutil.copy(finished / "shard-00003.safetensors", shard)  # as long, but of another block
    with pytest.raises(UserError, match=r"shard-00002.*first_block': '2'"):
        opened(finished).read(batch["block"], batch["input_ids"])
    shard.write_bytes(b"\xff" * len(whole))
    with pytest.raises(UserError, match="a whole safetensors file"):
        opened(finished).read(batch["block"], batch["input_ids"])


def test_headers(finished):
    header = json.loads((finished / "cache.json").read_text())
    for changed in (header | {"version": 2}, header | {"format": "something"}):
        (finished / "cache.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match="version: expected bitdistill teacher logits, 1"):
            opened(finished)
    (finished / "cache.json").write_text("{")
    with pytest.raises(UserError, match="header: expected JSON"):
        opened(finished)
    with pytest.raises(UserError, match=r"cache\.json; got no such file"):
        opened(finished / "nowhere")


def test_other_tokens_than_the_teacher_saw(finished):
    cache, blocks = opened(finished), some_blocks(10)
    batch = collate_blocks(blocks[:2])
    batch["input_ids"][1, 3] = (batch["input_ids"][1, 3] + 1) % V
    with pytest.raises(UserError, match="tokens of block 1: expected hash"):
        cache.read(batch["block"], batch["input_ids"])
    with pytest.raises(UserError, match="blocks: expected more than 10; got 10"):
        cache.read(torch.tensor([10]), blocks[0]["input_ids"][None])


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    layout = Layout(10, 512, 32, 1.0, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=layout.total_bytes - 1))
    with pytest.raises(UserError, match=r"output_dir: expected 0.000676 GB free.*kd_top_k"):
        check_room(tmp_path, layout)
    (tmp_path / "shard-00000.safetensors").write_bytes(b"x" * 10)  # what is there already needs no room
    check_room(tmp_path, layout)


# ---------------------------------------------------------------------------------------------------- stages


def test_more_blocks_than_needed_are_enough(tmp_path):
    directory = RunDirectory(tmp_path, DEPENDS_ON, ("refine", "cache", "pretrain"))
    assert directory.inputs("pretrain") == ("refine", "cache")
    with directory.result("cache", {"cache": {"blocks": 100, "top_k": 4}}, {}):
        pass
    for blocks, top_k, expected in (
        (100, 4, None),
        (60, 4, None),
        (101, 4, "cache.blocks changed from 100 to 101"),
        (60, 5, "cache.top_k changed from 4 to 5"),
    ):
        assert directory.reason_to_run("cache", {"cache": {"blocks": blocks, "top_k": top_k}}) == expected


def test_without_distillation_stage_2_stands_on_what_it_stood_on(tmp_path):
    assert RunDirectory(tmp_path, DEPENDS_ON, ("base", "refine", "pretrain")).inputs("pretrain") == ("refine",)


RANKS = """
import json, sys
from pathlib import Path
import ranks
from bitdistill.distributed import checkpoint, process_group, presets

process_group.initialize("cpu")
import torch
from test_corpus import byte_tokenizer
from bitdistill.data.corpus import TokenStream
from bitdistill.training.pretrain import NextTokenDistillation, pretrain
from bitdistill.training.teacher_cache import Layout, TeacherCache, finish_cache, write_shards
from bitdistill.training.trainer import release, training_arguments
from test_teacher_cache import big_model

corpus, out = sys.argv[-2], Path(sys.argv[-1])


def stream():
    return TokenStream(corpus, byte_tokenizer(), 16, seed=5)


layout = Layout(blocks=16, block_size=16, top_k=6, temperature=2.0, vocabulary=272)
shards, cache = out.parent / "shards", out.parent / "cache"
if process_group.is_main():
    shards.mkdir()
    cache.mkdir()
process_group.barrier()
write_shards(shards, big_model(7).eval(), stream(), layout, batch_size=2)
process_group.barrier()
if process_group.is_main():
    finish_cache(shards, cache, layout)
process_group.barrier()

found = {}
for name, zero, resume in (("2", 2, False), ("2 resumed", 2, True), ("3", 3, False)):
    reader = TeacherCache(cache, blocks=16, block_size=16, vocabulary=272)
    seen, read = [], reader.read
    reader.read = lambda block, tokens: (seen.append(block.tolist()), read(block, tokens))[1]
    folder = out.parent / f"checkpoints-{zero}"
    arguments = training_arguments(
        folder, deepspeed=presets.deepspeed_config(zero, precision="fp32", device="cpu"), seed=0, report_to=[],
        max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2,
        learning_rate=1e-2, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
    )
    if resume:
        import shutil
        process_group.barrier()
        if process_group.is_main():
            shutil.rmtree(folder / "checkpoint-4")
        process_group.barrier()
    run = out.parent / name
    run.mkdir(exist_ok=True)
    student = big_model(1)
    trainer, facts = pretrain(student, stream(), arguments, stage="pretrain", run_dir=run, resume=resume,
                              objective=NextTokenDistillation(student, reader, lambda_logits=3.0))
    lines = [line for line in trainer.state.log_history if "loss_ce" in line]
    found[f"{name} losses"] = [[line["loss_ce"], line["loss_logits"], line["loss"]] for line in lines]
    found[f"{name} from"] = facts["resumed_from"]
    everyone = [None] * process_group.world_size()
    torch.distributed.all_gather_object(everyone, seen)
    found[f"{name} seen"] = everyone
    release(trainer)
if process_group.is_main():
    out.write_text(json.dumps(found))
process_group.shutdown()
"""


def big_model(seed):
    """tiny_model with the words of test_corpus.byte_tokenizer, and some."""
    from transformers import Qwen3ForCausalLM

    config = ranks.tiny_model().config
    config.vocab_size = 272
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(4 if seed == 7 else 1)
    return model


@pytest.mark.slow
def test_two_ranks_micro_steps_and_resume(tmp_path):
    """Each block is trained on with what the teacher said to it, once, whoever gets it; losses as one process has them."""
    file = write(tmp_path / "corpus", "jsonl", texts(60))
    found = ranks.run(tmp_path / "run", RANKS, str(file)).found
    blocks = [block for block, _ in zip(TokenStream(str(file), byte_tokenizer(), 16, seed=5), range(16), strict=False)]
    alone = make(tmp_path / "alone", blocks, big_model(7).eval(), block_size=16, top_k=6, vocabulary=272)
    cache = TeacherCache(alone, blocks=16, block_size=16, vocabulary=272)
    theirs = TeacherCache(tmp_path / "run" / "cache", blocks=16, block_size=16, vocabulary=272)
    everything = collate_blocks(blocks)
    for a, b in zip(*(c.read(everything["block"], everything["input_ids"]) for c in (cache, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)

    model, expected = big_model(1), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0)
    for step in range(4):
        batch = collate_blocks(blocks[4 * step : 4 * step + 4])
        terms = NextTokenDistillation(model, cache, 3.0)(model, batch, Counts(4 * 15, 4 * 16, 4 * 16, step))
        loss = sum(weight * term for weight, term in terms.values())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append([terms["ce"][1].item(), terms["logits"][1].item(), loss.item()])
    for name, steps in (("2", range(4)), ("2 resumed", range(2, 4)), ("3", range(4))):
        logged = found[f"{name} losses"][-len(steps) :]
        for ours, of_one in zip(logged, [expected[step] for step in steps], strict=True):
            assert ours == pytest.approx(of_one, rel=1e-4)
        first, second = found[f"{name} seen"]
        assert first == [[4 * step + 2 * micro] for step in steps for micro in range(2)]
        assert second == [[4 * step + 2 * micro + 1] for step in steps for micro in range(2)]
    assert found["2 resumed from"] == "checkpoint-2"


JOB = """
import json, os, shutil, sys
from pathlib import Path
from bitdistill import train
from bitdistill.training import teacher_cache
from bitdistill.distributed import process_group
from bitdistill.errors import UserError

world, out = Path(sys.argv[-2]), Path(sys.argv[-1])
run = out.parent / "job"
corpus = out.parent / "corpus.txt"
shutil.copy(world / "corpus.txt", corpus)
files = {"model": "base", "task": "task.yaml", "train_file": "train.jsonl", "validation_file": "validation.jsonl"}
files |= {"config": "settings.yaml"}
given = [part for name, file in files.items() for part in (f"--{name}", str(world / file))]
found = []


def job(stage, *options):
    sys.argv = ["train.py", "--recipe", "quick", *given, "--corpus", str(corpus), "--output_dir", str(run), "--report",
                "false", "--pretrain.lambda_logits", "2", "--pretrain.kd_top_k", "8", "--stage", stage, *options]
    said = []
    process_group.say = said.append
    stderr, sys.stderr = sys.stderr, open(out.parent / "stderr", "w+")
    code = train.main()
    sys.stderr.seek(0)
    said.append(sys.stderr.read())
    sys.stderr = stderr
    process_group.shutdown()
    found.append({"code": code, "said": "\\n".join(said)})


job("refine")
job("pretrain")
job("cache", "--pretrain.max_steps", "6")
job("cache", "--pretrain.max_steps", "6", "--pretrain.learning_rate", "1e-3")
job("cache", "--pretrain.max_steps", "4")
job("pretrain", "--pretrain.max_steps", "8")
job("pretrain", "--pretrain.max_steps", "4")
job("cache", "--pretrain.max_steps", "7", "--pretrain.per_device_train_batch_size", "4")
job("cache", "--pretrain.max_steps", "8")
corpus.write_text("other " + corpus.read_text())
job("pretrain", "--pretrain.max_steps", "4")
logits, calls = teacher_cache.teacher_logits, []


def interrupted(*arguments):
    calls.append(1)
    if len(calls) == 6:
        raise UserError("test", expected="no end", got="one", do="Resume.")
    return logits(*arguments)


teacher_cache.teacher_logits = interrupted
job("cache", "--pretrain.max_steps", "4")
job("cache", "--pretrain.max_steps", "4", "--resume")
found.append(len(calls))
job("cache", "--pretrain.max_steps", "4", "--pretrain.kd_top_k", "1000000")
out.write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_main_job(world, tmp_path):  # noqa: F811
    found = ranks.run(tmp_path / "run", JOB, str(world), ranks=None, fresh=True).found
    expected = [
        (0, "refine: runs (not run yet)"),
        (2, "a finished `cache` before `pretrain`"),
        (0, "cache: runs (not run yet)"),
        (0, "cache: done and unchanged, skipped"),
        (0, "cache: done and unchanged, skipped"),
        (2, "cache.blocks changed from 48 to 64"),
        (0, "pretrain: runs (not run yet)"),
        (0, "cache: done and unchanged, skipped"),
        (0, "cache: runs (cache.blocks changed from 48 to 64)"),
        (2, "corpus.source changed from"),
        (2, "test: expected no end"),
        (0, "cache: runs (corpus.source changed from"),
        (2, "kd_top_k: expected 1 to "),
    ]
    assert found.pop(-2) == 6 + 32 - 5  # 32 blocks, a shard each; five were written before the sixth failed
    assert len(found) == len(expected)
    for (code, said), job in zip(expected, found, strict=True):
        assert job["code"] == code, job
        assert said in job["said"]
    assert "48 blocks of 16 tokens, the 8 largest of" in found[2]["said"]
    assert "36 bytes per token" in found[2]["said"]
    run = tmp_path / "run" / "job"
    assert json.loads((run / "cache" / "done.json").read_text())["settings"]["cache.blocks"] == 32
    assert not list((run / "checkpoints").glob("cache*"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["loss_logits"] > 0
        assert line["loss"] == pytest.approx(line["loss_ce"] + 2 * line["loss_logits"], rel=1e-4)
    assert os.path.isfile(Path(run, "pretrain", "model.safetensors"))
