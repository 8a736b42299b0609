"""Names that several folders use, each defined once. This file is plain data and imports nothing.

A stage is a step of a run with a result on disk. A setting is one of the three ways to train that a run compares. A
projection is one of the seven linears of a decoder layer.
"""

# Stage -> what its result is, in the order in which they run. What each needs and does: the table in train.py.
STAGES = {
    "base": "full-precision base model",
    "trim": "base model and tokenizer with a smaller vocabulary",
    "teacher": "the base model fine-tuned on the task (FP16-SFT)",
    "refine": "stage 1: surgery, SubLN",
    "cache": "the base model's logits for stage 2",
    "pretrain": "stage 2: continued pre-training, ternary",
    "teacher_cache": "what the teacher says to every training row, for stage 3",
    "distill": "stage 3: distillation fine-tuning (BitDistill)",
    "baseline": "a ternary model that is only fine-tuned (BitNet-SFT)",
    "evaluate": "scores on the task's validation rows",
    "export": "the packed file, its proof, its speed",
}

FULL_PRECISION, TERNARY_BASELINE, DISTILLED = "FP16-SFT", "BitNet-SFT", "BitDistill"
SETTINGS = {FULL_PRECISION: "teacher", TERNARY_BASELINE: "baseline", DISTILLED: "distill"}  # setting -> its stage
# FULL_PRECISION with its linears in 4 bits, for comparison -> how they are rounded (evaluation/weight_only.py).
WEIGHT_ONLY = {"int4 RTN": "rtn", "int4 GPTQ": "gptq"}

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # given the same tensor by every family
SUBLN_BEFORE = {"two": ("o_proj", "down_proj"), "all": PROJECTIONS, "none": ()}  # refine.norms -> where SubLN stands

# The norms of a decoder layer that the families have; a family without one of them has no tensor of that name.
LAYER_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "self_attn.q_norm",
    "self_attn.k_norm",
)

DEPLOY_TARGETS = ("bitdistill", "llama.cpp", "ollama", "transformers", "vllm", "mlx", "onnx-genai")  # export/targets.py

TASK_CORPUS = "task"  # --corpus: the task's own training rows as the text of stage 2

KV_CACHES = ("bf16", "fp32", "int8")  # how the CPU runtime keeps keys and values; the first is its default

# How transformers opens a model folder here: no pickle, no code of the folder's, no network.
FROM_DISK = {"use_safetensors": True, "trust_remote_code": False, "local_files_only": True}
