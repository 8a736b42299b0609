"""One optimiser step of each training stage, at the demo's size, beside the full-precision model in plain PyTorch."""

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
