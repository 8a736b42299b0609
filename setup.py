"""Packaging. `kernels/` and `distributed/` stay at the top level of the repository, and are installed as
`bitdistill.kernels` and `bitdistill.distributed`, because the bare names belong to other people's packages."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "bitdistill/__init__.py").read_text()).group(1)

# Extras only add, so what is needed to run a packed student on a CPU is the core, and training an extra.
CPU = ["numpy>=2.0", "numba>=0.61", "safetensors>=0.5", "tokenizers>=0.22", "jinja2>=3.1.6", "tqdm>=4.66"]
TRAIN = [
    "torch>=2.11",
    "triton>=3.6; platform_system == 'Linux'",
    "transformers>=5.17",
    "accelerate>=1.10",
    "datasets>=4.0",
    "deepspeed>=0.18",
    "jsonargparse[signatures]>=4.40",
    "pyyaml>=6",
    "rich>=13",
    "matplotlib>=3.9",
    "scikit-learn>=1.5",
    "scipy>=1.13",
    "rouge-score>=0.1.2",
    "sacrebleu>=2.4",
    "tensorboard>=2.17",
    "gguf>=0.17",
]
EVAL = ["lm-eval>=0.4.13"]
BENCH = ["asv>=0.6.4"]
LLAMA_CPP = ["llama-cpp-python>=0.3.34"]  # proves GGUF files; pip compiles llama.cpp for some minutes
SERVE = ["fastapi>=0.115", "uvicorn>=0.34", "prometheus-client>=0.21", "uvloop>=0.21; sys_platform != 'win32'"]
TEST = [
    "openai>=1.60",
    "httpx>=0.27",
    "pytest>=8",
    "pytest-timeout",
    "pytest-xdist>=3.7",
    "hypothesis>=6.100",
    "compressed-tensors>=0.20",
    "mlx[cpu]>=0.30; platform_system == 'Linux'",  # with mlx-lm 45 MB
    "mlx-lm>=0.30; platform_system == 'Linux'",
]

setup(
    name="bitdistill",
    version=VERSION,
    description="BitNet Distillation: turn a full-precision Hugging Face language model into a 1.58-bit student",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "bitdistill",
        "bitdistill.commands",
        "bitdistill.data",
        "bitdistill.evaluation",
        "bitdistill.export",
        "bitdistill.reporting",
        "bitdistill.runtime",
        "bitdistill.serving",
        "bitdistill.student",
        "bitdistill.training",
        "bitdistill.kernels",
        "bitdistill.kernels.cpu",
        "bitdistill.kernels.gpu",
        "bitdistill.distributed",
    ],
    package_dir={"bitdistill.kernels": "kernels", "bitdistill.distributed": "distributed"},
    package_data={
        "bitdistill": ["py.typed", "recipes/*.yaml", "recipes/tasks/*.yaml"],
        "bitdistill.reporting": ["templates/*"],
        "bitdistill.serving": ["page.html"],
    },
    install_requires=CPU,
    extras_require={
        "cpu": [],
        "train": TRAIN,
        "eval": [*TRAIN, *EVAL],
        "gguf": [*TRAIN, *LLAMA_CPP],
        "bench": [*TRAIN, *BENCH],
        "serve": SERVE,
        "test": [*TRAIN, *SERVE, *BENCH, *TEST],
        "dev": [*TRAIN, *SERVE, *BENCH, *TEST, "ruff==0.17.6", "pre-commit", "pyright"],
    },
    entry_points={"console_scripts": ["bitdistill=bitdistill.cli:main"]},
)
