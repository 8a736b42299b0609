"""One optimiser step of each training stage, at the demo's size, beside the same step of the full-precision model."""


class Step:
    """Forward, backward and AdamW on 8 sequences of 64 tokens, without DeepSpeed."""

    params = ("teacher", "pretrain", "distill")
    param_names = ("stage",)
    timeout = 300

    def setup(self, stage):
        import copy

        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        from bitdistill import losses
        from bitdistill.capture import AttentionCapture
        from bitdistill.refine import refine

        torch.manual_seed(0)
        torch.set_num_threads(1)
        config = Qwen3Config(
            vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        )  # fmt: skip
        self.torch, self.losses, self.capture = torch, losses, AttentionCapture
        self.teacher = Qwen3ForCausalLM(config)
        self.model = copy.deepcopy(self.teacher)
        if stage != "teacher":
            refine(self.model)
        self.ids = torch.randint(0, 2048, (8, 64))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.full = torch.optim.AdamW(self.teacher.parameters(), lr=1e-4)
        self.step(stage)

    def step(self, stage):
        targets = self.losses.next_tokens(self.ids)
        if stage == "distill":
            with self.torch.no_grad(), self.capture(self.teacher, [-2]) as theirs:
                teacher_logits = self.teacher(self.ids).logits
            with self.capture(self.model, [-2], require_grad=True) as ours:
                logits = self.model(self.ids).logits
            loss = self.losses.cross_entropy(logits, targets)
            loss = loss + self.losses.logits_distillation(logits, teacher_logits, targets != self.losses.IGNORED)
            loss = loss + self.losses.relation_loss(theirs.qkv[-2], ours.qkv[-2], None)
        else:
            loss = self.losses.cross_entropy(self.model(self.ids).logits, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def time_step(self, stage):
        self.step(stage)

    def track_ratio_to_full_precision(self, stage):
        from .side_by_side import ratio

        def full():
            self.losses.cross_entropy(self.teacher(self.ids).logits, self.losses.next_tokens(self.ids)).backward()
            self.full.step()
            self.full.zero_grad()

        return ratio(lambda: self.step(stage), full, rounds=7)

    track_ratio_to_full_precision.unit = "x a full-precision step"
