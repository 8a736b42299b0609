"""BitNet Distillation: a full-precision Hugging Face language model in, a 1.58-bit student out.

The method, in the order in which a model goes through it:

    student/refine.py      stage 1: every projection becomes a BitLinear, with SubLN before o_proj and down_proj
    training/pretrain.py   stage 2: continued pre-training of the ternary student on a corpus
    training/distill.py    stage 3: fine-tuning on a task, with the teacher's logits and Q/K/V relations
    export/                the packed file, and the proof that it equals what was trained
    runtime/cpu.py         CPU inference from the packed file

From Python: `bitdistill.load("runs/demo").generate("The film was")` runs a student; api.py shows how one is made.
docs/design.md is the map, docs/method.md has the formulas.

Importing this package imports nothing else. Each name below is imported when it is first used, because the CPU runtime
must start without torch.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bitdistill.api import fit as fit
    from bitdistill.api import freeze as freeze
    from bitdistill.api import prove as prove
    from bitdistill.api import write as write
    from bitdistill.data.corpus import TokenStream as TokenStream
    from bitdistill.data.tasks import encode as encode
    from bitdistill.data.tasks import load_rows as load_rows
    from bitdistill.data.tasks import load_task as load_task
    from bitdistill.errors import UserError as UserError
    from bitdistill.prompts import Task as Task
    from bitdistill.runtime.cpu import Runtime as Runtime
    from bitdistill.runtime.loading import load as load
    from bitdistill.runtime.predict import Prediction as Prediction
    from bitdistill.runtime.sampling import Sampling as Sampling
    from bitdistill.student.loading import load_language_model as load_language_model
    from bitdistill.student.loading import load_tokenizer as load_tokenizer
    from bitdistill.student.packed_linear import accelerate as accelerate
    from bitdistill.student.refine import load_student as load_student
    from bitdistill.student.refine import refine as refine
    from bitdistill.student.refine import save_student as save_student
    from bitdistill.training.distill import Distillation as Distillation
    from bitdistill.training.trainer import Objective as Objective

_HOMES = {
    "Distillation": "training.distill",
    "Objective": "training.trainer",
    "Prediction": "runtime.predict",
    "Runtime": "runtime.cpu",
    "Sampling": "runtime.sampling",
    "Task": "prompts",
    "TokenStream": "data.corpus",
    "UserError": "errors",
    "accelerate": "student.packed_linear",
    "encode": "data.tasks",
    "fit": "api",
    "freeze": "api",
    "load": "runtime.loading",
    "load_language_model": "student.loading",
    "load_rows": "data.tasks",
    "load_student": "student.refine",
    "load_task": "data.tasks",
    "load_tokenizer": "student.loading",
    "prove": "api",
    "refine": "student.refine",
    "save_student": "student.refine",
    "write": "api",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'bitdistill' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"bitdistill.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
