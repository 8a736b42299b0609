"""BitNet Distillation: a full-precision Hugging Face language model in, a 1.58-bit student out.

The method, in the order in which a model goes through it:

    student/refine.py      stage 1: every projection becomes a BitLinear, with SubLN before o_proj and down_proj
    training/pretrain.py   stage 2: continued pre-training of the ternary student on a corpus
    training/distill.py    stage 3: fine-tuning on a task, with the teacher's logits and Q/K/V relations
    export/                the packed file, and the proof that it equals what was trained
    runtime/cpu.py         CPU inference from the packed file

docs/design.md is the map, docs/method.md has the formulas. Importing this package imports nothing else, because the CPU
runtime must start without torch.
"""

__version__ = "0.1.0"
