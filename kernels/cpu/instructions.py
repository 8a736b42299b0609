"""For which instructions the CPU kernels are compiled, and where their machine code is kept. Without Numba, whose import takes
longer than all else of a start.

Instruction sets. `FEATURES` names how the vector operations of vector.py are done. It is chosen from what the target of
Numba offers, the best first:

    amx          as avx512_vbmi, and products of tiles, int8 and bf16 (tiles.py)   Sapphire Rapids and later
    avx512_vbmi  64-byte vectors, vpdpbusd, byte permutations of 128 entries      Ice Lake, Zen 4 and 5
    avx512_vnni  64-byte vectors, vpdpbusd                                        Cascade Lake
    avx_vnni     32-byte vectors, vpdpbusd                                        Alder Lake and later without AVX512
    avx2         32-byte vectors, vpmaddubsw                                      Haswell, Zen 1 to 3
    neon_dot     16-byte vectors, sdot                                            Arm v8.2 and later, Apple
    portable     whatever LLVM makes of plain vector code                         the rest

The environment variable BITDISTILL_CPU_FEATURES chooses another. Integer results are the same for all of them.

Linux gives tiles only to a process that asks for them, because their state makes the frame of a signal 8 KB larger. So this
module asks when it is imported; where the answer is no, the processor counts as one without AMX. Forked processes inherit
the answer, and started ones ask again.

The cache on disk is ``$XDG_CACHE_HOME/bitdistill/KEY`` (~/.cache by default), where KEY is a hash of all that machine code
depends on: the sources of this folder, the versions of Numba and llvmlite, the processor's name and features, and `FEATURES`.
Kernels that Python calls are kept there by Numba, one file each (compilation.py); the decoder's step is one file for itself
(library.py). Every file is written whole and renamed, so several processes may compile at the same time. With
NUMBA_DISABLE_JIT=1 nothing is compiled and every set can be chosen: vector.py then computes in numpy.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform
import sys
import warnings
from pathlib import Path

import llvmlite
import llvmlite.binding

from bitdistill import folders
from bitdistill.errors import UserError

# name -> the features of the target that it needs, by LLVM's names
FEATURE_SETS = {
    "amx": {"amx-tile", "amx-int8", "amx-bf16", "avx512vbmi", "avx512vnni", "avx512bw", "avx512vl", "f16c", "fma"},
    "avx512_vbmi": {"avx512vbmi", "avx512vnni", "avx512bw", "avx512vl", "f16c", "fma"},
    "avx512_vnni": {"avx512vnni", "avx512bw", "avx512vl", "f16c", "fma"},
    "avx_vnni": {"avxvnni", "avx2", "f16c", "fma"},
    "avx2": {"avx2", "f16c", "fma"},
    "neon_dot": {"dotprod"},
    "portable": set(),
}
VARIABLE = "BITDISTILL_CPU_FEATURES"
_ARCH_PRCTL, _ASK_FOR_STATE, _TILE_DATA = 158, 0x1023, 18  # Linux on x86-64: the call, its request, the state
# What Numba reads from the environment, too.
NAMED_CPU, NAMED_FEATURES = os.environ.get("NUMBA_CPU_NAME"), os.environ.get("NUMBA_CPU_FEATURES")
COMPILED = not int(os.environ.get("NUMBA_DISABLE_JIT") or 0)


@functools.cache
def may_use_tiles() -> bool:
    """Asks Linux for the tile registers of AMX: whether this process and those that it forks may use them."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or sys.maxsize < 2**32:
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ASK_FOR_STATE, _TILE_DATA) == 0


def target() -> tuple[str, frozenset[str]]:
    """The processor that Numba compiles for: its name and its features, by LLVM's names.

    AMX is left out where the system refuses it, but not out of features that NUMBA_CPU_FEATURES names, which are trusted.
    """
    name = NAMED_CPU or llvmlite.binding.get_host_cpu_name()
    text = llvmlite.binding.get_host_cpu_features().flatten() if NAMED_FEATURES is None else NAMED_FEATURES
    features = frozenset(feature[1:] for feature in text.split(",") if feature.startswith("+"))
    if "amx-tile" in features and not may_use_tiles() and NAMED_FEATURES is None:
        features = frozenset(feature for feature in features if not feature.startswith("amx"))
    return name, features


def choose_features(forced: str | None, offered: frozenset[str], compiled: bool = True) -> str:
    """The best of FEATURE_SETS that a target offers.

    Args:
        forced: a name that takes its place; None or "" chooses.
        offered: features of the target, by LLVM's names.
        compiled: False where nothing is compiled, so that any set will do.

    Raises:
        UserError: an unknown name, or one that the target does not offer.
    """
    possible = [name for name, needed in FEATURE_SETS.items() if needed <= offered]
    if not forced:
        return possible[0]
    if forced not in FEATURE_SETS or (compiled and forced not in possible):
        known = "not known" if forced not in FEATURE_SETS else "not offered by this processor"
        raise UserError(
            VARIABLE,
            expected=f"one of {', '.join(possible)}",
            got=f"{forced!r}, which is {known}",
            do="Unset it to let the best one be chosen.",
        )
    return forced


CPU_NAME, CPU_FEATURES = target()
FEATURES = choose_features(os.environ.get(VARIABLE), CPU_FEATURES, COMPILED)


def cache_key() -> str:
    """Hash of everything that the machine code depends on."""
    key = hashlib.sha256()
    here = Path(__file__).resolve().parent
    for path in [*sorted(here.glob("*.py")), here.parent / "numerics.py"]:
        key.update(f"{path.name}\n".encode())
        key.update(path.read_bytes())
    versions = (
        sys.version,
        importlib.metadata.version("numba"),
        llvmlite.__version__,
        llvmlite.binding.llvm_version_info,
    )
    key.update(repr((versions, CPU_NAME, sorted(CPU_FEATURES), FEATURES)).encode())
    return key.hexdigest()[:20]


@functools.cache
def cache_folder() -> Path:
    """The folder of the machine code, made and writable.

    A home that cannot be written to is answered with a folder of the user's own among the temporary files, and a warning.
    """
    home = os.environ.get("XDG_CACHE_HOME") or ((own := folders.home()) and own / ".cache")
    folder = Path(home, "bitdistill", cache_key()) if home else None
    reason = folders.why_not_writable(folder) if folder else "HOME is not set"
    if reason is None:
        return folder
    temporary = folders.private_folder()
    warnings.warn(
        f"{folder.parent if folder else '~/.cache'} cannot be written to ({reason}): compiled kernels are kept in "
        f"{temporary}. Set XDG_CACHE_HOME to a folder that lasts.",
        RuntimeWarning,
        stacklevel=2,
    )
    folder = temporary / cache_key()
    folder.mkdir(exist_ok=True)
    return folder
