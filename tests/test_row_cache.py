"""What the teacher of stage 3 said, on disk: the losses of the live teacher from it, and what is refused."""

import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import ranks
from bitdistill.data.tasks import collate
from bitdistill.distributed import process_group
from bitdistill.distributed.teacher import Teacher
from bitdistill.errors import UserError
from bitdistill.training import row_cache
from bitdistill.training.distill import Distillation
from bitdistill.training.relation_states import compressed, doubled, expanded, halved, state_shape
from bitdistill.training.row_cache import CachedTeacher, finish_rows, write_rows
from bitdistill.training.row_layout import TeacherNeeds, check_room, row_layout, row_sizes
from bitdistill.training.trainer import Counts

torch.set_num_threads(1)
V = 64


def some_rows(lengths=(5, 12, 3, 9, 20, 7, 2, 16), seed=0):
    """Rows of several lengths, with one, two or no answer tokens."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(0, V, (length,), generator=draw).tolist()
        known = min(number % 3, length - 1)
        labels = [-100] * (length - known) + ids[length - known :]
        rows.append({"input_ids": ids, "labels": labels, "length": length})
    ints = List(Value("int32"))
    return Dataset.from_list(rows, features=Features({"input_ids": ints, "labels": ints, "length": Value("int32")}))


def another_teacher(layers=3, heads=4, groups=2, width=12, hidden=40):
    """Of another family, depth and width than ranks.tiny_model, and with larger weights, so that relations are uneven."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=width,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(3)
    return Teacher(module=model, forward=model)


def needs(objective, rows, teacher):
    """The layout for the settings of a Distillation."""
    return row_layout(teacher.module.config, rows, TeacherNeeds(**objective))


def make(folder, teacher, rows, layout, batch_size=3):
    for name in ("shards", "cache"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    write_rows(folder / "shards", teacher, rows, layout, batch_size=batch_size, pad_token_id=0)
    finish_rows(folder / "shards", folder / "cache", layout)
    return opened(folder / "cache", layout)


def opened(folder, layout):
    return CachedTeacher(folder, layout, dtype=torch.float32, device="cpu")


def batch_of(rows, numbers):
    return collate([rows[i] for i in numbers], 0) | {"row": torch.tensor(numbers)}


def losses_and_gradient(teacher, rows, numbers, **options):
    """The terms of one batch, and the gradient of their sum."""
    student = ranks.tiny_model(1)
    objective = Distillation(student, teacher, gamma_attention=20.0, **options)
    batch = batch_of(rows, numbers)
    answers = int((batch["labels"][:, 1:] != -100).sum())
    counts = Counts(answers, int(batch["attention_mask"].sum()), batch["labels"].numel(), step=1)
    terms = objective(student, batch, counts)
    sum(weight * loss for weight, loss in terms.values()).backward()
    gradient = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    return {name: loss.item() for name, (_, loss) in terms.items()}, gradient


KEPT = {"lambda_logits": 10.0, "kd_tokens": "response", "kd_temperature": 5.0, "top_k": None}
CASES = [  # relation, settings, the teacher's (layers, heads, key and value heads, head width, hidden size)
    ("eq12", {}, (3, 4, 2, 12, 40)),
    ("eq12", {"split_heads": 4, "relation_causal": True}, (3, 6, 3, 8, 36)),
    ("alg1", {"split_heads": 2, "relation_temperature": 0.5}, (3, 2, 1, 24, 32)),
    ("alg1", {}, (3, 4, 2, 12, 40)),
    ("pr382", {"split_heads": 8}, (3, 4, 2, 16, 40)),
    ("attention_maps", {"relation_temperature": 2.0}, (3, 4, 2, 12, 40)),
    ("attention_maps", {}, (3, 4, 1, 32, 40)),
    ("none", {}, (2, 4, 2, 12, 24)),
]


@pytest.mark.parametrize("kd_tokens", ["response", "all"])
@pytest.mark.parametrize(("relation", "changes", "shape"), CASES)
def test_the_losses_and_gradients_of_the_live_teacher(tmp_path, relation, changes, shape, kd_tokens):
    """Ragged rows, two layers, other depth, width and heads: each loss within 5e-4 of itself, the gradient within 1e-3."""
    rows, teacher = some_rows(), another_teacher(*shape)
    layers = {"relation": relation, "relation_layers": [-1, 0], "teacher_relation_layers": [-1, 1], **changes}
    kept = KEPT | {"relation": relation, "layers": [-1, 1], "kd_tokens": kd_tokens}
    cache = make(tmp_path, teacher, rows, needs(kept | {"split_heads": changes.get("split_heads")}, rows, teacher))
    for numbers in ([4, 6, 1], [2, 3, 5, 0, 7]):
        options = layers | {"kd_tokens": kd_tokens}
        live, of_live = losses_and_gradient(teacher, rows, numbers, **options)
        read, of_read = losses_and_gradient(cache, rows, numbers, **options)
        assert read.keys() == live.keys()
        for name, loss in live.items():
            assert loss > 0
            assert read[name] == pytest.approx(loss, rel=5e-4), name
        assert (of_read - of_live).norm() < 1e-3 * of_live.norm()


@pytest.mark.parametrize("top_k", [1, 6, V])
def test_largest_logits_alone(tmp_path, top_k):
    """With every word kept the live loss; else less, for words that are joined are not told apart; and no head on disk."""
    rows, teacher = some_rows(), another_teacher()
    kept = KEPT | {"relation": "none", "layers": [], "split_heads": None, "top_k": top_k}
    cache = make(tmp_path, teacher, rows, needs(kept, rows, teacher))
    options = {"relation": "none", "kd_tau_squared": True}
    live, _ = losses_and_gradient(teacher, rows, [4, 6, 1, 5], **options)
    read, _ = losses_and_gradient(cache, rows, [4, 6, 1, 5], **options)
    assert read["ce"] == pytest.approx(live["ce"], rel=1e-6)
    assert (read["logits"] == pytest.approx(live["logits"], rel=5e-4)) == (top_k == V)
    assert read["logits"] <= live["logits"] * (1 + 5e-4)
    assert not (tmp_path / "cache" / "head.safetensors").exists()


@given(length=st.integers(1, 20), width=st.integers(1, 16), seed=st.integers(0, 99), paired=st.booleans())
@settings(max_examples=30, deadline=None)
def test_products_are_kept_in_fewer_numbers(length, width, seed, paired):
    relation, heads = "attention_maps" if paired else "eq12", (4, 2, 2)
    shape = state_shape(relation, 4, 2, width, None)
    draw = torch.Generator().manual_seed(seed)
    qkv = [torch.randn(count, length, width, generator=draw) for count in heads]
    if seed % 4 == 0:  # tokens that are equal: a matrix of lower rank
        qkv = [x[:, :1].expand(-1, length, -1) for x in qkv]
    vectors = compressed(qkv, shape)
    assert [len(x) for x in vectors] == [int(n) for n in shape.numbers(length)]
    assert sum(map(len, vectors)) <= sum(x.numel() for x in qkv[: len(vectors)])
    back = expanded([doubled(*halved(x)) for x in vectors], length, shape)
    if paired:
        products = lambda q, k, *_: [q @ k.repeat_interleave(2, dim=0).mT]  # noqa: E731
    else:
        products = lambda *tensors: [x @ x.mT for x in tensors]  # noqa: E731
    for ours, theirs in zip(products(*back), products(*qkv), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3 * float(theirs.abs().max()))


def test_half_precision_is_kept_exactly():
    for dtype, scale in ((torch.float16, 1.0), (torch.bfloat16, 1e30), (torch.bfloat16, 1e-30)):
        x = (torch.rand(500, generator=torch.Generator().manual_seed(0)) + 0.01).to(dtype).float() * 1.0
        x = (x * scale).to(dtype).float() if dtype == torch.bfloat16 else x
        assert torch.equal(doubled(*halved(x)), x)
    assert torch.equal(doubled(*halved(torch.zeros(3))), torch.zeros(3))


def test_sizes_are_known_before_anything_is_written(tmp_path):
    """To the byte where nothing can be compressed; each row by its own length and answers."""
    rows, teacher = some_rows(), another_teacher(2, 4, 2, 8, 40)
    lengths, positions = row_sizes(rows, "response")
    assert lengths.tolist() == rows["length"][:]
    assert positions.tolist() == [sum(label != -100 for label in row["labels"][1:]) for row in rows]
    kept = KEPT | {"relation": "eq12", "layers": [-1], "split_heads": None}
    layout = needs(kept, rows, teacher)
    by_hand = 0
    for length, count in zip(lengths.tolist(), positions.tolist(), strict=True):
        numbers = length * (length + 1) // 2 if length <= 8 else length * 8
        by_hand += 44 + 2 + 2 * 40 * count + (4 + 2 + 2) * 2 * numbers + 3 * 2
    assert layout.row_bytes == by_hand
    assert f"{by_hand / 8:,.0f} bytes per row" in str(layout)
    make(tmp_path, teacher, rows, layout)
    assert (tmp_path / "cache" / "head.safetensors").stat().st_size <= layout.head_bytes + 200  # its own header
    frames = sum(
        int(safe_open(path, framework="np").get_tensor("offsets")[-1]) for path in (tmp_path / "cache").glob("shard-*")
    )
    assert 0.7 * by_hand < frames + 24 * len(rows) <= by_hand
    with pytest.raises(UserError, match=r"output_dir: expected .* GB free .*teacher_cache false"):
        check_room(tmp_path, layout.__class__(**vars(layout) | {"row_bytes": 10**18}))


def test_other_settings_that_share_a_cache():
    def what_is_kept(**settings):
        return TeacherNeeds(**settings).what_is_kept()

    one = {"lambda_logits": 10.0, "kd_tokens": "response", "kd_temperature": 5.0, "top_k": None, "relation": "eq12"}
    one |= {"layers": [-1], "split_heads": None}
    same = [{"lambda_logits": 1.0}, {"kd_temperature": 2.0}, {"relation": "alg1"}]
    other = [{"lambda_logits": 0.0}, {"kd_tokens": "all"}, {"top_k": 4}, {"relation": "pr382"}, {"layers": [0]}]
    assert all(what_is_kept(**one | change) == what_is_kept(**one) for change in same)
    assert all(what_is_kept(**one | change) != what_is_kept(**one) for change in other)
    k = one | {"top_k": 4}
    assert what_is_kept(**k) != what_is_kept(**k | {"kd_temperature": 2.0})  # the rest holds for one temperature


@pytest.fixture
def finished(tmp_path):
    rows, teacher = some_rows(), another_teacher()
    kept = KEPT | {"relation": "eq12", "layers": [-1], "split_heads": None}
    layout = needs(kept, rows, teacher)
    make(tmp_path, teacher, rows, layout)
    return SimpleNamespace(folder=tmp_path / "cache", layout=layout, rows=rows, teacher=teacher, kept=kept)


def look(cache, rows, numbers):
    batch = batch_of(rows, numbers)
    rows_BT = torch.zeros_like(batch["labels"], dtype=torch.bool)
    rows_BT[:, :-1] = batch["labels"][:, 1:] != -100
    return cache.look(batch, rows_BT, {})


def test_made_for_something_else(finished):
    for changes, said in (
        ({"layers": [0]}, r"layers: expected \[0\]; got \[-1\]"),
        ({"relation": "none"}, r"layers: expected \[\]; got \[-1\]"),
        ({"split_heads": 2}, "states: expected"),
        ({"top_k": 5}, "hidden: expected 0; got 40"),
        ({"kd_tokens": "all"}, "row_bytes: expected|distilled: expected all; got response"),
    ):
        with pytest.raises(UserError, match=f"{said}.*--stage teacher_cache"):
            opened(finished.folder, needs(finished.kept | changes, finished.rows, finished.teacher))
    fewer = finished.rows.select(range(5))
    with pytest.raises(UserError, match="rows: expected 5; got 8"):
        opened(finished.folder, needs(finished.kept, fewer, finished.teacher))
    cache, other = opened(finished.folder, finished.layout), some_rows(seed=1)
    look(cache, finished.rows, [0, 4])
    with pytest.raises(UserError, match="tokens of row 4: expected hash"):
        look(cache, other, [4])


def test_damage_is_found(finished):
    shard = finished.folder / "shard-00004.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=f"expected {len(whole)} bytes; got {len(whole) - 1}"):
        opened(finished.folder, finished.layout)
    begin = len(whole) - 200
    shard.write_bytes(whole[:begin] + bytes([whole[begin] ^ 1]) + whole[begin + 1 :])
    with pytest.raises(UserError, match=r"shard-00004.safetensors, row 4: expected checksum|tokens of row 4"):
        look(opened(finished.folder, finished.layout), finished.rows, [4])
    shard.write_bytes(b"\xff" * len(whole))
    with pytest.raises(UserError, match="a whole safetensors file"):
        look(opened(finished.folder, finished.layout), finished.rows, [4])
    header = json.loads((finished.folder / "cache.json").read_text())
    (finished.folder / "cache.json").write_text(json.dumps(header | {"version": 9}))
    with pytest.raises(UserError, match="version: expected bitdistill teacher rows, 1"):
        opened(finished.folder, finished.layout)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_rows_and_a_restart_writes_what_is_missing(finished, tmp_path, monkeypatch, world):
    """Each row by one rank; killed in the middle, then gone on with by another number of ranks: the same bytes."""
    calls, of_rows = [], row_cache._said

    def counted(teacher, capture, features, *rest):
        calls.extend(tuple(one["input_ids"]) for one in features)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return of_rows(teacher, capture, features, *rest)

    monkeypatch.setattr(row_cache, "_said", counted)
    shards = tmp_path / "again"
    shards.mkdir()
    options = {"layout": finished.layout, "batch_size": 3, "pad_token_id": 0}
    with pytest.raises(KeyboardInterrupt):
        write_rows(shards, finished.teacher, finished.rows, **options)
    assert len(list(shards.glob("shard-*"))) == 3
    calls.clear()
    calls.extend(itertools.repeat((), 9))  # beyond the count at which it is interrupted
    monkeypatch.setattr(process_group, "world_size", lambda: world)
    before = set(shards.iterdir())
    for rank in range(world):
        monkeypatch.setattr(process_group, "rank", lambda rank=rank: rank)
        hidden = [(path, path.rename(tmp_path / path.name)) for path in set(shards.iterdir()) - before]
        write_rows(shards, finished.teacher, finished.rows, **options)
        for path, aside in hidden:  # what this rank must not see, for all look before anyone writes
            assert path.name == "head.safetensors" or not path.exists()
            aside.rename(path)
    assert sorted(calls[9:]) == sorted(tuple(row["input_ids"]) for row in finished.rows.select(range(3, 8)))
    (tmp_path / "whole").mkdir()
    finish_rows(shards, tmp_path / "whole", finished.layout)
    for path in finished.folder.glob("*.safetensors"):
        ours, theirs = load_file(tmp_path / "whole" / path.name), load_file(path)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    shutil.rmtree(tmp_path / "whole")


def test_a_row_that_fills_a_batch_up_says_nothing(finished):
    cache = opened(finished.folder, finished.layout)
    batch = collate([finished.rows[1], {"input_ids": [0], "labels": [-100]}], 0)
    batch |= {"row": torch.tensor([1, -1])}
    batch["attention_mask"][1] = 0
    rows_BT = torch.zeros_like(batch["labels"], dtype=torch.bool)
    rows_BT[:, :-1] = batch["labels"][:, 1:] != -100
    said = cache.look(batch, rows_BT, {})
    assert not said.qkv[-1][0][1].any()
    assert said.hidden[0].any()
    assert not said.hidden[1].any()


def test_a_number_that_is_not_finite_is_said(tmp_path):
    rows, teacher = some_rows(), another_teacher()
    teacher.module.model.norm.weight[3] = np.nan
    kept = KEPT | {"relation": "none", "layers": [], "split_heads": None}
    with pytest.raises(UserError, match=r"teacher.dtype: .*bfloat16"):
        make(tmp_path, teacher, rows, needs(kept, rows, teacher))
