"""BitLinear on the kernels: equal to the reference, shared work that is never stale, compiled without a graph break."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

import tiny_students
from bitdistill.kernels import reference
from bitdistill.kernels.gpu import bit_linear, matmul
from bitdistill.kernels.gpu import quantize as gpu_quantize
from bitdistill.student import backend, layers, sharing
from bitdistill.student.layers import BitLinear, GatedMLP, SubLN, bit_linears, use_backward
from bitdistill.student.sharing import Siblings, WeightCodes


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch):
    """The kernels, interpreted where there is no GPU."""
    for module in (layers, sharing):
        monkeypatch.setattr(module, "kernels_for", lambda device: bit_linear)
    if not torch.cuda.is_available():  # the interpreter takes its time by the instruction: few large tiles
        monkeypatch.setattr(matmul, "FP32_TILES", (matmul.Tile(128, 128, 128, 4, 1),))


@pytest.fixture
def counted(monkeypatch):
    """Calls of the quantizers and products, by name."""
    calls = {"quantize_weights": 0, "quantize_activation": 0, "int8_linear": 0}

    def count(module, name):
        function = getattr(module, name)

        def wrapper(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapper)

    count(gpu_quantize, "quantize_weights")
    count(gpu_quantize, "quantize_activation")
    count(bit_linear.matmul, "int8_linear")
    return calls


def make_layer(device, I=48, O=32, bias=False, subln=False, seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(I, O, bias=bias, device=device)
    norm = SubLN(I, 1e-6, device=device) if subln else None
    if subln:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    return BitLinear(linear, norm)


def on_reference(layer, x):
    x = x if layer.subln is None else reference.rms_norm(x, layer.subln.weight, layer.subln.eps)
    return reference.bit_linear(x, layer.weight, layer.bias)


def gradients(y, inputs, dy):
    return torch.autograd.grad(y, inputs, dy.to(y.dtype))


# ---------------------------------------------------------------------------------------------------- one layer


@pytest.mark.parametrize("subln", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(6, 48), (2, 3, 48), (1, 48), (0, 48)])
def test_equals_the_reference_in_fp32(shape, bias, subln, device):
    layer = make_layer(device, bias=bias, subln=subln)
    x = torch.randn(shape, device=device, requires_grad=True)
    if len(shape) == 3:
        with torch.no_grad():
            x[0, 1] = 0
            x[1, 0] *= 1e10
            x[1, 1] *= 1e-10
    y, expected = layer(x), on_reference(layer, x)
    assert y.dtype == torch.float32
    assert torch.equal(y, expected) if not (subln or bias) else torch.allclose(y, expected, rtol=1e-5, atol=1e-6)
    dy, inputs = torch.randn_like(y), [x, *layer.parameters()]
    for ours, theirs in zip(gradients(y, inputs, dy), gradients(expected, inputs, dy), strict=True):
        assert ours.dtype == theirs.dtype
        peak = theirs.abs().amax(-1, keepdim=True)  # rows of 1e10 and of 1e-10 stand side by side
        assert ((ours - theirs).abs() <= 1e-5 * peak + 1e-30).all()


@pytest.mark.parametrize("subln", [False, True])
@pytest.mark.parametrize("mixed", ["bf16", "autocast"])
def test_half_precision_is_as_good_as_the_reference(mixed, subln, device):
    """bf16 inputs, and fp32 inputs under autocast: dtypes as nn.Linear's, errors at most twice the reference's."""
    layer = make_layer(device, I=96, O=64, bias=True, subln=subln)
    dtype = torch.bfloat16 if mixed == "bf16" else torch.float32
    x = torch.randn(40, 96, device=device).to(dtype).requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16, enabled=mixed == "autocast"):
        y, expected = layer(x), on_reference(layer, x)
        assert y.dtype == expected.dtype == torch.bfloat16
    exact_layer = copy.deepcopy(layer)
    x64 = x.detach().float().requires_grad_()
    exact = on_reference(exact_layer, x64)
    dy = torch.randn(40, 64, device=device).bfloat16()
    inputs, exact_inputs = [x, *layer.parameters()], [x64, *exact_layer.parameters()]
    for name, ours, theirs, truth in zip(
        ["y", "x", *dict(layer.named_parameters())],
        [y, *gradients(y, inputs, dy)],
        [expected, *gradients(expected, inputs, dy)],
        [exact, *gradients(exact, exact_inputs, dy)],
        strict=True,
    ):
        assert ours.dtype == theirs.dtype, name
        error, allowed = (((z.double() - truth.double()).norm() / truth.double().norm()).item() for z in (ours, theirs))
        assert error <= max(2 * allowed, 2**-8), (name, error, allowed)


def test_wrong_width_is_refused(device):
    with pytest.raises(ValueError, match="expected a last dimension of 48"):
        make_layer(device)(torch.zeros(2, 47, device=device))


def test_fast_gradients_point_the_same_way(device):
    """Every layer of a student, gradients of a real loss: cosine >= 0.999 against the exact backward pass."""
    torch.manual_seed(0)
    student = tiny_students.student("qwen3").to(device)
    tokens = torch.randint(3, 97, (6, 20), device=device)
    loss = lambda: student(input_ids=tokens, labels=tokens).loss  # noqa: E731
    weights = {name: layer.weight for name, layer in bit_linears(student).items()}
    exact = torch.autograd.grad(loss(), list(weights.values()))
    use_backward(student, "fast")
    fast = torch.autograd.grad(loss(), list(weights.values()))
    for name, a, b in zip(weights, exact, fast, strict=True):
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0) >= 0.999, name


# ---------------------------------------------------------------------------------------------------- the MLP


def make_mlp(device, activation, subln):
    mlp = nn.Module()
    mlp.gate_proj, mlp.up_proj = make_layer(device, 48, 40, seed=1), make_layer(device, 48, 40, seed=2)
    mlp.down_proj = make_layer(device, 40, 48, subln=subln, seed=3)
    mlp.act_fn = nn.SiLU() if activation == "silu" else nn.GELU(approximate="tanh")
    return GatedMLP(mlp, activation)


@pytest.mark.parametrize("subln", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_a_gated_mlp_is_one_operation_before_its_down_projection(activation, subln, device, counted):
    mlp = make_mlp(device, activation, subln)
    x = torch.randn(2, 5, 48, device=device, requires_grad=True)
    y = mlp(x)
    assert counted["quantize_activation"] == 2  # of gate and up, who are no siblings here; down_proj's is fused
    expected = on_reference(mlp.down_proj, mlp.act_fn(on_reference(mlp.gate_proj, x)) * on_reference(mlp.up_proj, x))
    dy, inputs = torch.randn_like(y), [x, *mlp.parameters()]
    pairs = zip([y, *gradients(y, inputs, dy)], [expected, *gradients(expected, inputs, dy)], strict=True)
    for ours, theirs in pairs:
        assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.9999  # a code may flip
        assert (ours - theirs).abs().max() <= 2e-2 * theirs.abs().max()


def test_whoever_hooks_into_a_down_projection_sees_its_input(device):
    """ZeRO-3, which gathers in hooks, and our own calibration."""
    mlp, seen = make_mlp(device, "silu", subln=True), []
    x = torch.randn(3, 48, device=device)
    expected = mlp(x)
    for module in (mlp.down_proj, mlp.down_proj.subln):
        handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
        assert torch.allclose(mlp(x), expected, rtol=1e-2, atol=1e-2)
        handle.remove()
    assert seen == [(3, 40), (3, 40)]


# ---------------------------------------------------------------------------------------------------- operators


@pytest.mark.parametrize("backward", ["exact", "fast"])
def test_operators_are_well_formed(backward, device):
    """torch.library's own checks: schema, fake tensors, autograd registration, tracing."""
    x = torch.randn(6, 32, device=device, requires_grad=True)
    weights = [torch.randn(16, 32, device=device, requires_grad=True), torch.randn(5, 32, device=device)]
    bias = [torch.randn(16, device=device, requires_grad=True), torch.randn(5, device=device)]
    activation, ternary = bit_linear.quantize_input(x), bit_linear.ternarize(weights)
    arguments = (x, *activation, weights, bias, *ternary, [16, 5], torch.bfloat16, backward == "fast")
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    checks += ["test_aot_dispatch_dynamic"] if backward == "exact" else []  # it runs twice and compares; noise differs
    torch.library.opcheck(bit_linear._ternary_linear, arguments, test_utils=checks)
    if backward == "fast":
        return
    # The check that traces sums all outputs, which int8 ones do not take; the compiled layers below are traced anyway.
    checks.remove("test_aot_dispatch_dynamic")
    gain = torch.rand(32, device=device, requires_grad=True)
    for operator, arguments in (
        (bit_linear._quantize_activation, (x.detach(), False)),
        (bit_linear._quantize_activation, (x.detach(), True)),
        (bit_linear._quantize_weights, ([weight.detach() for weight in weights], 0)),
        (bit_linear._quantize_weights, ([weight.detach() for weight in weights], 32)),
        (bit_linear._rms_norm_quantize, (x, gain, 1e-6, False)),
        (bit_linear._swiglu_norm_quantize, (x, x * 2, gain, 1e-6, "silu", False)),
        (bit_linear._swiglu_norm_quantize, (x, x * 2, None, 1e-6, "gelu_pytorch_tanh", True)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=checks)


@pytest.mark.parametrize("kind", ["plain", "subln", "mlp"])
@pytest.mark.parametrize("tracer", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break(tracer, kind, device):
    layer = make_mlp(device, "silu", True) if kind == "mlp" else make_layer(device, bias=True, subln=kind == "subln")
    x = torch.randn(3, 5, 48, device=device, requires_grad=True)
    compiled = torch.compile(layer, backend=tracer, fullgraph=True)
    y, expected = compiled(x), layer(x)
    assert torch.equal(y, expected)
    dy, inputs = torch.randn_like(y), [x, *layer.parameters()]
    for ours, theirs in zip(gradients(y, inputs, dy), gradients(expected, inputs, dy), strict=True):
        assert torch.equal(ours, theirs)


def test_a_compiled_layer_ignores_what_is_held(device):
    """Codes held while it was traced must not become constants of its graph."""
    layer = make_layer(device)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(4, 48, device=device)
    model = nn.Sequential(layer)
    with WeightCodes(model).hold():
        assert torch.equal(compiled(x), on_reference(layer, x))
    layer.weight.data.copy_(torch.randn_like(layer.weight))
    assert torch.equal(compiled(x), on_reference(layer, x))


# ---------------------------------------------------------------------------------------------------- held weights


def fresh(layer, x):
    """What the layer must give, from its weight as it is now."""
    return on_reference(layer, x)


def rewrite(layer, seed):
    """Another weight, with other codes."""
    torch.manual_seed(seed)
    return torch.randn_like(layer.weight)


def test_weights_are_quantized_once_while_they_stand_still(device, counted):
    """Gradient accumulation: micro-steps of one optimizer step, and the recomputation of checkpointed layers."""
    model = nn.Sequential(make_layer(device, 48, 48), make_layer(device, 48, 32, subln=True, seed=1))
    x, codes = torch.randn(5, 48, device=device, requires_grad=True), WeightCodes(model)
    expected = model(x)
    assert counted["quantize_weights"] == 2  # nothing is kept outside a block
    counted["quantize_weights"] = 0
    for _ in range(3):
        with codes.hold(step=7):
            assert torch.equal(model(x), expected)
            y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
            y.sum().backward()
    assert counted["quantize_weights"] == 1
    with codes.hold(step=8):
        model(x)
    assert counted["quantize_weights"] == 2
    model(x)
    assert counted["quantize_weights"] == 4
    assert all(layer.held is None for layer in model)


def test_evaluation_block(device, counted):
    model = nn.Sequential(make_layer(device, 48, 48), make_layer(device, 48, 32, seed=1))
    x = torch.randn(5, 48, device=device)
    codes = WeightCodes(model)
    for _ in range(2):  # without a step, every block quantizes again
        with torch.no_grad(), codes.hold():
            model(x)
            model(x)
        model[0].weight.data.mul_(-1)
        with torch.no_grad(), codes.hold():
            assert torch.equal(model[0](x), fresh(model[0], x))
    assert counted["quantize_weights"] == 4
    with torch.inference_mode(), codes.hold():
        assert torch.equal(model[0](x), fresh(model[0], x))


@pytest.mark.parametrize(
    "change",
    ["optimizer", "in_place", "load_state_dict", "data_replaced", "data_emptied_and_refilled", "new_parameter"],
)
def test_a_changed_weight_is_noticed_inside_the_block(change, device):
    layer = make_layer(device)
    x, model, codes = torch.randn(4, 48, device=device), nn.Sequential(layer), None
    codes = WeightCodes(model)
    with codes.hold(step=1):
        before = layer(x)
        assert torch.equal(before, fresh(layer, x))
        if change == "optimizer":
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            layer.weight.grad = rewrite(layer, 5)
            optimizer.step()
        elif change == "in_place":
            with torch.no_grad():
                layer.weight.copy_(rewrite(layer, 5))
        elif change == "load_state_dict":
            model.load_state_dict({"0.weight": rewrite(layer, 5)})
        elif change == "data_replaced":
            layer.weight.data = rewrite(layer, 5)
        elif change == "data_emptied_and_refilled":  # as ZeRO-3 does around every use
            new = rewrite(layer, 5)
            layer.weight.data = torch.empty(0, device=device)
            gc.collect()
            for _ in range(50):  # an allocator that hands the old address out again would do so here
                layer.weight.data = torch.empty_like(new).copy_(new)
        else:
            layer.weight = nn.Parameter(rewrite(layer, 5))
        after = layer(x)
        assert torch.equal(after, fresh(layer, x))
        assert not torch.equal(after, before)
    with codes.hold(step=1):  # the same step: what was held then must not come back
        assert torch.equal(layer(x), fresh(layer, x))


def test_data_written_behind_an_optimizer_step_is_noticed(device):
    """DeepSpeed: the optimizer steps on parameters of its own, then their values are copied into `.data`."""
    layer = make_layer(device)
    x, codes = torch.randn(4, 48, device=device), WeightCodes(nn.Sequential(layer))
    shard = nn.Parameter(torch.zeros(3, device=device))
    shard.grad = torch.ones_like(shard)
    optimizer = torch.optim.AdamW([shard])
    with codes.hold(step=1):
        layer(x)
        version = layer.weight._version
        optimizer.step()
        layer.weight.data.copy_(rewrite(layer, 5))
        assert layer.weight._version == version, "then this test shows nothing"
        assert torch.equal(layer(x), fresh(layer, x))
    with codes.hold(step=1):
        assert torch.equal(layer(x), fresh(layer, x))


def test_data_written_between_blocks_of_different_steps_is_noticed(device):
    layer = make_layer(device)
    x, codes = torch.randn(4, 48, device=device), WeightCodes(nn.Sequential(layer))
    with codes.hold(step=1):
        layer(x)
    layer.weight.data.copy_(rewrite(layer, 5))
    assert torch.equal(layer(x), fresh(layer, x))  # outside: evaluation, health, callbacks
    with codes.hold(step=2):
        assert torch.equal(layer(x), fresh(layer, x))


def test_a_graph_keeps_the_codes_it_was_made_with(device):
    """A backward pass after the next step's codes were made uses the old ones: no buffer is written twice."""
    layer = make_layer(device)
    x, codes = torch.randn(4, 48, device=device, requires_grad=True), WeightCodes(nn.Sequential(layer))
    with codes.hold(step=1):
        y = layer(x)
    expected = torch.autograd.grad(on_reference(layer, x).sum(), x)[0]
    layer.weight.data.copy_(rewrite(layer, 5))
    with codes.hold(step=2):
        layer(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(dx, expected, rtol=1e-5)


def test_partitioned_weights_are_never_held(device):
    layer = make_layer(device)
    layer.weight.ds_id = 0
    with WeightCodes(nn.Sequential(layer)).hold(step=1):
        assert layer.held is None
        layer(torch.randn(2, 48, device=device))
    empty = make_layer(device)
    empty.weight.data = torch.empty(0, device=device)
    with WeightCodes(nn.Sequential(empty)).hold(step=1):
        assert empty.held is None


def test_other_dtypes_are_quantized_apart(device):
    model = nn.Sequential(make_layer(device, 48, 48), make_layer(device, 48, 32, seed=1).bfloat16())
    x = torch.randn(4, 48, device=device)
    with WeightCodes(model).hold():
        assert torch.equal(model[1](x), fresh(model[1], x))
        assert model[0].held is not None
        assert model[1].held is not None


# ---------------------------------------------------------------------------------------------------- siblings


def siblings_of(device, biases=False):
    family = [make_layer(device, 48, O, bias=biases, seed=seed) for seed, O in enumerate((32, 16, 8))]
    siblings = Siblings(family)
    for layer in family:
        layer.siblings = siblings
    return nn.ModuleList(family)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_siblings_share_one_product(order, biases, device, counted):
    family = siblings_of(device, biases)
    x = torch.randn(2, 3, 48, device=device, requires_grad=True)
    with WeightCodes(family).hold():
        outputs = {place: family[place](x) for place in order}
    assert counted == {"quantize_weights": 1, "quantize_activation": 1, "int8_linear": 1}
    assert not hasattr(x, sharing._ATTRIBUTE)
    expected = {place: on_reference(family[place], x) for place in order}
    dys = {place: torch.randn_like(outputs[place]) for place in order}
    inputs = [x, *family.parameters()]
    total = lambda ys: sum((ys[place] * dys[place]).sum() for place in order)  # noqa: E731
    for place in order:
        assert torch.equal(outputs[place], expected[place])
    for ours, theirs in zip(
        torch.autograd.grad(total(outputs), inputs), torch.autograd.grad(total(expected), inputs), strict=True
    ):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_siblings_outside_a_block_share_the_codes_only(device, counted):
    """As under ZeRO-3, where each layer is handed an alias of the input and only its own weight is there."""
    family = siblings_of(device)
    x = torch.randn(4, 48, device=device, requires_grad=True) * 1
    for layer in family:
        alias = x.detach().requires_grad_()
        assert torch.equal(layer(alias), on_reference(layer, x))
    assert counted == {"quantize_weights": 3, "quantize_activation": 1, "int8_linear": 3}
    assert not hasattr(x.untyped_storage(), sharing._ATTRIBUTE)


@pytest.mark.parametrize("held", [False, True])
def test_another_or_a_changed_input_is_noticed(held, device):
    family, x = siblings_of(device), torch.randn(4, 48, device=device)
    codes = WeightCodes(family)
    with codes.hold() if held else torch.no_grad():
        family[0](x)
        x.mul_(-3).add_(1)
        assert torch.equal(family[1](x), on_reference(family[1], x))
        for other in (x[:2], x[2:], x.clone(), x.T.contiguous().T):
            assert torch.equal(family[2](other), on_reference(family[2], other))
        assert torch.equal(family[0](x), on_reference(family[0], x))
        assert torch.equal(family[0](x), on_reference(family[0], x))  # twice in a row


def test_a_changed_sibling_is_noticed(device):
    """q is called, then the optimizer steps, then k is called with the same tensor."""
    family, x = siblings_of(device), torch.randn(4, 48, device=device)
    optimizer = torch.optim.SGD(family.parameters(), lr=1.0)
    with WeightCodes(family).hold(step=0):
        family[0](x)
        for parameter in family.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        assert torch.equal(family[1](x), on_reference(family[1], x))


def test_outputs_without_a_graph_are_not_given_to_training(device):
    family, x = siblings_of(device), torch.randn(4, 48, device=device, requires_grad=True)
    with WeightCodes(family).hold():
        with torch.no_grad():
            family[0](x)
        assert family[1](x).requires_grad
        with torch.autocast(device, dtype=torch.bfloat16):
            assert family[2](x).dtype == torch.bfloat16


@pytest.mark.parametrize("held", [False, True])
def test_a_sibling_that_is_never_called_leaks_nothing(held, device):
    family, layer_input = siblings_of(device), torch.randn(4, 48, device=device, requires_grad=True)
    codes = WeightCodes(family)
    with codes.hold() if held else torch.enable_grad():
        x = layer_input * 1
        y = family[0](x)
        kept = getattr(x, sharing._ATTRIBUTE).outputs[1] if held else None
        untaken = [kept] if held else list(getattr(x.untyped_storage(), sharing._ATTRIBUTE)[1])
        alive = [weakref.ref(tensor) for tensor in untaken]
        del kept, untaken
        assert all(reference() is not None for reference in alive)
        y.sum().backward()
        del x, y
        assert all(reference() is None for reference in alive)


def test_siblings_survive_a_copy_of_the_model(device):
    family = copy.deepcopy(siblings_of(device))
    assert all(layer.siblings is family[0].siblings for layer in family)
    assert list(family[0].siblings.layers) == list(family)


# ---------------------------------------------------------------------------------------------------- a whole model


@pytest.mark.parametrize("name", ["llama_biases", "gemma3"])
def test_a_student_on_the_kernels(name, device, counted):
    """Loss and every gradient, with gradient checkpointing, against the reference."""
    student = tiny_students.student(name).to(device).train()
    tokens = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0)).to(device)
    with pytest.MonkeyPatch.context() as patch:
        for module in (layers, sharing):
            patch.setattr(module, "kernels_for", lambda device: None)
        expected = student(input_ids=tokens, labels=tokens).loss
        expected.backward()
    truth = {key: parameter.grad.clone() for key, parameter in student.named_parameters()}
    student.zero_grad()
    student.gradient_checkpointing_enable({"use_reentrant": False})
    counted |= dict.fromkeys(counted, 0)
    with WeightCodes(student).hold(step=0):
        loss = student(input_ids=tokens, labels=tokens).loss
        loss.backward()
    assert counted["quantize_weights"] == 1
    assert counted["int8_linear"] == 2 * 3 * 4  # forward and recomputed, 3 layers, q/k/v + o + gate/up + down
    assert abs(loss - expected) < 1e-5
    for key, parameter in student.named_parameters():
        scale = truth[key].abs().max()
        assert (parameter.grad - truth[key]).abs().max() <= 2e-2 * scale, key  # one code may flip after a fused norm
        cosine = torch.nn.functional.cosine_similarity(parameter.grad.flatten(), truth[key].flatten(), 0)
        assert cosine > 0.9999, key


def test_use_backward(device):
    student = tiny_students.student("llama")
    use_backward(student, "fast")
    assert {layer.backward for layer in bit_linears(student).values()} == {"fast"}


def test_a_gpu_that_cannot_is_told_once(monkeypatch, capsys):
    backend.kernels_for.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla V100")
    try:
        for _ in range(3):
            assert backend.kernels_for(torch.device("cuda", 0)) is None
    finally:
        backend.kernels_for.cache_clear()
    said = capsys.readouterr().out.strip().splitlines()
    assert len(said) == 1
    assert "Tesla V100" in said[0]
    assert "compute capability 7.0" in said[0]
