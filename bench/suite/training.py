"""One optimizer step of each training stage, at the demo's size, beside the full-precision model in plain PyTorch."""

import tempfile
from pathlib import Path

from . import newer_than_some_commits, shown
from .side_by_side import memory_ratio, ratio
from .teacher_cache import filled

ROWS, TOKENS, PROMPT = 8, 64, 48


class Step:
    """Forward, backward and AdamW on 8 sequences of 64 tokens, without DeepSpeed; answers are the last 16."""

    params = ("base", "teacher", "pretrain", "distill", "baseline", "pretrain with cached teacher")
    param_names = ("stage",)

    def setup(self, stage):
        import copy

        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        with newer_than_some_commits():
            from bitdistill.distributed.teacher import Teacher
            from bitdistill.student.refine import refine
            from bitdistill.training.distill import Answers, Distillation
            from bitdistill.training.head import head_cross_entropy  # noqa: F401  (objectives with the head in the loss)
            from bitdistill.training.pretrain import NextToken
            from bitdistill.training.trainer import Counts
        torch.manual_seed(0)
        torch.set_num_threads(1)
        config = Qwen3Config(
            vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        )  # fmt: skip
        full = Qwen3ForCausalLM(config)
        model = copy.deepcopy(full)
        if stage not in ("base", "teacher"):
            refine(model, norms="none" if stage == "baseline" else "two")
        ids = torch.randint(0, 2048, (ROWS, TOKENS))
        numbers = torch.arange(ROWS)
        labels = ids.clone()
        if stage in ("teacher", "distill", "baseline"):
            labels[:, :PROMPT] = -100
        if stage in ("base", "pretrain"):
            objective = NextToken(model)
        elif stage == "pretrain with cached teacher":
            with newer_than_some_commits():
                from bitdistill.training.pretrain import NextTokenDistillation
            self.folder = tempfile.TemporaryDirectory()
            cache, ids = filled(Path(self.folder.name), full.eval(), ROWS, TOKENS)
            labels = ids.clone()
            full.train()
            objective = NextTokenDistillation(model, cache, lambda_logits=1.0)
        elif stage == "distill":
            frozen = copy.deepcopy(full).requires_grad_(False).eval()
            objective = Distillation(
                model, Teacher(frozen, frozen), lambda_logits=10.0, kd_temperature=5.0, kd_tau_squared=False,
                kd_tokens="answer", relation="eq12", relation_layers=[-2], teacher_relation_layers=None,
                split_heads=None, relation_temperature=1.0, relation_causal=False, gamma_attention=1e4,
                gamma_rho=0.1, gamma_every=10,
            )  # fmt: skip
        else:
            objective = Answers(model)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "block": numbers}
        counts = Counts(int((labels[:, 1:] != -100).sum()), ids.numel(), ids.numel(), 1)
        ours_adam, full_adam = (torch.optim.AdamW(each.parameters(), lr=1e-4) for each in (model, full))

        def step():
            sum(weight * loss for weight, loss in objective(model, batch, counts).values()).backward()
            ours_adam.step()
            ours_adam.zero_grad()

        def full_step():
            full(input_ids=ids, labels=labels).loss.backward()
            full_adam.step()
            full_adam.zero_grad()

        self.step, self.full_step = step, full_step
        step()

    def teardown(self, _stage):
        if hasattr(self, "folder"):
            self.folder.cleanup()

    @shown("training step")
    def time_step(self, stage):
        self.step()

    @shown("training step, against a full-precision one in plain PyTorch", "x full precision")
    def track_ratio_to_full_precision(self, stage):
        return ratio(self.step, self.full_step, rounds=7)

    @shown("training step, memory against a full-precision one in plain PyTorch", "x full precision")
    def track_peak_memory_ratio_to_full_precision(self, stage):
        return memory_ratio(self.step, self.full_step)


class StepAtWidth:
    """Forward, backward and fused AdamW of stages 2 and 3 at a width where products count, beside full precision.

    512 wide, two layers, 8 sequences of 64 tokens; full precision by the same objective, in fp32 and under autocast to bf16.
    """

    params = (("pretrain", "distill"), ("exact", "fast"))
    param_names = ("stage", "backward")

    def setup(self, stage, backward):
        import copy

        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        with newer_than_some_commits():
            from bitdistill.distributed.teacher import Teacher
            from bitdistill.student.layers import use_backward
            from bitdistill.student.refine import refine
            from bitdistill.student.sharing import WeightCodes
            from bitdistill.training.distill import Answers, Distillation
            from bitdistill.training.pretrain import NextToken
            from bitdistill.training.trainer import Counts
        torch.manual_seed(0)
        torch.set_num_threads(1)
        config = Qwen3Config(
            vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=8,
            num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
        )  # fmt: skip
        full = Qwen3ForCausalLM(config)
        student, halved = copy.deepcopy(full), copy.deepcopy(full)
        refine(student, norms="two")
        use_backward(student, backward)
        ids = torch.randint(0, 4096, (ROWS, TOKENS))
        labels = ids.clone()
        if stage == "distill":
            labels[:, :-1] = -100
            teacher = copy.deepcopy(full).requires_grad_(False).eval()
            ours = Distillation(
                student, Teacher(teacher, teacher), lambda_logits=10.0, kd_temperature=5.0, kd_tau_squared=False,
                kd_tokens="response", relation="eq12", relation_layers=[-1], teacher_relation_layers=None,
                split_heads=None, relation_temperature=1.0, relation_causal=False, gamma_attention=1e4,
                gamma_rho=0.1, gamma_every=10,
            )  # fmt: skip
        else:
            ours = NextToken(student)
        plain = NextToken if stage == "pretrain" else Answers
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        counts = Counts(int((labels[:, 1:] != -100).sum()), ids.numel(), ids.numel(), 1)
        codes = WeightCodes(student)

        def made(model, objective, bf16):
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

            def step():
                with codes.hold(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    terms = objective(model, batch, counts).values()
                sum(weight * loss for weight, loss in terms).backward()
                optimizer.step()
                optimizer.zero_grad()

            return step

        self.step, self.fp32, self.bf16 = (
            made(student, ours, False), made(full, plain(full), False), made(halved, plain(halved), True)
        )  # fmt: skip
        self.step()

    @shown("training step at width 512")
    def time_step(self, stage, backward):
        self.step()

    @shown("training step at width 512, against full precision in fp32", "x full precision")
    def track_ratio_to_fp32(self, stage, backward):
        return ratio(self.step, self.fp32, rounds=5)

    @shown("training step at width 512, against full precision in bf16", "x full precision")
    def track_ratio_to_bf16(self, stage, backward):
        return ratio(self.step, self.bf16, rounds=5)


class Optimizer:
    """AdamW over 8 million parameters in 40 matrices, as the stages' arguments choose it, beside torch's default."""

    def setup(self):
        import torch

        with newer_than_some_commits():
            from bitdistill.training.trainer import training_arguments
        torch.manual_seed(0)
        torch.set_num_threads(1)
        arguments = training_arguments(Path(tempfile.gettempdir()), deepspeed=None, seed=0, report_to=[])

        def made(**options):
            weights = [torch.nn.Parameter(torch.randn(512, 400)) for _ in range(40)]
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            return torch.optim.AdamW(weights, lr=1e-4, **options).step

        self.ours, self.default = made(fused=True if "fused" in str(arguments.optim) else None), made()
        self.ours()

    @shown("AdamW")
    def time_step(self):
        self.ours()

    @shown("AdamW, against torch's default", "x default")
    def track_ratio_to_default(self):
        return ratio(self.ours, self.default)
