"""What a run was made with: for versions.json, the report, and bug reports (`bitdistill env`)."""

import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from pathlib import Path

from bitdistill import __version__

LIBRARIES = ("torch", "triton", "transformers", "deepspeed", "accelerate", "datasets", "numba", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Versions of this project (with its commit, when run from a checkout), Python, the libraries, and the machine."""
    found = {"bitdistill": __version__, "commit": _commit(), "python": sys.version.split()[0]}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"platform": platform.platform(), "gpu": _gpu()}


def _commit() -> str:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "not a checkout"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown: no git"
    return result.stdout.strip() or "no commit yet"


def _gpu() -> str:
    if importlib.util.find_spec("torch") is None:
        return "unknown: no torch"
    import torch

    if not torch.cuda.is_available():
        return "none"
    return (
        f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, driver {_driver()}"
    )


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown: no nvidia-smi"
    return result.stdout.strip() or "unknown: nvidia-smi failed"
