"""Packed products, the joints between them, and attention on a GPU (interpreted without one): integers, codes and scales
bit for bit, floats against float64."""

import warnings

import numpy as np
import pytest
import torch

from bitdistill.kernels import reference
from bitdistill.kernels.gpu import decode, decode_attention, decode_rows

SHAPES = [(1, 1), (3, 2), (5, 63), (64, 64), (65, 65), (33, 130), (70, 257), (130, 600), (16, 1024)]


def random_codes(rows, columns, device, low=-1, high=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, (rows, columns), generator=generator, dtype=torch.int8).to(device)


def padded(act, matrix):
    wide = act.new_zeros(len(act), matrix.act_columns)
    wide[:, : act.shape[1]] = act
    return wide


def unpacked_2bit(matrix):
    """The layout of the module docstring, read byte by byte in numpy."""
    data = matrix.data.cpu().numpy().astype(np.int64) & 255
    fields = np.stack([(data >> (2 * field)) & 3 for field in range(4)], axis=1).reshape(len(data), -1)
    return np.where(fields == 3, -1, fields)


# --- packing ----------------------------------------------------------------------------------------------------------


def test_packing_example(device):
    """K = 64 has W = 16 bytes: byte j holds the columns j, j + 16, j + 32, j + 48."""
    codes = torch.zeros(1, 64, dtype=torch.int8, device=device)
    codes[0, [0, 16, 33, 49]] = torch.tensor([1, -1, -1, 1], dtype=torch.int8, device=device)
    packed = decode.pack_2bit(codes).data.view(torch.uint8)
    assert packed.shape == (1, 16)
    assert packed[0, :2].tolist() == [1 | 3 << 2, 3 << 4 | 1 << 6]
    assert not packed[0, 2:].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_packing_holds_the_codes(device, shape):
    codes = random_codes(*shape, device)
    matrix = decode.pack_2bit(codes)
    wide = unpacked_2bit(matrix)
    np.testing.assert_array_equal(wide[:, : shape[1]], codes.cpu().numpy())
    assert not wide[:, shape[1] :].any()
    assert matrix.nbytes == shape[0] * 16 * -(-shape[1] // 64)


def test_whole_rows_take_two_bits_a_weight(device):
    assert decode.pack_2bit(random_codes(7, 640, device)).nbytes == 7 * 640 * 2 // 8


# --- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 16, 40])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 8])
def test_accumulators_are_exact(device, shape, rows, bits):
    codes = random_codes(*shape, device, *((-1, 1) if bits == 2 else (-127, 127)))
    act = random_codes(rows, shape[1], device, -128, 127, seed=1)
    matrix = decode.pack_2bit(codes) if bits == 2 else decode.pack_rows(codes)
    acc = decode.accumulate(padded(act, matrix), matrix)
    assert (acc.dtype, acc.shape[1:]) == (torch.int32, (rows, shape[0]))
    want = act.cpu().long() @ codes.cpu().long().T
    assert torch.equal(acc.long().sum(0).cpu(), want)
    if bits == 2:
        assert torch.equal(want.int(), reference.ternary_accumulate(act, codes).cpu())


@pytest.mark.parametrize("columns", [9728])
@pytest.mark.parametrize("code", [-1, 1])
def test_accumulators_at_the_extremes(device, columns, code):
    """All codes alike and activations of -128 and 127: the largest sums, times 64 still within int32."""
    codes = torch.full((3, columns), code, dtype=torch.int8, device=device)
    act = torch.full((2, columns), -128, dtype=torch.int8, device=device)
    act[1] = 127
    matrix = decode.pack_2bit(codes)
    acc = decode.accumulate(padded(act, matrix), matrix).sum(0)
    assert acc.tolist() == [[-128 * columns * code] * 3, [127 * columns * code] * 3]


def test_splits_cover_the_row_once(device):
    """Small matrices are split along K, and every split count gives the same integers."""
    codes, act = random_codes(48, 3000, device), random_codes(3, 3000, device, -127, 127)
    matrix = decode.pack_2bit(codes)
    width = matrix.data.shape[1]
    assert decode.splits_of(3, 48, width) == 6  # ceil(752 / 128) steps
    assert decode.splits_of(1, 1024, 768) == 6
    assert decode.splits_of(1, 19456, 640) == 1
    assert decode.splits_of(17, 48, width) == 1
    want = reference.ternary_accumulate(act, codes)
    for splits in (1, 2, 3, 6):
        out = torch.full((splits, 3, 48), 77, dtype=torch.int32, device=device)
        assert torch.equal(decode.accumulate(padded(act, matrix), matrix, out).sum(0, dtype=torch.int32), want)


def test_matrices_side_by_side(device):
    parts = [random_codes(rows, 100, device, seed=rows) for rows in (48, 16, 5)]
    act = random_codes(4, 100, device, -127, 127)
    out = torch.full((1, 4, 69), 77, dtype=torch.int32, device=device)
    column = 0
    for part in parts:
        matrix = decode.pack_2bit(part)
        decode.accumulate(padded(act, matrix), matrix, out, column)
        column += len(part)
    assert torch.equal(out[0], reference.ternary_accumulate(act, torch.cat(parts)))


def test_float16_table(device):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(70, 100, generator=generator).half().to(device)
    act = torch.randn(6, 100, generator=generator).half().to(device)
    matrix = decode.pack_rows(table)
    acc = decode.accumulate(padded(act, matrix), matrix)[0]
    want = act.double() @ table.double().T
    assert (acc - want).abs().max() <= 2 * ((act.float() @ table.float().T) - want).abs().max() + 1e-5


@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (64, 64), (70, 96), (130, 160)])
@pytest.mark.parametrize("tokens", [1, 20])
def test_int4_table(device, rows, columns, tokens):
    generator = torch.Generator().manual_seed(0)
    codes = random_codes(rows, columns, device, -8, 7)
    scale = torch.randn(rows, columns // 32, generator=generator).half().to(device)
    act = random_codes(tokens, columns, device, -127, 127)
    matrix = decode.pack_int4(codes, scale)
    acc = decode.accumulate(padded(act, matrix), matrix)
    weight = codes.double().view(rows, -1, 32) * scale.double()[:, :, None]
    want = act.double() @ weight.view(rows, columns).T
    assert acc.shape == (1, tokens, rows)
    torch.testing.assert_close(acc[0].double(), want, rtol=0, atol=4e-7 * float(want.abs().max()) + 1e-6)


def test_int4_bytes(device):
    matrix = decode.pack_int4(
        random_codes(128, 128, device, -8, 7), torch.ones(128, 4, dtype=torch.half, device=device)
    )
    assert matrix.nbytes == 128 * 128 // 2 + 2 * 128 * 4  # 4.5 bits per weight


def test_refusals(device):
    matrix = decode.pack_2bit(random_codes(4, 100, device))
    good = torch.zeros(1, matrix.act_columns, dtype=torch.int8, device=device)
    for act in (good[:0], good[:, :100], good.int(), good[0], torch.zeros(128, 2, dtype=torch.int8, device=device).T):
        with pytest.raises(ValueError, match=r"^act: expected .*; got "):
            decode.accumulate(act, matrix)
    for codes in (good[:0], good.float(), good[0]):
        with pytest.raises(ValueError, match=r"^codes: expected .*; got "):
            decode.pack_2bit(codes)
    with pytest.raises(ValueError, match=r"^scale: expected .*; got "):
        decode.pack_int4(random_codes(4, 40, device), torch.ones(4, 1, dtype=torch.half, device=device))
    for x in (torch.zeros(0, 8), torch.zeros(2, 8).double(), torch.zeros(8, 2).T, torch.zeros(2, 80)):
        with pytest.raises(ValueError, match=r"^x: expected .*; got "):
            decode_rows.residual_norm_quantize(x.to(device), 64)


def test_read_only_codes(device):
    """What a packed file gives: numpy views that must not be written."""
    codes = random_codes(9, 70, "cpu").numpy()
    codes.flags.writeable = False
    with warnings.catch_warnings():  # torch says once in a process that the array is not writable
        warnings.simplefilter("ignore", UserWarning)
        matrix = decode.pack_2bit(torch.from_numpy(codes).to(device))
    np.testing.assert_array_equal(unpacked_2bit(matrix)[:, :70], codes)


# --- joints -----------------------------------------------------------------------------------------------------------


def random_rows(rows, columns, device, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(device)


EDGES = [
    torch.zeros(2, 5),
    torch.full((1, 3), 1e-7),
    torch.full((1, 1), -3.0),
    torch.cat([torch.tensor([127.0]), torch.arange(-253, 255) / 2])[None],  # scale 1: exact halves, to even
    1e30 * torch.randn(3, 70, generator=torch.Generator().manual_seed(1)),
    1e-4 * torch.randn(3, 70, generator=torch.Generator().manual_seed(2)),
    torch.randn(40, 1000, generator=torch.Generator().manual_seed(3)),
]


@pytest.mark.parametrize("x", EDGES, ids=lambda x: f"{tuple(x.shape)}")
def test_quantized_rows_are_the_reference(device, x):
    x = x.to(device)
    columns = -(-x.shape[1] // 64) * 64
    codes, scale = decode_rows.residual_norm_quantize(x, columns)
    want_codes, want_scale = reference.quantize_activation(x)
    assert codes.shape == (1, len(x), columns)
    assert torch.equal(codes[0, :, : x.shape[1]], want_codes)
    assert not codes[0, :, x.shape[1] :].any()
    assert torch.equal(scale[0], want_scale[:, 0])


def product_of(rows, columns, device, splits=1, planes=1, bias=True):
    generator = torch.Generator().manual_seed(7)
    acc = torch.randint(-900, 900, (splits, rows, columns), generator=generator, dtype=torch.int32)
    act_scale = torch.rand(planes, rows, generator=generator) * 0.01 + 0.001
    weight_scale = torch.rand(columns, generator=generator) + 0.1
    extra = torch.randn(columns, generator=generator) if bias else None
    tensors = [None if tensor is None else tensor.to(device) for tensor in (acc, act_scale, weight_scale, extra)]
    return decode_rows.Product(*tensors)


def scaled(product, segments=None):
    """What a product means, in float64: float32 (M, N)."""
    columns = product.acc.shape[2]
    planes = [0] * columns if segments is None else [p for p, size in enumerate(segments) for _ in range(size)]
    scale = product.act_scale[planes].T * product.weight_scale  # (M, N), fp32 as in the reference
    y = product.acc.sum(0).float() * scale
    return y if product.bias is None else y + product.bias


def norm64(x, gain, eps):
    x = x.double()
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * gain.double()


def assert_quantized(codes, scale, want):
    """Codes of what is float64's y up to float noise: at most one off, and that seldom."""
    want_codes, want_scale = reference.quantize_activation(want.float())
    torch.testing.assert_close(scale, want_scale[:, 0], rtol=2e-6, atol=0)
    off = (codes[:, : want.shape[1]].int() - want_codes.int()).abs()
    assert off.max() <= 1
    assert off.float().mean() < 2e-3
    assert not codes[:, want.shape[1] :].any()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("bias", "post"), [(False, False), (True, True)])
def test_residual_norm_quantize(device, splits, bias, post):
    rows, width, columns = 3, 150, 192
    x = random_rows(rows, width, device)
    gain, post_gain = random_rows(2, width, device, seed=1)
    product = product_of(rows, width, device, splits, bias=bias)
    y = scaled(product)
    want_x = x + (norm64(y, post_gain, 1e-6).float() if post else y)
    before = x.clone()
    codes, scale = decode_rows.residual_norm_quantize(
        x, columns, gain, 1e-6, product=product, post_gain=post_gain if post else None
    )
    if post:
        torch.testing.assert_close(x, want_x, rtol=0, atol=2e-6)
    else:
        assert torch.equal(x, before + y)  # the reference's bits
    assert_quantized(codes[0], scale[0], norm64(x, gain, 1e-6))


def test_three_sublns_of_one_norm(device):
    x, gains = random_rows(4, 100, device), random_rows(3, 100, device, seed=2)
    gain = random_rows(1, 100, device, seed=3)[0]
    before = x.clone()
    codes, scale = decode_rows.residual_norm_quantize(x, 128, gain, 1e-6, gains, 1e-5)
    assert codes.shape == (3, 4, 128)
    assert torch.equal(x, before)
    for plane in range(3):
        assert_quantized(codes[plane], scale[plane], norm64(norm64(x, gain, 1e-6), gains[plane], 1e-5))


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("subln", [False, True])
def test_gated_quantize(device, activation, planes, subln):
    width = 90
    product = product_of(3, 2 * width, device, splits=2, planes=planes)
    gain = random_rows(1, width, device)
    y = scaled(product, None if planes == 1 else [width, width]).double()
    act = (
        torch.nn.functional.silu if activation == "silu" else lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    )
    want = act(y[:, :width]) * y[:, width:]
    if subln:
        want = norm64(want, gain[0], 1e-5)
    codes, scale = decode_rows.gated_quantize(product, 128, activation, gain if subln else None, 1e-5)
    assert_quantized(codes[0], scale[0], want)


def test_activations_at_the_ends(device):
    """exp overflows without harm: act(-x) is 0 and act(x) is x."""
    acc = torch.tensor([[[-300, 300, 7, 2, 2, 2]]], dtype=torch.int32, device=device)
    one = torch.ones(1, 1, device=device)
    for activation in ("silu", "gelu_pytorch_tanh"):
        product = decode_rows.Product(acc, one, torch.ones(6, device=device))
        codes, scale = decode_rows.gated_quantize(product, 64, activation)
        assert codes[0, 0, :3].tolist() == [0, 127, 3]
        assert scale.item() == pytest.approx(600 / 127)


@pytest.mark.parametrize("form", ["int8", "fp16"])
def test_two_planes_keep_float_accuracy(device, form):
    x, gain = 5 * random_rows(3, 100, device), random_rows(1, 100, device, seed=1)[0]
    planes, scale = decode_rows.final_norm(x, 112, form, gain, 1e-6, None, None)
    assert planes.shape == (6, 112)
    assert planes.dtype == (torch.int8 if form == "int8" else torch.float16)
    high, low = planes[:3, :100].double(), planes[3:, :100].double()
    got = (255 * high + low if form == "int8" else high + low / 2048) * scale.double()[:, None]
    want = norm64(x, gain, 1e-6)
    bound = want.abs().amax(1, keepdim=True) * (1.01 / 65024 if form == "int8" else 2**-22)
    assert ((got - want).abs() <= bound).all()
    assert not planes[:, 100:].any()


@pytest.mark.parametrize("kind", ["int8", "int4", "fp16", "ternary"])
def test_embedding_is_the_dequantized_table(device, kind):
    scale = random_rows(1, 150, device, seed=1)[0].abs()
    ids = torch.tensor([0, 149, 63, 64, 3], dtype=torch.int32, device=device)
    if kind == "fp16":
        table = random_rows(150, 96, device).half()
        matrix, want, scale = decode.pack_rows(table), table.float(), None
    elif kind == "int4":
        codes, groups = random_codes(150, 96, device, -8, 7), random_rows(150, 3, device).half()
        matrix, scale = decode.pack_int4(codes, groups), None
        want = (codes.float().view(150, 3, 32) * groups.float()[:, :, None]).view(150, 96)
    else:
        codes = random_codes(150, 96, device, *((-127, 127) if kind == "int8" else (-1, 1)))
        matrix = decode.pack_rows(codes) if kind == "int8" else decode.pack_2bit(codes)
        want = codes.float() * scale[:, None]
    assert torch.equal(decode_rows.embed(ids, matrix, scale, 3.7), want[ids.long()] * 3.7)


@pytest.mark.parametrize("form", ["int8", "fp16"])
def test_logits_and_the_next_token(device, form):
    """Two blocks of the vocabulary; a tie in both goes to the first word; positions stop at the last."""
    vocabulary = decode_rows.LOGITS_BLOCK + 300
    acc = random_rows(4, vocabulary, device).mul(1000).round()
    acc[:2, [900, decode_rows.LOGITS_BLOCK + 5]] = 9000.0
    acc[2:, [900, decode_rows.LOGITS_BLOCK + 5]] = 9000.0
    acc = acc[None] if form == "fp16" else torch.stack([acc.int() - 3, torch.full_like(acc, 3).int()])
    act_scale = torch.tensor([0.5, 2.0], device=device)
    scale = None if form == "fp16" else torch.full((vocabulary,), 0.25, device=device)
    logits, blocks = decode_rows.logits_argmax(acc, act_scale, scale, form)
    total = acc.sum(0).double()
    want = total[:2] * 255 + total[2:] if form == "int8" else total[:2] + total[2:] / 2048
    want = want * act_scale.double()[:, None] * (0.25 if form == "int8" else 1)
    torch.testing.assert_close(logits.double(), want, rtol=3e-7, atol=1e-3)
    ids = torch.zeros(2, dtype=torch.int32, device=device)
    positions = torch.tensor([4, 9], dtype=torch.int32, device=device)
    decode_rows.next_token(blocks, ids, positions, 9)
    assert ids.tolist() == [900, 900]
    assert positions.tolist() == [5, 9]


# --- attention --------------------------------------------------------------------------------------------------------


def rope_tables(length, half, device):
    angles = torch.arange(length)[:, None] * 100.0 ** (-torch.arange(half) / half)
    return angles.cos().to(device), angles.sin().to(device)


@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_and_cache(device, planes, normed, dtype):
    heads, kv_heads, width, capacity = 4, 2, 24, 20
    product = product_of(3, (heads + 2 * kv_heads) * width, device, splits=2, planes=planes)
    sizes = [heads * width, kv_heads * width, kv_heads * width]
    q, k, v = scaled(product, sizes if planes == 3 else None).split(sizes, dim=1)
    q, k, v = (part.view(3, -1, width).double() for part in (q, k, v))
    gains = random_rows(2, width, device)
    if normed:
        q, k = norm64(q, gains[0], 1e-6), norm64(k, gains[1], 1e-6)
    cos, sin = rope_tables(capacity, width // 2, device)
    positions, slots = torch.tensor([[7, 0, 19], [1, 0, 2]], dtype=torch.int32, device=device)

    def turn(x):
        c, s = cos[positions.long()][:, None].double(), sin[positions.long()][:, None].double()
        low, high = x[..., : width // 2], x[..., width // 2 :]
        return torch.cat([low * c - high * s, high * c + low * s], dim=-1)

    cache = decode_attention.KVCache(*torch.full((2, 3, kv_heads, capacity, width), 77.0, dtype=dtype, device=device))
    got = decode_attention.rope_and_cache(
        product, cache, positions, slots, (cos, sin), heads, tuple(gains) if normed else None, 1e-6
    )
    torch.testing.assert_close(got.double(), turn(q), rtol=0, atol=4e-6)
    for tensor, want in ((cache.keys, turn(k)), (cache.values, v)):
        for row in range(3):
            stored = tensor[slots[row], :, positions[row]]
            if dtype == torch.float32:
                torch.testing.assert_close(stored.double(), want[row], rtol=0, atol=4e-6)
            else:  # half to even, where float noise does not decide
                close = want[row].float().to(dtype)
                assert ((stored - close).abs() <= close.abs() * 2**-7).all()
                assert (stored != close).float().mean() < 0.02
        assert (tensor == 77).sum() == tensor.numel() - 3 * kv_heads * width


def attention64(q, cache, positions, slots, scale, window):
    rows, heads, width = q.shape
    out = torch.zeros(rows, heads, width, dtype=torch.float64)
    group = heads // cache.keys.shape[1]
    for row in range(rows):
        last = int(positions[row])
        first = 0 if window is None else max(0, last - window + 1)
        for head in range(heads):
            keys = cache.keys[slots[row], head // group, first : last + 1].double()
            weights = torch.softmax(keys @ q[row, head].double() * scale, 0)
            out[row, head] = (weights @ cache.values[slots[row], head // group, first : last + 1].double()).cpu()
    return out


def merged(parts):
    """float64 (M, H, D) of the splits."""
    mixed, peak, total = (part.double().cpu() for part in parts)
    weight = torch.exp(peak - peak.amax(0))
    mixed = torch.where(weight[..., None] > 0, mixed, 0)  # a split that saw nothing left its part unwritten
    return (mixed * weight[..., None]).sum(0) / (total * weight).sum(0)[..., None]


@pytest.mark.parametrize(("splits", "window"), [(1, None), (4, None), (2, 1), (3, 70)])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 24), (3, 1, 64)])
def test_attention_of_a_step(device, splits, window, heads, kv_heads, width):
    capacity = 300
    cache = decode_attention.KVCache(
        *random_rows(2 * 3 * kv_heads * capacity, width, device).view(2, 3, kv_heads, -1, width)
    )
    positions, slots = torch.tensor([[0, 63, 64, 299], [2, 0, 1, 2]], dtype=torch.int32, device=device)
    q = random_rows(4 * heads, width, device, seed=1).view(4, heads, width)
    parts = decode_attention.attend(q, cache, positions, slots, 0.3, window, one_slot=False, splits=splits)
    assert len(parts[0]) == splits
    want = attention64(q, cache, positions, slots, 0.3, window)
    torch.testing.assert_close(merged(parts), want, rtol=0, atol=3e-6)
    codes, scale = decode_attention.merge_quantize(parts, -(-heads * width // 64) * 64)
    assert_quantized(codes[0].cpu(), scale[0].cpu(), want.flatten(1))


@pytest.mark.parametrize(("first", "window"), [(0, None), (61, None), (61, 1), (61, 9)])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 1, 16), (3, 1, 24)])
def test_attention_of_a_prompt(device, window, first, heads, kv_heads, width):
    """40 tokens of one slot after `first` cached ones: several tokens per tile, the last tile not full."""
    capacity = 140
    cache = decode_attention.KVCache(
        *random_rows(2 * 2 * kv_heads * capacity, width, device).view(2, 2, kv_heads, -1, width)
    )
    positions = torch.arange(first, first + 40, dtype=torch.int32, device=device)
    slots = torch.ones(40, dtype=torch.int32, device=device)
    q = random_rows(40 * heads, width, device, seed=1).view(40, heads, width)
    want = attention64(q, cache, positions, slots, 0.3, window)
    for splits in (1, 2):
        parts = decode_attention.attend(q, cache, positions, slots, 0.3, window, one_slot=True, splits=splits)
        torch.testing.assert_close(merged(parts), want, rtol=0, atol=3e-6)


def test_attention_over_a_bfloat16_cache(device):
    cache = random_rows(2 * 2 * 100, 32, device).view(2, 1, 2, 100, 32).bfloat16()
    cache = decode_attention.KVCache(*cache)
    positions, slots = torch.tensor([[99], [0]], dtype=torch.int32, device=device)
    q = random_rows(4, 32, device, seed=1).view(1, 4, 32)
    parts = decode_attention.attend(q, cache, positions, slots, 0.3, None, one_slot=False, splits=2)
    want = attention64(q, cache, positions, slots, 0.3, None)
    torch.testing.assert_close(merged(parts), want, rtol=0, atol=2e-3)  # tf32 products on a device


def test_merge_with_subln(device):
    cache = decode_attention.KVCache(*random_rows(2 * 100, 32, device).view(2, 1, 1, 100, 32))
    positions, slots = torch.tensor([[99, 3], [0, 0]], dtype=torch.int32, device=device)
    q, gain = random_rows(4, 32, device, seed=1).view(2, 2, 32), random_rows(1, 64, device)
    parts = decode_attention.attend(q, cache, positions, slots, 0.3, None, one_slot=False, splits=3)
    codes, scale = decode_attention.merge_quantize(parts, 64, gain, 1e-5)
    want = norm64(attention64(q, cache, positions, slots, 0.3, None).flatten(1), gain[0].cpu(), 1e-5)
    assert_quantized(codes[0].cpu(), scale[0].cpu(), want)


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_bytes_of_a_product(moved_bytes):
    """Every weight byte once, for one row and for sixteen; the activations once for each tile of rows of weights."""
    matrix = decode.pack_2bit(random_codes(64, 1024, "cpu"))
    for rows in (1, 16):
        act = torch.zeros(rows, matrix.act_columns, dtype=torch.int8)
        with moved_bytes() as moved:
            acc = decode.accumulate(act, matrix)
        tiles = 2
        assert moved.loaded == 64 * 1024 // 4 + tiles * rows * 1024
        assert moved.stored == acc.nbytes == 4 * len(acc) * rows * 64


def test_bytes_of_an_int4_product(moved_bytes):
    matrix = decode.pack_int4(random_codes(128, 128, "cpu", -8, 7), torch.ones(128, 4, dtype=torch.half))
    with moved_bytes() as moved:
        decode.accumulate(torch.zeros(2, 128, dtype=torch.int8), matrix)
    assert moved.loaded == matrix.nbytes + 2 * (2 * 128)  # activations once for each tile of 64 rows


def test_bytes_of_attention(moved_bytes):
    """Each cached key and value once for all the heads that share it, and only those that are visible."""
    cache = decode_attention.KVCache(*torch.zeros(2, 1, 2, 1000, 32, dtype=torch.bfloat16))
    positions, slots = torch.tensor([[499], [0]], dtype=torch.int32)
    q = torch.zeros(1, 4, 32)
    for window, seen in ((None, 500), (100, 116)):  # whole blocks of 32, from 384 on
        with moved_bytes() as moved:
            decode_attention.attend(q, cache, positions, slots, 1.0, window, one_slot=False, splits=2)
        kv = 2 * 2 * seen * 32 * 2
        assert kv <= moved.loaded <= kv + 2 * 2 * (q.nbytes + 8)
