"""Decoding on a GPU (interpreted without one) where scales change along a row: groups of a weight's columns, blocks of a token's
columns, and scales of input channels. Products and codes bit for bit the reference; whole students against themselves."""

import copy

import numpy as np
import pytest
import torch
from test_gpu_decode import EDGES, product_of, random_codes, random_rows, scaled
from test_runtime_cuda import assert_same_function, file_embedding, packed_runtime, student_logits
from transformers import AutoModelForCausalLM

import tiny_students
from bitdistill.export.write import write_packed
from bitdistill.kernels import reference
from bitdistill.kernels.gpu import decode_attention, decode_groups, decode_rows
from bitdistill.kernels.numerics import ACT_BLOCK
from bitdistill.runtime.cuda import _group
from bitdistill.runtime.packed_file import read_packed
from bitdistill.runtime.plain import plain_product
from bitdistill.student.layers import bit_linears
from bitdistill.student.refine import refine


@pytest.fixture(autouse=True)
def few_splits(monkeypatch, device):
    """The interpreter runs one program after another."""
    if device == "cpu":
        monkeypatch.setattr(decode_attention, "MAX_SPLITS", 2)


def group_scales(rows, columns, group, device):
    """Snapped scales of groups, or fp32 ones of rows, far apart."""
    generator = torch.Generator().manual_seed(3)
    shape = (rows, -(-columns // group)) if group else (rows,)
    scale = 10 ** (4 * torch.rand(shape, generator=generator) - 3)
    return (reference.snapped_scale(scale) if group else scale).to(device)


# --- layout -----------------------------------------------------------------------------------------------------------


def test_layout_by_hand(device):
    """Row 65 of 200 columns: byte 3 of its second run holds the columns 128 + 3, + 35, + 67 (padding), + 99 (padding)."""
    codes = torch.zeros(66, 200, dtype=torch.int8, device=device)
    codes[65, 131], codes[65, 163] = -1, 1
    matrix = decode_groups.pack_groups(codes, torch.full((66, 4), 0.5, device=device), 64)
    assert matrix.data.shape == (2, 2, 64, 32)
    assert matrix.act_columns == 256
    assert matrix.data[1, 1, 1, 3].item() == 3 | 1 << 2
    assert matrix.data.count_nonzero() == 1
    assert matrix.scale.shape == (2, 4, 64)
    assert matrix.scale[1, :, 1].tolist() == [0.5] * 4
    assert not matrix.scale[1, :, 2:].any()


@pytest.mark.parametrize(("group", "bits"), [(64, 2.25), (128, 2.125), (256, 2.0625)])
def test_bits_of_a_weight(device, group, bits):
    matrix = decode_groups.pack_groups(random_codes(64, 512, device), group_scales(64, 512, group, device), group)
    assert 8 * matrix.nbytes == bits * 64 * 512


# --- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("rows", "shape"), [(1, (1, 65)), (19, (70, 300)), (1, (33, 700)), (2, (16, 1024))])
@pytest.mark.parametrize(
    ("group", "blocks"), [(64, False), (128, False), (256, False), (64, True), (128, True), (256, True), (0, True)]
)
def test_products_have_the_bits_of_the_reference(device, shape, rows, group, blocks):
    """Whole and short last groups, rows that no tile divides, steps and prompts."""
    in_features = shape[1]
    group = min(group, 64) if group >= in_features else group
    codes, scale = random_codes(*shape, device), group_scales(*shape, group, device)
    matrix = decode_groups.pack_groups(codes, scale, group)
    x = 10 * random_rows(rows, in_features, device)
    act_codes, act_scale = decode_rows.residual_norm_quantize(x, matrix.act_columns, blocks=blocks)
    got = decode_groups.accumulate_groups(act_codes[0], act_scale[0], matrix)
    ternary = (codes, scale if group else scale[:, None])
    weight = torch.zeros(shape, device=device)
    kind = "block" if blocks else "token"
    assert torch.equal(got[0], reference.bit_linear(x, weight, None, ternary, group or in_features, kind))


def test_sums_at_the_extremes(device):
    """All codes alike and activations of -128: the largest integers of a group."""
    codes = torch.full((3, 512), -1, dtype=torch.int8, device=device)
    matrix = decode_groups.pack_groups(codes, torch.full((3, 2), 2.0, device=device), 256)
    act = torch.full((2, 512), -128, dtype=torch.int8, device=device)
    got = decode_groups.accumulate_groups(act, torch.ones(2, device=device), matrix)
    assert got.tolist() == [[[2.0 * 128 * 512] * 3] * 2]


def test_matrices_side_by_side(device):
    act_scale = torch.rand(4, 8, device=device) + 0.1
    act = random_codes(4, 256, device, -127, 127)
    parts = [random_codes(rows, 256, device, seed=rows) for rows in (48, 16, 5)]
    matrices = [decode_groups.pack_groups(part, group_scales(len(part), 256, 64, device), 64) for part in parts]
    out = torch.full((1, 4, 69), 77.0, device=device)
    column = 0
    for matrix in matrices:
        decode_groups.accumulate_groups(act, act_scale, matrix, out, column)
        column += matrix.rows
    alone = [decode_groups.accumulate_groups(act, act_scale, matrix)[0] for matrix in matrices]
    assert torch.equal(out[0], torch.cat(alone, dim=1))


def test_bytes_of_a_product(moved_bytes):
    """Every byte of weights and scales once; the activations once for each tile of 16 rows of weights."""
    matrix = decode_groups.pack_groups(random_codes(64, 512, "cpu"), group_scales(64, 512, 128, "cpu"), 128)
    act, act_scale = torch.zeros(2, 512, dtype=torch.int8), torch.ones(2)
    with moved_bytes() as moved:
        got = decode_groups.accumulate_groups(act, act_scale, matrix)
    assert moved.loaded == matrix.nbytes + 4 * (act.nbytes + act_scale.nbytes)
    assert moved.stored == got.nbytes


def test_refusals(device):
    codes, scale = random_codes(4, 130, device), group_scales(4, 130, 64, device)
    for wrong in ((scale[:, :2], 64), (scale.half(), 64), (scale, 0), (scale[:, 0], 64), (scale, 48)):
        with pytest.raises(ValueError, match=r"^scale: expected .*; got "):
            decode_groups.pack_groups(codes, *wrong)
    matrix = decode_groups.pack_groups(codes, scale, 64)
    rows = decode_groups.pack_groups(codes, scale[:, 0].contiguous(), 0)
    act, act_scale = torch.zeros(2, 256, dtype=torch.int8, device=device), torch.ones(2, 8, device=device)
    for wrong in (act[:0], act[:, :130], act.int(), act[0]):
        with pytest.raises(ValueError, match=r"^act: expected .*; got "):
            decode_groups.accumulate_groups(wrong, act_scale, matrix)
    for wrong, of in ((act_scale[:, :3], matrix), (act_scale[:1], matrix), (act_scale[:, 0], rows)):
        with pytest.raises(ValueError, match=r"^act_scale: expected .*; got "):
            decode_groups.accumulate_groups(act, wrong, of)


# --- codes ------------------------------------------------------------------------------------------------------------


def assert_blocks(codes, scale, x):
    """Codes and scales of blocks as the reference has them; padding is zero."""
    want_codes, want_scale = reference.quantize_activation_blocks(x)
    assert torch.equal(codes[:, : x.shape[1]], want_codes)
    assert not codes[:, x.shape[1] :].any()
    assert torch.equal(scale[:, : want_scale.shape[1]], want_scale)
    assert scale.shape == (len(x), codes.shape[1] // ACT_BLOCK)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("x", EDGES, ids=lambda x: f"{tuple(x.shape)}")
def test_blocks_are_the_reference(device, x):
    x = x.to(device)
    columns = -(-x.shape[1] // 128) * 128
    codes, scale = decode_rows.residual_norm_quantize(x, columns, blocks=True)
    assert_blocks(codes[0], scale[0], x)


def test_each_projection_divides_by_its_own_scales(device):
    x, divisors = random_rows(4, 100, device), random_rows(3, 100, device, seed=2).abs() + 0.1
    codes, scale = decode_rows.residual_norm_quantize(x, 128, input_scale=divisors)
    for plane, divisor in enumerate(divisors):
        want_codes, want_scale = reference.quantize_activation(x / divisor)
        assert torch.equal(codes[plane, :, :100], want_codes)
        assert torch.equal(scale[plane], want_scale[:, 0])
        assert not codes[plane, :, 100:].any()
    codes, scale = decode_rows.residual_norm_quantize(x, 128, input_scale=divisors, blocks=True)
    for plane, divisor in enumerate(divisors):
        assert_blocks(codes[plane], scale[plane], x / divisor)


def test_the_gate_and_the_heads_round_in_blocks(device):
    """What they round is known from the token's codes to half a step of the token's scale, and every block has a peak."""
    product = product_of(3, 2 * 90, device, splits=2)
    divisor = random_rows(1, 90, device, seed=5).abs() + 0.1
    q = random_rows(8, 45, device, seed=1).view(4, 2, 45)
    cache = decode_attention.KVCache(*random_rows(2 * 50, 45, device).view(2, 1, 1, 50, 45))
    positions, slots = torch.tensor([[7, 3, 49, 0], [0, 0, 0, 0]], dtype=torch.int32, device=device)
    parts = decode_attention.attend(q, cache, positions, slots, 0.3, None, one_slot=False, splits=2)
    for quantize in (
        lambda **options: decode_rows.gated_quantize(product, 128, "silu", **options),
        lambda **options: decode_attention.merge_quantize(parts, 128, **options),
    ):
        for divided in (None, divisor):
            codes, scale = quantize(input_scale=divided)
            block_codes, block_scale = quantize(input_scale=divided, blocks=True)
            whole = codes[0, :, :90] * scale[0, :, None]
            fine = block_codes[0] * block_scale[0].repeat_interleave(ACT_BLOCK, dim=1)
            assert not block_codes[0, :, 90:].any()
            assert (block_codes[0].view(-1, 4, ACT_BLOCK)[:, :3].abs().amax(-1) == 127).all()
            assert ((fine[:, :90] - whole).abs() <= 1.01 * scale[0, :, None]).all()


@pytest.mark.parametrize("bias", [False, True])
def test_scaled_products_are_read_as_they_are(device, bias):
    """What stands behind a product reads one with all its scales as it reads integers and scales."""
    raw = product_of(3, 180, device, bias=bias)
    y = scaled(decode_rows.Product(raw.acc, raw.act_scale, raw.weight_scale))
    done = decode_rows.Product(y[None].contiguous(), None, None, raw.bias)
    for read in (
        lambda product: decode_rows.gated_quantize(product, 128, "silu"),
        lambda product: decode_rows.residual_norm_quantize(random_rows(3, 180, device), 192, product=product),
    ):
        for got, want in zip(read(done), read(raw), strict=True):
            assert torch.equal(got, want)


# --- students ---------------------------------------------------------------------------------------------------------


def wide_student(family, weight_scale, group_size=64, act_scale="token", norms="two", weight_quantizer="absmean"):
    """A layer of 96 and 150 columns: two or three groups, the last one narrower."""
    torch.manual_seed(0)
    config = copy.deepcopy(tiny_students.CONFIGS[family])
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 96, 150, 1
    config.layer_types = getattr(config, "layer_types", None) and config.layer_types[:1]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    refine(
        model, norms=norms, weight_scale=weight_scale, group_size=group_size, act_scale=act_scale,
        weight_quantizer=weight_quantizer,
    )  # fmt: skip
    for layer in bit_linears(model).values():
        if weight_quantizer == "awq":
            layer.awq_scale.copy_(torch.rand(layer.in_features) + 0.5)
    return tiny_students.randomize(model).eval()


def assert_products(packed, names, device):
    """Projections as they are on the device: the bits of the plain forward pass."""
    group = _group(packed, names, torch.device(device))
    x = random_rows(2, packed.config.linears[names[0]].in_features, device)
    rounding = group.rounding | {"subln": None}  # a norm's sum has an order of its own
    codes, scale = decode_rows.residual_norm_quantize(x, group.act_columns, **rounding)
    if len(codes) < len(group.matrices):
        codes, scale = (part.expand(len(group.matrices), *part.shape[1:]).contiguous() for part in (codes, scale))
    product = group.product(codes, scale)
    y = product.acc.sum(0, dtype=product.acc.dtype).float()
    if product.weight_scale is not None:
        sizes = torch.tensor([packed.config.linears[name].out_features for name in names], device=device)
        of_row = product.act_scale if product.planes == 1 else product.act_scale.repeat_interleave(sizes, dim=0)
        y = y * (of_row.T * product.weight_scale)
    y = y if product.bias is None else y + product.bias
    want = np.concatenate([plain_product(packed, name, x.cpu().numpy()) for name in names], axis=1)
    np.testing.assert_array_equal(y.cpu().numpy(), want)


CASES = [
    ("llama_biases", {"weight_scale": "group", "norms": "all"}),
    ("qwen3", {"weight_scale": "group", "group_size": 64, "act_scale": "block", "norms": "none"}),
    ("qwen2", {"weight_scale": "row", "act_scale": "block"}),
    ("llama_biases", {"weight_scale": "tensor", "weight_quantizer": "awq", "norms": "none"}),
    ("gemma3", {"weight_scale": "tensor", "weight_quantizer": "awq", "act_scale": "block"}),
]


@pytest.mark.parametrize(("family", "options"), CASES)
def test_students(tmp_path, device, family, options):
    """Every projection of the file has the bits of the plain forward pass; a prompt and steps are the student."""
    model = wide_student(family, **options)
    write_packed(tmp_path / "file", model)
    packed = read_packed(tmp_path / "file")
    for names in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.down_proj"]):
        assert_products(packed, [f"model.layers.0.{name}" for name in names], device)
    runtime = packed_runtime(tmp_path, model, device)
    file_embedding(model, runtime)
    ids = tiny_students.prompt(5)
    with runtime._sequences(1, len(ids)) as sequences:
        rows = [sequences.prompt(ids[:3], 0, 0, "all").cpu().numpy()]
        for token in ids[3:]:
            sequences.ids.fill_(token)
            sequences.step()
            rows.append(sequences.logits.cpu().numpy())
    assert_same_function(np.concatenate(rows), student_logits(model, ids))
