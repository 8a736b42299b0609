"""A corpus as tokens on disk: the blocks of the stream, each document by one rank, equal over ranks; documents kept apart."""

import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from test_corpus import byte_tokenizer, texts, write
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import ranks
from bitdistill.data import corpus, token_shards
from bitdistill.data.corpus import TokenStream
from bitdistill.data.token_shards import ShardedStream, TokenShards, blocks_to_make, write_tokens
from bitdistill.distributed import process_group
from bitdistill.errors import UserError
from bitdistill.student.norms import fuse_norms, unfuse_norms
from bitdistill.student.refine import refine
from bitdistill.student.rotary import fuse_rotary, unfuse_rotary
from bitdistill.training.pretrain import model_inputs
from bitdistill.training.trainer import collate_blocks

torch.set_num_threads(1)
T, WINDOW = 16, 4


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """A few documents make many batches, pieces and shards."""
    monkeypatch.setattr(corpus, "BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(corpus, "BATCH_CHARACTERS", 90)
    monkeypatch.setattr(corpus, "PIECE_CHARACTERS", 40)
    monkeypatch.setattr(token_shards, "SHARD_BATCHES", 2)


def stream_of(file):
    return TokenStream(str(file), byte_tokenizer(), T, window=WINDOW, seed=3)


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_blocks_of_the_stream_in_its_order_over_epochs(tmp_path, kind):
    file = write(tmp_path / "c", kind, texts(40))
    write_tokens(tmp_path / "tokens", stream_of(file), 10**9)
    shards = TokenShards(tmp_path / "tokens")
    assert shards.complete
    assert len(list((tmp_path / "tokens").iterdir())) > 4
    ours = ShardedStream(shards, stream_of(file), document_mask=False)
    reference = stream_of(file)
    for a, b in zip(itertools.islice(ours, 3 * ours.blocks + 5), reference, strict=False):
        assert a["block"] == b["block"]
        assert torch.equal(a["input_ids"], b["input_ids"])
        assert torch.equal(a["labels"], b["labels"])
    assert ours.epochs == 3


def test_places_are_gone_on_from_without_reading_what_was_before(tmp_path):
    file = write(tmp_path / "c", "jsonl", texts(40))
    write_tokens(tmp_path / "tokens", stream_of(file), 10**9)
    shards = TokenShards(tmp_path / "tokens")
    whole = [block["input_ids"] for block in itertools.islice(ShardedStream(shards, stream_of(file), True), 120)]
    reference = stream_of(file)
    taken = iter(reference)
    for done in range(0, 110, 7):
        resumed = ShardedStream(shards, stream_of(file), True)
        resumed.load_state(json.loads(json.dumps(resumed.state_for(done))))
        assert torch.equal(next(iter(resumed))["input_ids"], whole[done])
    for _ in range(50):
        next(taken)
    resumed.load_state(reference.state_for(50))  # of a checkpoint that was written while texts became tokens on the way
    assert torch.equal(next(iter(resumed))["input_ids"], whole[50])
    with pytest.raises(UserError, match="seed of the token stream"):
        resumed.load_state({**reference.state_for(50), "settings": reference.settings | {"seed": 4}})


class Ranks:
    """Ranks in threads of one process: `process_group` gives each its number, and its barrier waits for all."""

    def __init__(self, world, monkeypatch):
        self.world, self.local, self.wait = world, threading.local(), threading.Barrier(world)
        monkeypatch.setattr(process_group, "world_size", lambda: world)
        monkeypatch.setattr(process_group, "rank", lambda: self.local.rank)
        monkeypatch.setattr(process_group, "barrier", lambda: self.wait.wait(20))

    def run(self, do):
        """`do(rank)` on every rank; raises what any of them raises."""

        def one(rank):
            self.local.rank = rank
            try:
                return do(rank)
            except BaseException:
                self.wait.abort()
                raise

        with ThreadPoolExecutor(self.world) as pool:
            return [future.result() for future in [pool.submit(one, rank) for rank in range(self.world)]]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_each_document_by_one_rank_and_a_restart_on_other_ranks(tmp_path, monkeypatch, world):
    """Killed after some shards, gone on with on `world` ranks: the same files, no document made tokens of twice."""
    documents = [f"{i} " + text for i, text in enumerate(texts(40))]
    file, expected = write(tmp_path / "c", "jsonl", documents), tmp_path / "expected"
    Ranks(1, monkeypatch).run(lambda rank: write_tokens(expected, stream_of(file), 10**9))
    files = sorted(expected.iterdir())
    again = tmp_path / "again"
    again.mkdir()
    for path in (files[0], files[1], files[3]):  # one of a round that was not finished
        (again / path.name).write_bytes(path.read_bytes())
    made = []

    def do(rank):
        stream = stream_of(file)
        tokens_of = stream.tokens_of
        stream.tokens_of = lambda rows: (made.extend(row["text"] for row in rows), tokens_of(rows))[1]
        write_tokens(again, stream, 10**9)

    Ranks(world, monkeypatch).run(do)
    there = sum(len(token_shards.TokenShards(expected)._shard(i)[1]) for i in (0, 1, 3))
    assert len(made) == len(set(made)) == len(documents) - there
    for path in files:
        ours, theirs = (token_shards._opened(folder, int(path.stem[-5:])) for folder in (again, expected))
        assert ours.metadata() == theirs.metadata()
        for name in ("tokens", "starts"):
            assert (ours.get_tensor(name) == theirs.get_tensor(name)).all()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_no_block_is_lost_or_seen_twice_on_any_number_of_ranks(tmp_path, world):
    """12 rows per step whatever the ranks, on `world` ranks and then on others: the blocks 0 to 47 and on, each once."""
    file = write(tmp_path / "c", "jsonl", texts(60))
    write_tokens(tmp_path / "tokens", stream_of(file), 10**9)
    shards, seen, state = TokenShards(tmp_path / "tokens"), [], None
    for ranks_now in (world, world % 4 + 1):
        for rank in range(ranks_now):
            stream = ShardedStream(shards, stream_of(file), True)
            if state is not None:
                stream.load_state(state)
            part = IterableDatasetShard(stream, batch_size=12 // ranks_now, num_processes=ranks_now, process_index=rank)
            seen += [block["block"] for block in itertools.islice(part, 4 * 12 // ranks_now)]
        state = json.loads(json.dumps(stream.state_for(48)))
    assert sorted(seen) == list(range(96))


def test_no_more_is_made_than_is_needed_and_more_goes_on_after_it(tmp_path):
    file = write(tmp_path / "c", "jsonl", texts(60))
    few = blocks_to_make(5, WINDOW) * T
    write_tokens(tmp_path / "tokens", stream_of(file), few)
    shards = TokenShards(tmp_path / "tokens")
    assert few <= shards.tokens < few + 200
    assert not shards.complete
    before = [block["input_ids"] for block in itertools.islice(ShardedStream(shards, stream_of(file), True), 8)]
    write_tokens(tmp_path / "tokens", stream_of(file), 10**9)
    after = ShardedStream(TokenShards(tmp_path / "tokens"), stream_of(file), True)
    assert all(torch.equal(a, b["input_ids"]) for a, b in zip(before, after, strict=False))
    short = write(tmp_path / "short", "jsonl", ["hello"])
    write_tokens(tmp_path / "t", stream_of(short), 10**9)
    with pytest.raises(UserError, match="corpus: expected at least 16 tokens; got 6 tokens"):
        ShardedStream(TokenShards(tmp_path / "t"), stream_of(short), True)


def test_a_damaged_shard_is_named(tmp_path):
    file = write(tmp_path / "c", "jsonl", texts(40))
    write_tokens(tmp_path / "tokens", stream_of(file), 10**9)
    path = tmp_path / "tokens" / "shard-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(UserError, match=r"shard-00001.safetensors: expected digest .*Remove .*tokens"):
        list(itertools.islice(ShardedStream(TokenShards(tmp_path / "tokens"), stream_of(file), True), 60))
    path.write_bytes(whole[:50])
    with pytest.raises(UserError, match="a whole safetensors file"):
        TokenShards(tmp_path / "tokens")


# ---------------------------------------------------------------------------------------------------- documents


def test_positions_and_labels_by_hand(tmp_path):
    file = write(tmp_path / "c", "jsonl", ["abcde", "f", "ghijklmnopqrstuvwxyz"])
    write_tokens(tmp_path / "tokens", stream_of(file), 10**9)
    stream = ShardedStream(TokenShards(tmp_path / "tokens"), stream_of(file), True)
    order = sorted(itertools.islice(stream, 1), key=lambda block: block["block"])
    block = (
        order[0] if stream.blocks == 1 else next(b for b in map(stream.block, range(2)) if b["position_ids"][5] == 5)
    )
    assert block["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, *range(8)]  # each with its EOS
    ids = block["input_ids"].tolist()
    assert block["labels"].tolist() == [*ids[:6], -100, ids[7], -100, *ids[9:]]


def tiny(family, attention):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    models = {
        "qwen3": ranks.tiny_model,
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes)),
        "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**sizes, sliding_window=5)),
    }
    model = models[family]().eval()
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3"])
@pytest.mark.parametrize("ternary", [False, True])
def test_logits_of_a_document_do_not_depend_on_its_neighbors(family, attention, ternary):
    """Other documents around it: the same bits. Alone: the same numbers. With our CPU kernels, and as transformers computes."""
    model = tiny(family, attention)
    if ternary:
        refine(model)
    lengths, draw = (7, 9, 4), torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (2, 20), generator=draw)
    ids[1, 7:16] = ids[0, 7:16]
    positions = torch.cat([torch.arange(n) for n in lengths])
    blocks = [{"input_ids": row, "labels": row, "position_ids": positions} for row in ids]
    alone = {"input_ids": ids[:1, 7:16], "attention_mask": torch.ones(1, 9, dtype=torch.int64)}
    for fused in (False, True):
        if fused:
            fuse_norms(model)
            fuse_rotary(model)
        try:
            with torch.no_grad():
                both = model(**model_inputs(collate_blocks(blocks))).logits[:, 7:16]
                one = model(**alone).logits
                mixed = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 7:16]
        finally:
            unfuse_norms(model)
            unfuse_rotary(model)
        assert torch.equal(both[0], both[1])
        assert not torch.equal(mixed[0], mixed[1])
        if not ternary:  # where a last bit may move a code
            torch.testing.assert_close(both[:1], one, rtol=1e-4, atol=1e-4)
