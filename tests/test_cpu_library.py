"""The decoder's step as one file of machine code: it computes what Numba's own compilation computes, starts without Numba, and
survives damage, processes side by side and failures."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitdistill.errors import UserError
from bitdistill.kernels.cpu import library, records
from bitdistill.kernels.cpu.decoder import Decoder, KVCache
from bitdistill.kernels.cpu.pool import ABORTED, LINE, LINES, store_word
from decoder_models import random_model

SCRIPT = """
import sys
from bitdistill.kernels.cpu import library
before = []
library.load(lambda: before.append("compiled"))
import decoder_models, numpy as np
from bitdistill.kernels.cpu.decoder import Decoder, KVCache
model = decoder_models.random_model()
logits = Decoder(model, 2).forward([1, 2, 3], [0] * 3, range(3), KVCache(model, 1, 3))
print(*before, "numba" in sys.modules, logits.tobytes().hex())
"""


def start(**environment):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parent,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def words(process):
    out, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    return out.split(), errors


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A folder with the files of this machine, as the only ones; nothing is loaded yet."""
    library.load()
    for part in library.PARTS:
        (tmp_path / f"{part}.bin").write_bytes((library.cache_folder() / f"{part}.bin").read_bytes())
    monkeypatch.setattr(library, "cache_folder", lambda: tmp_path)
    library._kept.cache_clear()
    yield tmp_path
    library._kept.cache_clear()


compiled_only = pytest.mark.skipif(not library.COMPILED, reason="nothing is compiled")


@compiled_only
def test_a_second_process_compiles_nothing_and_does_not_import_numba():
    library.load()
    (numba, logits), errors = words(start())
    assert numba == "False"
    assert not errors
    model = random_model()
    want = Decoder(model).forward([1, 2, 3], [0] * 3, range(3), KVCache(model, 1, 3))
    assert bytes.fromhex(logits) == want.tobytes()


@compiled_only
@pytest.mark.slow
@pytest.mark.parametrize("kv_cache", ["fp32", "bf16", "int8"])
def test_it_computes_what_numba_computes(monkeypatch, kv_cache):
    def logits(threads):
        cache = KVCache(model, 2, 60, kv_cache)
        prompt = decoder.forward(ids, [1] * 40, range(40), cache, [7, 39])
        return np.concatenate([prompt, decoder.forward([3, 4], [0, 1], [0, 40], cache)])

    ids = np.random.default_rng(0).integers(0, 20, 40)
    for ternary, table in (("2bit", "int8"), ("base3", "int4"), ("base3", "fp16"), ("2bit", "base3")):
        model = random_model(vocabulary=20, ternary=ternary, table=table)
        decoder = Decoder(model, 2)
        linked = logits(2)
        decoder = Decoder(model)
        monkeypatch.setattr(decoder, "_compiled", library._from_sources())
        np.testing.assert_array_equal(logits(1).view(np.int32), linked.view(np.int32))


@compiled_only
@pytest.mark.slow
def test_processes_that_start_together_compile_once(tmp_path):
    answers = [words(process)[0] for process in [start(XDG_CACHE_HOME=str(tmp_path)) for _ in range(3)]]
    assert sorted(len(answer) for answer in answers) == [2, 2, 3]
    assert len({answer[-1] for answer in answers}) == 1
    assert {answer[-2] for answer in answers} == {"False"}


@compiled_only
@pytest.mark.parametrize("damage", [lambda content: content[:-7], lambda content: b"", lambda content: b"\xff" * 99])
def test_a_damaged_file_is_said_and_made_again(kept, monkeypatch, damage):
    whole = (kept / "step.bin").read_bytes()
    (kept / "step.bin").write_bytes(damage(whole))
    monkeypatch.setattr(library, "_compiled", lambda parts, folder: [whole.partition(b"\n")[2] for _ in parts])
    said = []
    with pytest.warns(RuntimeWarning, match="is damaged: the kernels are compiled again"):
        compiled = library.load(lambda: said.append("compiling"))
    assert said == ["compiling"]
    assert compiled.padded(17) == 32
    assert (kept / "step.bin").read_bytes() == whole


@compiled_only
def test_a_compiler_that_fails_is_heard(kept, monkeypatch):
    (kept / "step.bin").unlink()
    monkeypatch.setattr(library, "_PROGRAM", "import sys; sys.exit('no space left')")
    with pytest.raises(RuntimeError, match=r"compiling step ended with 1:\nno space left"):
        library.load()
    assert sorted(path.name for path in kept.iterdir()) == ["products.bin", "step.lock"]
    monkeypatch.setattr(library.sys, "executable", None)
    with pytest.raises(UserError, match="a Python interpreter"):
        library.load()


@compiled_only
def test_a_call_that_another_thread_ended_raises():
    model = random_model()
    decoder = Decoder(model)
    decoder.forward([1], [0], [0], KVCache(model, 1, 1))
    memory = np.zeros((LINES + LINE) // 8, np.int64)
    state = memory.ctypes.data + -memory.ctypes.data % LINE
    store_word(state + ABORTED, 1)
    with pytest.raises(RuntimeError, match="another thread of this call failed"):
        library.load().enter(state, 0, 2, 0, *decoder._addresses)


@compiled_only
def test_calls_that_nobody_answers_are_refused(kept):
    content = (kept / "step.bin").read_bytes().partition(b"\n")[2]
    assert b'"sched_yield"' in content
    with pytest.raises(RuntimeError, match="compiled kernels call sched_field, which no library of this process has"):
        library._linked({"step": content.replace(b'"sched_yield"', b'"sched_field"', 1)})


def test_forked_processes_have_it():
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    padded = library.load().padded
    child = os.fork()
    if child == 0:
        os._exit(padded(33))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 48


def with_blocks(model):
    """The model with a scale for each 32 columns of its activations."""
    layers = [
        replace(layer, **{name: replace(getattr(layer, name), act_blocks=True) for name in records.PROJECTIONS})
        for layer in model.layers
    ]
    return replace(model, layers=layers)


@compiled_only
def test_products_with_scales_of_groups_are_compiled_when_a_model_has_them(kept):
    """And a step without them that meets such a model ends the process, in place of a result that is wrong."""
    plain = random_model()
    grouped = with_blocks(plain)
    Decoder(plain).forward([1], [0], [0], KVCache(plain, 1, 1))
    assert not (kept / "grouped.bin").exists()
    Decoder(grouped).forward([1], [0], [0], KVCache(grouped, 1, 1))
    assert (kept / "grouped.bin").exists()
    assert library.load() is library.load(grouped=True)
    script = """
from decoder_models import random_model
from test_cpu_library import Decoder, KVCache, with_blocks
model = with_blocks(random_model())
type(model).grouped = False
Decoder(model).forward([1], [0], [0], KVCache(model, 1, 1))
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True)
    assert ended.returncode == -signal.SIGABRT, ended


@compiled_only
@pytest.mark.slow
def test_what_makes_numba_quicker_changes_no_byte(tmp_path):
    for name, before in (("quick", ""), ("slow", "linking.compile_quickly = linking._leave_out_passes = int\n")):
        script = f"import sys\nfrom bitdistill.kernels.cpu import linking\n{before}linking.write_part('grouped', sys.argv[1])"
        subprocess.run([sys.executable, "-c", script, str(tmp_path / name)], check=True)
    assert (tmp_path / "quick").read_bytes() == (tmp_path / "slow").read_bytes()
