"""DeepSpeed presets, the frozen teacher, checkpoints. Nothing here depends on the method. See docs/design.md."""
