"""The weight quantizers beside absmean: hand examples, gradients, what each promises on inputs, and the way to a file."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import tiny_students
from bitdistill.command_line import parse_config
from bitdistill.errors import UserError
from bitdistill.export.parity import prove_parity
from bitdistill.export.write import write_packed
from bitdistill.kernels.reference import bit_linear, quantize_activation, quantize_weight, quantize_weight_groups
from bitdistill.student import quantizers
from bitdistill.student.calibration import InputStatistics, calibrate_inputs, output_error
from bitdistill.student.gptq import gptq_codes, gptq_factor
from bitdistill.student.layers import BitLinear, SubLN, bit_linears
from bitdistill.student.quantizers import awq_channel_scale, awq_codes, quantizer_named
from bitdistill.student.refine import load_student, refine, save_student
from bitdistill.student.sharing import WeightCodes
from bitdistill.training.health import measure, snapshot

OTHERS = ("block", "gptq", "awq", "tequila", "seq")


def correlated(tokens=400, I=48, seed=0):
    """Tokens whose channels depend on each other and differ in size, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(I, I, generator=generator) / I**0.5
    x = torch.randn(tokens, I // 3, generator=generator) @ torch.randn(I // 3, I, generator=generator) / 4
    x = (x + torch.randn(tokens, I, generator=generator)) @ (torch.eye(I) + mixing)
    return x * torch.logspace(-1, 1, I)[torch.randperm(I, generator=generator)]


def make_layer(quantizer, I=48, O=20, bias=True, subln=False):
    torch.manual_seed(0)
    layer = BitLinear(nn.Linear(I, O, bias=bias), SubLN(I, 1e-6) if subln else None, quantizer_named(quantizer))
    statistics = InputStatistics.of(correlated(I=I))
    layer.quantizer.calibrate(layer, statistics)
    return layer


def student(family, quantizer, norms="two"):
    """A tiny student with random gains and biases, calibrated where it needs to be."""
    torch.manual_seed(0)
    config = tiny_students.CONFIGS[family]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    batches = [{"input_ids": torch.randint(3, 97, (2, 40))} for _ in range(3)]
    inputs = calibrate_inputs(model, batches, norms)
    refine(model, norms, weight_quantizer=quantizer, inputs=inputs)
    return tiny_students.randomize(model).eval()


# ---------------------------------------------------------------------------------------------------- by hand


def test_block_is_absmean_of_groups_of_128():
    weight = torch.randn(6, 300)
    layer = BitLinear(nn.Linear(300, 6), None, quantizer_named("block"))
    layer.weight.data.copy_(weight)
    for ours, expected in zip(layer.codes(), quantize_weight_groups(weight, 128), strict=True):
        assert torch.equal(ours, expected)


def test_gptq_by_hand():
    """Two channels that are always equal, s = 0.5: rounding 0.2 away is made up by the other one, 0.6 + 0.2 -> 1; and in the
    other row 0.8 - 0.5 too little goes to 0.4, which makes 1 of it, too, where 0.24 alone would be nothing."""
    gram = torch.full((2, 2), 1e6) + torch.eye(2)
    factor = gptq_factor(gram)
    weight = torch.tensor([[0.2, 0.6], [0.96, 0.24]])
    codes, scale = gptq_codes(weight, factor)
    assert scale.item() == pytest.approx(0.5)
    assert quantize_weight(weight)[0].tolist() == [[0, 1], [1, 0]]
    assert codes.tolist() == [[0, 1], [1, 1]]
    independent = gptq_codes(weight, gptq_factor(torch.eye(2)))[0]
    assert torch.equal(independent, quantize_weight(weight)[0])


def test_gptq_factor_is_the_root_of_the_inverse():
    gram = InputStatistics.of(correlated()).gram
    factor = gptq_factor(gram).double()
    hessian = 2 * gram.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(48)
    assert torch.allclose(factor.T @ factor @ hessian, torch.eye(48, dtype=torch.float64), atol=1e-4)
    assert torch.equal(factor, factor.triu())
    assert gptq_factor(torch.zeros(3, 3)).isfinite().all()  # never seen any input


def test_gptq_blocks_of_columns_only_postpone():
    layer = make_layer("gptq")
    in_one, scale = gptq_codes(layer.weight, layer.gptq_factor)
    for columns in (1, 7, 48):
        assert (gptq_codes(layer.weight, layer.gptq_factor, columns)[0] != in_one).float().mean() < 0.01
    assert scale == quantize_weight(layer.weight)[1]


def test_gptq_is_the_textbook_loop():
    """Against the definition: after each column the rest is the least-squares optimum (no lazy blocks, no Cholesky)."""
    torch.manual_seed(1)
    weight, gram = torch.randn(5, 12).double(), InputStatistics.of(correlated(I=12)).gram
    hessian = 2 * gram.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(12)
    rest, expected = weight.clone(), torch.empty(5, 12)
    scale = quantize_weight(weight.float())[1].double()
    for j in range(12):
        inverse = torch.linalg.inv(hessian[j:, j:])
        expected[:, j] = torch.round(rest[:, j] / scale).clamp(-1, 1)
        error = rest[:, j] - scale * expected[:, j]
        rest[:, j:] -= torch.outer(error / inverse[0, 0], inverse[0])
    assert torch.equal(gptq_codes(weight.float(), gptq_factor(gram))[0].float(), expected)


def test_awq_by_hand():
    """c = (1, 4): W c = (2, 8, 1, 4), s = 3.75, codes 1 1 0 1; s / c = (3.75, 0.9375)."""
    codes, scale = awq_codes(torch.tensor([[2.0, 2.0], [1.0, 1.0]]), torch.tensor([1.0, 4.0]))
    assert codes.tolist() == [[1, 1], [0, 1]]
    assert scale.tolist() == [3.75, 0.9375]


def test_tequila_by_hand():
    """s = 1: 0.4 and -0.2 are dead in the first row, their sum 0.2 is 2e-4 of bias; gradient 1e-3 on each of them."""
    weight = torch.tensor([[2.4, 0.4, -0.2], [-1.0, 1.0, 1.0]], requires_grad=True)
    with torch.no_grad():
        weight *= 6 / weight.abs().sum()  # absmean exactly 1
    codes, _ = quantize_weight(weight)
    assert codes.tolist() == [[1, 0, 0], [-1, 1, 1]]
    bias = quantizers.tequila_bias(weight, codes)
    assert torch.allclose(bias, torch.tensor([2e-4, 0.0]))
    bias.sum().backward()
    assert weight.grad.tolist() == [[0, pytest.approx(1e-3), pytest.approx(1e-3)], [0, 0, 0]]


def test_seq_by_hand():
    """a = 3: thirds at 1; levels -2, 0, 2. Beyond 2.97 the weight gets no gradient and a gets the level over a."""
    weight = torch.tensor([[0.9, 1.1, -2.0, 5.0]], requires_grad=True)
    a = torch.tensor([3.0], requires_grad=True)
    codes, scale = quantizers.seq_codes(weight, a)
    assert codes.tolist() == [[0, 1, -1, 1]]
    assert scale.item() == pytest.approx(2)
    quantizers.seq_weight(weight, a, (codes, scale)).sum().backward()
    assert weight.grad.tolist() == [[1, 1, 1, 0]]
    third = 1 / 3
    expected = (-0.9 * third) + (2 * third - 1.1 * third) + (-2 * third + 2 * third) + 2 * third
    assert a.grad.item() == pytest.approx(expected / 4**0.5, rel=1e-5)
    assert quantizers.seq_start(torch.tensor([[1.0, -4.0], [2.0, 0.0]])).tolist() == [3]
    assert quantizers.seq_codes(weight, torch.zeros(1))[1].item() > 0  # a scale that collapsed is held at EPSILON


# ---------------------------------------------------------------------------------------------------- what it is for


def test_gptq_and_awq_beat_absmean_on_correlated_inputs():
    """Weights are smaller where inputs are larger, as those after a norm are."""
    for seed in range(3):
        torch.manual_seed(seed)
        x = correlated(seed=seed)
        weight = torch.randn(32, 48) / x.abs().mean(0) ** 0.5
        statistics = InputStatistics.of(x)
        codes, scale = quantize_weight(weight)
        plain = output_error(weight, codes * scale, statistics.gram)
        assert plain == pytest.approx((x @ (codes * scale - weight).T).square().sum().item(), rel=1e-4)
        codes, scale = gptq_codes(weight, gptq_factor(statistics.gram))
        assert output_error(weight, codes * scale, statistics.gram) < 0.9 * plain
        channel_scale, alpha = awq_channel_scale(weight, statistics)
        codes, scale = awq_codes(weight, channel_scale)
        assert 0 < alpha <= 1
        assert output_error(weight, codes * scale, statistics.gram) < 0.9 * plain
    even = InputStatistics.of(torch.eye(48))
    assert torch.allclose(awq_channel_scale(weight, even)[0], torch.ones(48))  # all channels alike: absmean


# ---------------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("subln", [False, True])
def test_absmean_is_what_it_was(subln):
    layer, x = make_layer("absmean", subln=subln), torch.randn(2, 3, 48)
    inside = x if layer.subln is None else layer.subln(x)
    assert not layer.on_reference()
    expected = bit_linear(inside, layer.weight, layer.bias)  # a fused norm sums in another order
    assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-6) if subln else torch.equal(layer(x), expected)
    assert set(layer.state_dict()) == {"weight", "bias"} | ({"subln.weight"} if subln else set())
    for ours, theirs in zip(layer.ternary(), quantize_weight(layer.weight), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("quantizer", OTHERS)
@pytest.mark.parametrize("subln", [False, True])
def test_forward_and_straight_through_gradient(quantizer, subln):
    """y = x~ W~^T + b, dX = dY W~, dW = dY^T x~, where x~ and W~ are codes times scales."""
    layer = make_layer(quantizer, subln=subln)
    x = torch.randn(2, 3, 48, requires_grad=True)
    codes, _ = layer.codes()
    assert codes.dtype == torch.int8
    assert codes.abs().max() == 1
    inside = (x if layer.subln is None else layer.subln(x)).detach()
    divisor = layer.awq_scale if quantizer == "awq" else 1.0
    act_codes, act_scale = quantize_activation(inside / divisor)
    rounded, quantized = act_codes * act_scale * divisor, layer.quantized_weight()
    bias = layer.bias + (quantizers.tequila_bias(layer.weight, codes) if quantizer == "tequila" else 0)
    y = layer(x)
    assert torch.allclose(y, F.linear(rounded, quantized, bias), atol=1e-5)
    dy = torch.randn(2, 3, 20)
    y.backward(dy)
    if layer.subln is None:
        assert torch.allclose(x.grad, dy @ quantized, atol=1e-5)
    expected = torch.einsum("bto,bti->oi", dy, rounded)
    if quantizer == "tequila":
        expected = expected + 1e-3 * (codes == 0) * dy.sum((0, 1))[:, None]
    if quantizer == "seq":
        expected = expected * (layer.weight.abs() <= 0.99 * layer.seq_a)
        assert layer.seq_a.grad.abs() > 0
    assert torch.allclose(layer.weight.grad, expected, atol=1e-4)
    assert torch.allclose(layer.bias.grad, dy.sum((0, 1)), atol=1e-5)


@pytest.mark.parametrize("quantizer", OTHERS)
def test_annealing_goes_into_it(quantizer):
    layer, x = make_layer(quantizer), torch.randn(4, 48)
    ternary = layer(x)
    layer.annealing = 0.0
    assert torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-5)
    layer.annealing = 1 - 1e-6
    assert torch.allclose(layer(x), ternary, atol=1e-4)


@pytest.mark.parametrize("quantizer", OTHERS)
def test_zero_weights_and_bf16_autocast(quantizer):
    layer = make_layer(quantizer)
    x = torch.randn(4, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), layer(x), atol=0.05)
    nn.init.zeros_(layer.weight)
    assert torch.equal(layer(x), layer.bias.expand(4, 20))


def test_gptq_codes_are_made_once_while_the_weights_stand_still(monkeypatch):
    layer, x = make_layer("gptq"), torch.randn(4, 48)
    calls, original = [], quantizers.gptq_codes
    monkeypatch.setattr(quantizers, "gptq_codes", lambda *args: calls.append(0) or original(*args))
    codes, expected = WeightCodes(layer), layer(x)
    for step, changed in ((7, False), (7, True), (8, False)):
        with codes.hold(step):
            before = len(calls)
            assert torch.equal(layer(x), expected)
            layer(x)
            assert len(calls) == before
            if changed:  # written in place: the held codes are not its own any more
                with torch.no_grad():
                    layer.weight.neg_()
                expected = layer(x)
                assert len(calls) == before + 1
    assert torch.equal(layer(x), expected)


# ---------------------------------------------------------------------------------------------------- the model


def test_statistics_are_those_of_the_inputs():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_students.CONFIGS["qwen3"], dtype=torch.float32)
    tokens = torch.randint(3, 97, (2, 10))
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    seen = {}
    for name in ("q_proj", "o_proj"):
        layer = getattr(model.model.layers[1].self_attn, name)
        layer.register_forward_pre_hook(lambda _m, args, name=name: seen.update({name: args[0][mask.bool()].detach()}))
    inputs = calibrate_inputs(model, [{"input_ids": tokens, "attention_mask": mask}] * 2, subln_eps=1e-6)
    assert len(inputs) == 21
    assert inputs["model.layers.1.self_attn.q_proj"] is inputs["model.layers.1.self_attn.v_proj"]
    for name, x in seen.items():
        if name == "o_proj":  # after the SubLN that is to come
            x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        statistics = inputs[f"model.layers.1.self_attn.{name}"]
        assert statistics.tokens == 32
        assert torch.allclose(statistics.gram, 2 * x.T @ x, rtol=1e-4, atol=1e-4)
        assert torch.allclose(statistics.magnitude, 2 * x.abs().sum(0), rtol=1e-4)
    with pytest.raises(UserError, match="at least one block"):
        calibrate_inputs(model, [])


@pytest.mark.parametrize("quantizer", OTHERS)
def test_saved_and_loaded_strictly(tmp_path, quantizer):
    from safetensors.torch import load_file, save_file

    model = student("llama", quantizer)
    save_student(tmp_path, model)
    assert json.loads((tmp_path / "config.json").read_text())["bitdistill"]["weight_quantizer"] == quantizer
    again, tokens = load_student(tmp_path), torch.tensor([tiny_students.prompt(12)])
    assert torch.equal(model(tokens).logits, again.eval()(tokens).logits)
    assert {layer.quantizer.name for layer in bit_linears(again).values()} == {quantizer}
    kept = {"gptq": "gptq_factor", "awq": "awq_scale", "seq": "seq_a"}.get(quantizer)
    if kept is not None:
        tensors = load_file(tmp_path / "model.safetensors")
        gone = next(key for key in tensors if key.endswith(kept))
        save_file({key: value for key, value in tensors.items() if key != gone}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=f"1 missing: {gone}"):
            load_student(tmp_path)


@pytest.mark.parametrize("quantizer", OTHERS)
def test_health_can_look_at_it(quantizer):
    model = student("qwen3", quantizer)
    for line in measure(model, snapshot(model)[0]).values():
        assert line["flips"] == 0
        assert line["zeros"] + line["minus"] + line["plus"] == pytest.approx(1)
        assert line["weight_scale"] > 0


@pytest.mark.parametrize(
    ("quantizer", "family"),
    [("block", "llama"), ("gptq", "llama"), ("awq", "llama_biases"), ("tequila", "qwen2"), ("seq", "gemma3")],
)
def test_exported_file_holds_it(tmp_path, quantizer, family):
    model = student(family, quantizer)
    for layer in bit_linears(model).values():
        if quantizer == "awq":  # far from ones, as after a calibration on inputs with large channels
            layer.awq_scale.copy_(torch.rand(layer.in_features) + 0.5)
    write_packed(tmp_path / "s.safetensors", model)
    proof = prove_parity(tmp_path / "s.safetensors", model, [tiny_students.prompt(20)])
    assert proof["linears"] == 21
    assert proof["product_max_diff"] < 1e-6


class Sign(quantizers.WeightQuantizer):
    """W / mean|W| by sign alone, and a learned offset that is added to the bias."""

    name = "sign"

    def attach(self, layer):
        layer.offset = nn.Parameter(torch.ones(layer.out_features))

    def codes(self, layer):
        return layer.weight.detach().sign().to(torch.int8), layer.weight.detach().abs().mean()

    def bias(self, layer, codes):
        return layer.offset


def test_a_class_and_its_place_in_the_list_make_a_quantizer(tmp_path, monkeypatch):
    """Surgery, training, saving and export know it by what the class says."""
    monkeypatch.setitem(quantizers.QUANTIZERS, "sign", Sign)
    model = student("llama", "sign")
    name, layer = next(iter(bit_linears(model).items()))
    x = torch.randn(3, layer.in_features)
    act_codes, act_scale = quantize_activation(x)
    expected = F.linear(act_codes * act_scale, layer.weight.sign() * layer.weight.abs().mean(), layer.offset)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    layer(x).sum().backward()
    assert torch.equal(layer.offset.grad, torch.full_like(layer.offset, 3.0))
    save_student(tmp_path / "student", model)
    assert f"{name}.offset" in load_student(tmp_path / "student").state_dict()
    write_packed(tmp_path / "s.safetensors", model)
    assert prove_parity(tmp_path / "s.safetensors", model, [tiny_students.prompt(20)])["product_max_diff"] < 1e-6


# ---------------------------------------------------------------------------------------------------- refusals


def test_refusals():
    with pytest.raises(UserError, match=r"absmean, block, gptq, awq, tequila, seq; got 'int3'"):
        refine(AutoModelForCausalLM.from_config(tiny_students.CONFIGS["llama"]), weight_quantizer="int3")
    for quantizer in ("gptq", "seq"):
        partitioned = nn.Linear(4, 4)
        partitioned.weight.ds_id = 0
        with pytest.raises(UserError, match="ZeRO-3"):
            BitLinear(partitioned, None, quantizer_named(quantizer))
        with pytest.raises(UserError, match="ZeRO-3"):
            parse_config(["--refine.weight_quantizer", quantizer, "--zero", "3"])
    layer = make_layer("awq")
    with pytest.raises(UserError, match=r"expected one without scales of the input channels.*got awq"):
        layer.whole_groups()
    with pytest.raises(UserError, match="softmax"):
        parse_config(["--refine.weight_quantizer", "tequila", "--pretrain.annealing", "softmax"])
    with pytest.raises(UserError, match="weight_quantizer"):
        parse_config(["--refine.weight_quantizer", "int3"])
