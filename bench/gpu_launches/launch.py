"""One GPU kernel, compiled ahead of time for a GPU that this machine need not have, and what the compiler made of it.

Compiling needs no GPU, but a process in which Triton does not interpret (TRITON_INTERPRET unset).
"""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from typing import Any

# name -> (backend, architecture, threads of a warp, bytes of shared memory that a block may have)
TARGETS = {
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}
# The int8 tensor-core instruction of each; on sm_100 small tiles may take the mma of older parts.
INT8_INSTRUCTION = {
    "sm_80": r"mma\.sync\.\S*\.s32\.s8\.s8",
    "sm_90": r"wgmma\.mma_async\S*\.s32\.s8\.s8|mma\.sync\.\S*\.s32\.s8\.s8",
    "sm_100": r"tcgen05\.mma\S*kind::i8|mma\.sync\.\S*\.s32\.s8\.s8",
    "gfx942": r"v_mfma_i32_\S*i8",
}


@dataclass(frozen=True)
class Launch:
    """One kernel as it is launched in production.

    Args:
        kernel: the ``@triton.jit`` function.
        shape: what it works on, in words: "N 16384, I 1024, O 3072".
        signature: type of each run-time argument: "*i8", "*bf16", "*fp32", "i32", "i64", "fp32", ...
        constexprs: the compile-time arguments.
        num_warps, num_stages: as given at the launch.
        int8_dot: its products must be int8 tensor-core instructions; a tuple of targets where only some must.
        wgmma: on sm_90 it must be wgmma, not the older mma.
        aligned: arguments that 16 divides at run time: pointers and row strides.
        only: targets with this tile; empty for all.
    """

    kernel: Any
    shape: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    int8_dot: bool = False
    wgmma: bool = False
    aligned: tuple[str, ...] = ()
    only: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch. `registers` are a thread's, `spills` bytes of local memory a thread."""

    kernel: str
    shape: str
    target: str
    registers: int
    spills: int
    shared_bytes: int
    instruction: str  # the int8 tensor-core instruction found, or ""
    problems: tuple[str, ...]


def compile_launch(launch: Launch, target: str) -> Compiled:
    """Compiles one launch for one of TARGETS.

    Raises:
        RuntimeError: Triton is interpreting in this process.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(launch.kernel, triton.runtime.JITFunction):
        raise RuntimeError("TRITON_INTERPRET: expected unset, to compile; got an interpreted kernel. Unset it.")
    backend, architecture, warp, limit = TARGETS[target]
    names = launch.kernel.arg_names
    signature = {name: launch.signature.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(launch.kernel, signature, constexprs=dict(launch.constexprs), attrs=attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget(backend, architecture, warp), options=options)
    assembly = compiled.asm["ptx"] if backend == "cuda" else compiled.asm["amdgcn"]
    registers, spills = _resources(compiled, backend)
    found = re.search(INT8_INSTRUCTION[target], assembly)
    problems = []
    if spills:
        problems.append(f"{spills} bytes spilled")
    if compiled.metadata.shared > limit:
        problems.append(f"{compiled.metadata.shared:,} bytes of shared memory, the limit is {limit:,}")
    if launch.int8_dot and not found:
        problems.append("no int8 tensor-core instruction")
    if launch.wgmma and target == "sm_90" and "wgmma.mma_async" not in assembly:
        problems.append("no wgmma")
    return Compiled(
        launch.kernel.__name__,
        launch.shape,
        target,
        registers,
        spills,
        compiled.metadata.shared,
        found[0] if found else "",
        tuple(problems),
    )


def _resources(compiled, backend: str) -> tuple[int, int]:
    """Registers and spilled bytes of a thread."""
    if backend == "hip":
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        return registers, int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
    import triton.backends.nvidia

    cuobjdump = os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    # ptxas keeps spilled registers on the stack of the thread; no kernel here has another use for one
    spills = sum(int(re.search(rf"{where}:(\d+)", text)[1]) for where in ("STACK", "LOCAL"))
    return int(re.search(r"REG:(\d+)", text)[1]), spills
