"""Four-bit weights: codes and scales by hand, GPTQ against the least-squares answer, layers in their order, exact bytes."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from bitdistill.errors import UserError
from bitdistill.evaluation import weight_only
from bitdistill.evaluation.weight_only import (
    dequantize,
    gptq,
    linear_bytes,
    quantize_model,
    round_to_nearest,
    weight_only_size,
)
from bitdistill.export.write import write_packed
from bitdistill.runtime.packed_file import read_packed
from tiny_students import CONFIGS, student


def test_rounding_by_hand():
    """Two groups of three columns: scales 7.5 / 7.5 = 1 and 15 / 7.5 = 2; halves to even; 7.5 is clipped to 7."""
    weight = torch.tensor([[7.5, -0.5, 1.5, -15.0, 3.0, 1.1]])
    codes, scale = round_to_nearest(weight, group=3)
    assert codes.tolist() == [[7, 0, 2, -8, 2, 1]]
    assert scale.tolist() == [[1.0, 2.0]]
    assert dequantize(codes, scale, 3).tolist() == [[7, 0, 2, -16, 4, 2]]
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float16)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(2, 8), st.sampled_from([1, 7, 32, 128]), st.integers(0, 99))
def test_rounding_is_near(rows, columns, bits, group, seed):
    """Every code is nearest, or at its limit, where the largest of a group is off by half a step at most, and by what its
    2^(bits-1) steps lost when fp16 rounded the scale: 2^-11 of it, and below 2^-14, where fp16 is denormal, 2^-25."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    codes, scale = round_to_nearest(weight, bits, group)
    assert scale.shape == (rows, -(-columns // group))
    assert codes.min() >= -(2 ** (bits - 1))
    assert int(codes.max()) < 2 ** (bits - 1)
    steps = scale.float().repeat_interleave(group, dim=1)[:, :columns]
    lost = 2 ** (bits - 1) * (steps * 2**-11).clamp_min(2**-25)
    assert ((dequantize(codes, scale, group) - weight).abs() <= steps / 2 + lost + 1e-7).all()


def test_groups_of_zeros_and_of_nearly_nothing():
    weight = torch.zeros(2, 8)
    weight[1, :4] = 1e-9  # its scale is 0 in fp16
    for codes, scale in (round_to_nearest(weight, group=4), gptq(weight, torch.eye(8), group=4)):
        assert not codes.any()
        assert not scale.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 6e5])
def test_weights_without_an_fp16_scale_are_refused(value):
    with pytest.raises(UserError, match="finite weights"):
        round_to_nearest(torch.tensor([[1.0, value]]))


def test_gptq_by_hand():
    """Rounding 3.4 to 3 leaves -0.4; the least-squares answer moves the other weight by 0.4 * 0.5 / 1 to -7.3, so to -7."""
    weight, hessian = torch.tensor([[3.4, -7.5]]), torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    assert round_to_nearest(weight)[0].tolist() == [[3, -8]]
    codes, scale = gptq(weight, hessian, damping=0.0)
    assert codes.tolist() == [[3, -7]]
    assert scale.tolist() == [[1.0]]


def inputs(count, width, seed=0):
    """Correlated inputs: few directions carry most."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)[:, None]
    return torch.randn(count, width, generator=generator) @ mixing


def by_least_squares(weight, hessian, bits, group, damping=0.01):
    """GPTQ's definition: after each column, those not yet rounded are solved for again. float64, no Cholesky factor."""
    hessian = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    rest, scale = weight.double().clone(), None
    for j in range(weight.shape[1]):
        if j % group == 0:
            scale = (rest[:, j : j + group].abs().amax(dim=1) / (2 ** (bits - 1) - 0.5)).half().double()
        code = (rest[:, j] / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        change = scale * code - rest[:, j]
        free = slice(j + 1, None)
        if j + 1 < weight.shape[1]:
            rest[:, free] -= torch.linalg.solve(hessian[free, free], torch.outer(hessian[free, j], change)).T
        rest[:, j] = scale * code
    return rest


@pytest.mark.parametrize(("rows", "columns", "bits", "group"), [(5, 24, 4, 8), (16, 33, 3, 16), (3, 20, 2, 128)])
def test_gptq_is_the_least_squares_sweep(rows, columns, bits, group):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    x = inputs(200, columns)
    codes, scale = gptq(weight, x.T @ x, bits, group)
    expected = by_least_squares(weight, x.T @ x, bits, group)
    torch.testing.assert_close(dequantize(codes, scale, group).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("columns", [64, 130])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_changes_the_output_less_than_rounding(bits, columns):
    x = inputs(400, columns)
    weight = torch.randn(48, columns, generator=torch.Generator().manual_seed(2))

    def error(quantized):
        return (x @ (weight - dequantize(*quantized, 32)).T).norm().item()

    assert error(gptq(weight, x.T @ x, bits, 32)) < 0.8 * error(round_to_nearest(weight, bits, 32))


def test_gptq_without_correlation_rounds_to_nearest():
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(3))
    for ours, expected in zip(
        gptq(weight, 3 * torch.eye(40), group=16), round_to_nearest(weight, group=16), strict=True
    ):
        assert torch.equal(ours, expected)


def test_an_input_that_never_occurs_is_rounded_to_nearest():
    weight, x = torch.randn(4, 12, generator=torch.Generator().manual_seed(4)), inputs(50, 12)
    x[:, 5] = 0
    codes, scale = gptq(weight, x.T @ x, group=4, damping=0.0)
    assert scale.isfinite().all()
    x[:, 5] = 100 * torch.randn(50)  # no other column was moved to make up for it
    others = [j for j in range(12) if j != 5]
    alone, _ = gptq(weight[:, others], (x.T @ x)[others][:, others], group=12, damping=0.0)
    assert alone.shape == (4, 11)
    assert ((dequantize(codes, scale, 4) - weight)[:, 5].abs() <= 0.51 * scale[:, 1].float()).all()
    assert torch.equal(gptq(weight, torch.zeros(12, 12), group=4)[0], round_to_nearest(weight, group=4)[0])


def test_a_broken_hessian_is_refused():
    with pytest.raises(UserError, match="finite activations"):
        gptq(torch.ones(2, 2), torch.full((2, 2), float("nan")))


def full_precision(name):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def prompts(count=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]


def one_prompt_at_a_time(model, texts, group, quantized_before):
    """GPTQ of a model by its definition: no batches, no stored inputs; the whole model runs for every layer."""
    model, original = copy.deepcopy(model), copy.deepcopy(model)
    for layer, source in zip(model.model.layers, original.model.layers, strict=True):
        runs, watched = (model, layer) if quantized_before else (original, source)
        seen, hooks = {}, []
        for name, module in watched.named_modules():
            if isinstance(module, torch.nn.Linear):
                parts = seen[name] = []
                hooks.append(module.register_forward_pre_hook(lambda _, args, parts=parts: parts.append(args[0][0])))
        with torch.no_grad():
            for text in texts:
                runs(torch.tensor([text]), use_cache=False)
            for hook in hooks:
                hook.remove()
            for name, parts in seen.items():
                x, linear = torch.cat(parts), layer.get_submodule(name)
                linear.weight.copy_(dequantize(*gptq(linear.weight, x.T @ x, 2, group), group))
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_in_order_on_what_the_quantized_ones_before_give(name, monkeypatch):
    """Two bits, so that what a layer is calibrated on decides many codes; small batches, so that rows are padded. float64:
    at two bits one code that flips in the last digit flips thousands after it."""
    monkeypatch.setattr(weight_only, "BATCH_TOKENS", 100)
    model, texts = full_precision(name).double().eval(), prompts()
    expected = one_prompt_at_a_time(model, texts, 32, quantized_before=True)
    stale = one_prompt_at_a_time(model, texts, 32, quantized_before=False)
    quantized = copy.deepcopy(model)
    facts = quantize_model(quantized, "gptq", texts, bits=2, group=32)
    assert facts["calibration_tokens"] == sum(map(len, texts))

    def same(a, b):
        """Share of equal weights in the last layer; an fp16 scale may differ in its last bit."""
        pairs = zip(a.model.layers[-1].parameters(), b.model.layers[-1].parameters(), strict=True)
        return torch.cat([torch.isclose(p, q, 4e-3).flatten() for p, q in pairs if p.dim() == 2]).float().mean().item()

    assert same(quantized, expected) > 0.999
    assert same(quantized, stale) < 0.9
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, quantized.get_parameter(n))}
    assert changed == {n for n, p in model.named_parameters() if "_proj.weight" in n}


def test_rtn_needs_no_calibration_and_gptq_does():
    model = full_precision("qwen3")
    before = copy.deepcopy(model.state_dict())
    facts = quantize_model(model, "rtn")
    for name, value in model.state_dict().items():
        expected = before[name]
        if "_proj.weight" in name:
            expected = dequantize(*round_to_nearest(expected))
        assert torch.equal(value, expected), name
    weights = sum(value.numel() for name, value in before.items() if "_proj.weight" in name)
    assert facts["linear_weights"] == weights
    assert facts["calibration_tokens"] == 0
    with pytest.raises(UserError, match="prompts for GPTQ"):
        quantize_model(model, "gptq", [])


def test_bytes_by_hand():
    assert linear_bytes(16, 256) == 16 * 128 + 16 * 2 * 2  # 4.125 bits per weight
    assert linear_bytes(3, 129) == 194 + 3 * 2 * 2  # half a byte is rounded up, the narrow group has its scale


@pytest.mark.parametrize("embedding", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])  # untied and tied
def test_size_of_the_file(name, embedding, tmp_path):
    """The FP16 file with its projections and tables exchanged: everything else keeps its bytes."""
    model = full_precision(name).half()
    model.save_pretrained(tmp_path / "teacher")
    write_packed(tmp_path / "student.safetensors", student(name), embedding=embedding)
    packed = read_packed(tmp_path / "student.safetensors")
    size = weight_only_size(tmp_path / "teacher", packed.config)
    fp16 = (tmp_path / "teacher" / "model.safetensors").stat().st_size
    linears = [p for n, p in model.named_parameters() if "_proj.weight" in n]
    tables = [p for n, p in model.named_parameters() if n in ("model.embed_tokens.weight", "lm_head.weight")]
    stored = sum(array.nbytes for key, array in packed.tensors.items() if key.startswith(("model.embed", "lm_head")))
    assert size["linear_bytes"] == sum(linear_bytes(*p.shape) for p in linears)
    assert size["model_bytes"] == fp16 - sum(2 * p.numel() for p in linears + tables) + size["linear_bytes"] + stored
    assert size["bits_per_weight"] == 8 * size["linear_bytes"] / sum(p.numel() for p in linears)
    parameters = sum(p.numel() for p in model.parameters())
    assert size["model_bits_per_parameter"] == pytest.approx(8 * size["model_bytes"] / parameters)
