"""DeepSpeed presets, the frozen teacher, checkpoints. Knows nothing of the method. See docs/design.md."""
