"""Every GPU kernel compiles, with its production tiles, for parts that this machine does not have.

In a process of its own, because Triton cannot both interpret and compile in one.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "kernels" / "gpu"
LAUNCHING = re.compile(r"\b(\w+)\[\(?[^]\n]*\]\(")  # kernel[grid](
LAUNCHES = ROOT / "bench" / "gpu_launches"
MODULES = sorted(path.stem for path in LAUNCHES.glob("*.py") if path.stem not in ("__init__", "launch"))
KERNELS = {
    name for path in FOLDER.glob("*.py") for name in re.findall(r"^@triton\.jit\s+def (\w+)\(", path.read_text(), re.M)
}

pytest.importorskip("triton")


def compiled(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench" / "gpu_compile.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_kernels_compile_without_spills(module, tmp_path):
    """sm_80, sm_90, sm_100 and gfx942: no spills, shared memory within the part's limit, int8 tensor-core products."""
    result = compiled(module, "--json", str(tmp_path / "table.json"))
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    table = json.loads((tmp_path / "table.json").read_text())
    launched = KERNELS & set(LAUNCHING.findall((FOLDER / f"{module}.py").read_text()))
    assert launched, "no launch found: the pattern above no longer fits"
    assert launched <= {row["kernel"] for row in table}, "a kernel that is launched but not in production_launches()"
    for kernel in launched:
        assert {row["target"] for row in table if row["kernel"] == kernel} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert all(row["registers"] > 0 for row in table)


def test_no_kernel_is_launched_behind_the_gate():
    """A file that launches kernels of its own has its launches in bench/gpu_launches."""
    for path in FOLDER.glob("*.py"):
        assert path.stem in MODULES or not KERNELS & set(LAUNCHING.findall(path.read_text())), path.name
    assert len(MODULES) > 8


def test_a_problem_is_seen(tmp_path):
    """The gate itself: a kernel that cannot hold its registers, and a product that is not int8."""
    (tmp_path / "bad.py").write_text(
        """
import triton
import triton.language as tl
from gpu_launches.launch import Launch, compile_launch

@triton.jit
def spilling(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    a = tl.load(x + i[:, None] * B + i[None, :])  # 512 registers a thread, needed again after the sum
    tl.store(y + i[:, None] * B + i[None, :], a / tl.sum(a))

launch = Launch(spilling, "B 128", {"x": "*fp32", "y": "*fp32"}, {"B": 128}, num_warps=1, int8_dot=True)
print(compile_launch(launch, "sm_90").problems)
"""
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(LAUNCHES.parent)
    out = subprocess.run(
        [sys.executable, str(tmp_path / "bad.py")], capture_output=True, text=True, env=environment, check=True
    ).stdout
    assert "spilled" in out
    assert "no int8 tensor-core instruction" in out


def test_unknown_names_are_refused():
    result = compiled("nonsense")
    assert result.returncode == 2
    assert "expected names out of" in result.stderr
