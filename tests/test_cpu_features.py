"""Every instruction set: its algorithm executed in numpy, and compiled; those that any x86 has are also run.

A process each, because the choice is made at import.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bitdistill.kernels.cpu import instructions
from bitdistill.kernels.cpu.instructions import FEATURE_SETS, FEATURES, choose_features

CHECKS = Path(__file__).with_name("cpu_checks.py")
X86 = platform.machine() in ("x86_64", "AMD64")
AVX2 = "+sse4.2,+avx,+avx2,+f16c,+fma"
AVX512 = AVX2 + ",+avx512f,+avx512cd,+avx512dq,+avx512bw,+avx512vl,+avx512vnni"


def process(task, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "BITDISTILL_"))}
    done = subprocess.run([sys.executable, CHECKS, task], env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("features", FEATURE_SETS)
def test_algorithms_of_every_set_in_numpy(features):
    process("run", NUMBA_DISABLE_JIT="1", BITDISTILL_CPU_FEATURES=features)


@pytest.mark.slow
@pytest.mark.skipif(not X86, reason="an x86 processor")
def test_portable_runs_on_a_processor_with_nothing_but_sse2():
    process("run", NUMBA_CPU_NAME="x86-64", NUMBA_CPU_FEATURES="")


@pytest.mark.slow
@pytest.mark.skipif(FEATURES != "amx", reason="the other tests run it, or none can")
@pytest.mark.parametrize("features", ["avx512_vbmi", "avx512_vnni"])
def test_avx512_runs_where_there_are_tiles(features):
    process("run", BITDISTILL_CPU_FEATURES=features)


@pytest.mark.slow
@pytest.mark.skipif(
    FEATURES not in ("amx", "avx512_vbmi", "avx512_vnni", "avx_vnni"), reason="the other tests run it, or none can"
)
def test_avx2_runs_where_there_is_more():
    process("run", BITDISTILL_CPU_FEATURES="avx2")


# What must be in the compiled kernels: {kernel: {instruction: how many at least}}. The loops are written for these; if LLVM
# took them apart, everything would still be right and ten times slower.
VNNI_512 = {
    "_multiply_2bit": {"vpdpbusd zmm": 4},
    "_multiply_base3": {"vpdpbusd zmm": 5},
    "_tile_2_of_4": {"vpdpbusd zmm": 8},
    "_tile_4_of_4": {"vpdpbusd zmm": 16},
    "_multiply_int8": {"vpdpbusd zmm": 4},
    "_multiply_int4": {"vpdpbusd zmm": 16},
    "_multiply_int4_pair": {"vpdpbusd zmm": 32},
}
TILES = {
    "_tiles_2x2": {"tdpbsud": 4, "tdpbssd": 4, "tileloadd": 12, "ldtilecfg": 1},
    "_tiles_bf16": {"tdpbf16ps": 4},
    "_tiles_of_halves": {"tdpbsud": 4, "tileloadd": 8},
}
EXPECTED = {
    "amx": ("sapphirerapids", AVX512 + ",+avx512vbmi,+amx-tile,+amx-int8,+amx-bf16", VNNI_512 | TILES),
    "avx512_vbmi": ("sapphirerapids", AVX512 + ",+avx512vbmi", VNNI_512),
    "avx512_vnni": ("cascadelake", AVX512, VNNI_512),
    "avx_vnni": (
        "alderlake",
        AVX2 + ",+avxvnni",
        {
            "_multiply_2bit": {"vpdpbusd ymm": 8},
            "_multiply_base3": {"vpdpbusd ymm": 10, "vpshufb ymm": 14},
            "_tile_4": {"vpdpbusd ymm": 8},
            "_multiply_int8": {"vpdpbusd ymm": 8},
            "_multiply_int4": {"vpdpbusd ymm": 32},
            "_multiply_int4_pair": {"vpdpbusd ymm": 64},
        },
    ),
    "avx2": (
        "haswell",
        AVX2,
        {
            "_multiply_2bit": {"vpmaddubsw ymm": 8},
            "_multiply_base3": {"vpmaddubsw ymm": 10, "vpshufb ymm": 14},
            "_tile_4": {"vpmaddubsw ymm": 8},
            "_multiply_int8": {"vpmaddubsw ymm": 8, "vpmaddwd ymm": 8},
            "_multiply_int4": {"vpmaddubsw ymm": 32},
            "_multiply_int4_pair": {"vpmaddubsw ymm": 64},
        },
    ),
    "neon_dot": (
        "",
        "+dotprod",
        {
            "_multiply_2bit": {"sdot v": 16},
            "_multiply_base3": {"sdot v": 20, "tbl v": 28},
            "_tile_4": {"sdot v": 16},
            "_multiply_int8": {"sdot v": 16},
            "_multiply_int4": {"sdot v": 64},
            "_multiply_int4_pair": {"sdot v": 128},
        },
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(not X86, reason="compiles for other processors from x86")
@pytest.mark.parametrize("features", EXPECTED)
def test_compiles_to_the_instructions_it_is_written_for(features):
    name, offered, expected = EXPECTED[features]
    environment = {"NUMBA_CPU_NAME": name} if name else {"BITDISTILL_CPU_FEATURES": features}
    result = json.loads(process("assembly", NUMBA_CPU_FEATURES=offered, **environment).splitlines()[-1])
    assert result["features"] == features
    found = result["instructions"]
    for kernel, counts in expected.items():
        for instruction, count in counts.items():
            assert found[kernel].get(instruction, 0) >= count, (kernel, instruction, found[kernel])
    for kernel in ("_multiply_2bit", "_multiply_base3", "_multiply_int8", "_multiply_int4"):
        assert found[kernel].get("prefetcht0", 0) + found[kernel].get("prfm", 0) >= 1
    if features in ("amx", "avx512_vbmi"):
        assert found["_multiply_base3"].get("vpermi2b zmm", 0) + found["_multiply_base3"].get("vpermt2b zmm", 0) >= 1
        assert "vpshufb zmm" not in found["_multiply_base3"]
    if features.startswith(("amx", "avx512")):
        assert "vpmaddubsw zmm" not in found["_tile_2_of_4"]


def test_choice():
    everything = frozenset().union(*FEATURE_SETS.values())
    assert choose_features(None, everything) == "amx"
    assert choose_features(None, everything - {"amx-int8"}) == "avx512_vbmi"
    assert choose_features(None, everything - {"amx-bf16"}) == "avx512_vbmi"
    assert choose_features("", everything - {"avx512vbmi"}) == "avx512_vnni"
    assert choose_features(None, frozenset({"avx2", "f16c", "fma", "avxvnni"})) == "avx_vnni"
    assert choose_features(None, frozenset({"avx2", "f16c", "fma"})) == "avx2"
    assert choose_features(None, frozenset({"avx2"})) == "portable"
    assert choose_features(None, frozenset({"neon", "dotprod"})) == "neon_dot"
    assert choose_features("portable", everything) == "portable"
    assert choose_features("neon_dot", frozenset(), compiled=False) == "neon_dot"


def test_tiles_are_offered_only_where_the_system_grants_them(monkeypatch):
    features = "+amx-tile,+amx-int8,+avx512vnni,-amx-bf16"
    monkeypatch.setattr(
        instructions.llvmlite.binding, "get_host_cpu_features", lambda: SimpleNamespace(flatten=lambda: features)
    )
    monkeypatch.setattr(instructions, "NAMED_FEATURES", None)
    for granted, expected in ((True, {"amx-tile", "amx-int8", "avx512vnni"}), (False, {"avx512vnni"})):
        monkeypatch.setattr(instructions, "may_use_tiles", lambda granted=granted: granted)
        assert instructions.target()[1] == expected
    monkeypatch.setattr(instructions, "NAMED_FEATURES", features)  # named, so trusted
    assert "amx-tile" in instructions.target()[1]


def test_asking_for_tiles_never_fails(monkeypatch):
    answer = instructions.may_use_tiles.__wrapped__()
    assert answer in (True, False)
    if FEATURES == "amx":
        assert answer
    for system, machine in (("linux", "aarch64"), ("darwin", "x86_64"), ("win32", "AMD64")):
        monkeypatch.setattr(instructions.sys, "platform", system)
        monkeypatch.setattr(instructions.platform, "machine", lambda machine=machine: machine)
        assert not instructions.may_use_tiles.__wrapped__()


def test_refused_choices():
    with pytest.raises(
        ValueError, match=r"BITDISTILL_CPU_FEATURES: expected one of portable; got 'sse9', which is not known"
    ):
        choose_features("sse9", frozenset())
    with pytest.raises(ValueError, match=r"expected one of avx2, portable; got 'avx512_vnni', which is not offered"):
        choose_features("avx512_vnni", frozenset({"avx2", "f16c", "fma"}))
    with pytest.raises(ValueError, match="not known"):
        choose_features("sse9", frozenset(), compiled=False)
