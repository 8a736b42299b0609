"""The measurements of whole models for bench/gpu_proof.py: a training step of a student, a decoding step of a packed one."""

import time
from functools import partial

import torch
from torch import Tensor

from gpu_baselines import PlainDecoder, fake_quant, plain_weights
from gpu_sections import EPS, Bench, median
from gpu_timing import Call, Target, summarize
from random_models import SHAPES, Shape


def decoding(bench: Bench) -> None:
    """A whole decoding step, greedy, the token read back each time, beside a plain bf16 decoder in its own CUDA graph."""
    from bitdistill.kernels.gpu.decoder import Sequences

    context, tokens, capacity = (4, 2, 16) if bench.dry else (128, 64, 512)
    targets = {"0.6B": 2.33, "4B": 4.0}
    for name, shape in bench.shapes.items():
        bench.deadline.check()
        ours = Sequences(packed_decoder(shape, bench.device), 1, capacity, torch.bfloat16)
        ours.prompt(list(range(context)), 0, 0, "last")
        dtype = torch.float32 if bench.dry else torch.bfloat16
        plain = PlainDecoder(shape, capacity, plain_weights(shape, bench.device, dtype), compiled=not bench.dry)
        plain.step()  # compiles
        step = bench.timer.graph([plain.step])
        seconds: dict[str, list[float]] = {"ours": [], "bf16": []}
        for turn in range(1 if bench.dry else bench.timer.rounds // 2 + 2):
            for which, decoder, advance in (("ours", ours, ours.step), ("bf16", plain, step)):
                decoder.positions.fill_(context)
                int(decoder.ids[0])
                started = time.perf_counter()
                for _ in range(tokens):
                    advance()
                    int(decoder.ids[0])
                if turn:  # the first round compiles and captures
                    seconds[which].append((time.perf_counter() - started) / tokens)
        timings = {which: summarize(values) if values else None for which, values in seconds.items()}
        if bench.dry:
            print(f"    works: decoding, {name}")
        section, base = "decoding, one sequence (seconds per token)", median(timings["bf16"])
        asked = Target("speedup", targets.get(name, 0.0), "bf16")
        read = shape.linear_weights() / 4 + shape.vocabulary * shape.hidden
        note = "" if timings["ours"] is None else f"{1 / timings['ours'].median:,.0f} tokens/s"
        bench.row(
            section,
            f"{name}, int8 head",
            timings["ours"],
            floor=bench.moved(read),
            target=asked,
            contender=base,
            note=note,
        )
        read = 2 * (shape.linear_weights() + shape.vocabulary * shape.hidden)
        note = "" if base is None else f"{1 / base:,.0f} tokens/s"
        bench.row(section, f"{name}, plain bf16", timings["bf16"], floor=bench.moved(read), note=note)
        del ours, plain, step


def packed_decoder(shape: Shape, device: str):
    """Our decoder with random ternary weights and an int8 table, tied, with two SubLN a layer."""
    from bitdistill.kernels.gpu.decode import pack_2bit, pack_rows
    from bitdistill.kernels.gpu.decoder import Group, Layer, Model, Table

    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def codes(rows: int, columns: int, largest: int) -> Tensor:
        return torch.randint(-largest, largest + 1, (rows, columns), dtype=torch.int8, device=device)

    def group(rows: int, columns: int, subln: bool) -> Group:
        scale = torch.full((rows,), 0.02, device=device)
        gain = torch.ones(1, columns, device=device) if subln else None
        return Group((pack_2bit(codes(rows, columns, 1)),), scale, None, gain, EPS if subln else 0.0)

    def ones(width: int) -> Tensor:
        return torch.ones(width, device=device)

    layers = tuple(
        Layer(
            input_norm=ones(shape.hidden),
            qkv=group(q + 2 * kv, shape.hidden, False),
            qk_norms=(ones(shape.head_dim), ones(shape.head_dim)),
            o=group(shape.hidden, q, True),
            post_attention_norm=None,
            pre_mlp_norm=ones(shape.hidden),
            gate_up=group(2 * shape.intermediate, shape.hidden, False),
            down=group(shape.hidden, shape.intermediate, True),
            post_mlp_norm=None,
            rope="full_attention",
            window=None,
        )
        for _ in range(shape.layers)
    )
    scale = torch.full((shape.vocabulary,), 0.02 / 127, device=device)
    table = Table(pack_rows(codes(shape.vocabulary, shape.hidden, 127)), scale)
    half = torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float32) / shape.head_dim
    return Model(
        layers=layers,
        embedding=table,
        head=table,
        final_norm=ones(shape.hidden),
        eps=EPS,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        activation="silu",
        attention_scale=shape.head_dim**-0.5,
        embedding_scale=1.0,
        rope={"full_attention": (1e6**-half, 1.0)},
    )


def training(bench: Bench) -> None:
    """A training step of a Qwen3-0.6B-shaped student, 16 x 512 tokens, fp32 masters, autocast to bf16, AdamW: ours in both
    backward modes, fake quantization, full precision. All have the same head and loss (kernels/vocabulary.py)."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from bitdistill.names import PROJECTIONS, SUBLN_BEFORE
    from bitdistill.student.layers import use_backward
    from bitdistill.student.refine import refine
    from bitdistill.student.sharing import WeightCodes
    from bitdistill.training.head import head_cross_entropy, instead_of_logits
    from bitdistill.training.losses import next_tokens

    shape = SHAPES["tiny" if bench.dry else "0.6B"]
    B, T = (1, 16) if bench.dry else (16, 512)
    config = Qwen3Config(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    ids = torch.randint(0, shape.vocabulary, (B, T), device=bench.device)
    targets = next_tokens(ids)
    compute = partial(head_cross_entropy, targets_BP=targets, num_items=B * (T - 1))

    def make(kind: str) -> Call:
        with torch.device(bench.device):
            model = Qwen3ForCausalLM(config).float()
        codes = None
        if kind == "fake quant":
            fake_quant(model, PROJECTIONS, SUBLN_BEFORE["two"], EPS)
        elif kind != "bf16":
            refine(model)
            use_backward(model, kind)
            codes = WeightCodes(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        done = 0

        def loss():
            with torch.autocast(bench.device, dtype=torch.bfloat16), instead_of_logits(model, compute):
                return model(input_ids=ids, use_cache=False).logits

        def call():
            nonlocal done
            if codes is None:
                loss().backward()
            else:
                with codes.hold(step=done):
                    loss().backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1

        return call

    calls = {kind: make(kind) for kind in ("exact", "fast", "fake quant", "bf16")}
    works = {f"training step, {kind}": [call] for kind, call in calls.items()}
    bench.deadline.check()
    timings = bench.timer.compare(works, rounds=5)
    base = median(timings["training step, bf16"])
    for kind, call in calls.items():
        timing, used = timings[f"training step, {kind}"], bench.timer.peak_bytes(call)
        note = "" if timing is None else f"{B * T / timing.median:,.0f} tokens/s, {used / 1e9:.1f} GB beyond the states"
        asked = Target("speedup", 0.0, "bf16") if kind != "bf16" else Target()
        what = f"0.6B shape, {B} x {T}, {kind}"
        bench.row("training step", what, timing, target=asked, contender=base, note=note)
