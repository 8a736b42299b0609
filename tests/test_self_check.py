"""The self-check: wrong, failing and crashing kernels are not used, and that is said; right ones are remembered; the choice
by hand."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bitdistill.kernels import vocabulary
from bitdistill.kernels.cpu import bit_linear, training_products, vocabulary_rows
from bitdistill.student import backend, self_check

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A machine that has checked nothing, and a process that has chosen nothing."""
    monkeypatch.setattr(self_check, "_file", lambda: tmp_path / "self_check.json")
    monkeypatch.setattr(training_products, "_left_out", set())
    backend.choose_kernels("auto")
    yield tmp_path / "self_check.json"
    backend.choose_kernels("auto")


@pytest.fixture
def answers(monkeypatch):
    """What the process of the checks says, in place of starting it; and how often it was asked."""
    asked = []

    def give(problems):
        def ask(device):
            asked.append(device)
            return dict.fromkeys(self_check.checks_of(device)) | problems

        monkeypatch.setattr(self_check, "_ask", ask)
        return asked

    return give


def broken(name, damage):
    """`bit_linear` with one function damaged."""
    return type("Broken", (), {**vars(bit_linear), name: staticmethod(damage(getattr(bit_linear, name)))})


@pytest.mark.parametrize("check", self_check.checks_of(CPU))
def test_the_kernels_of_this_machine_are_right(check):
    self_check.checks_of(CPU)[check](bit_linear, CPU)


@pytest.mark.parametrize(
    ("check", "name", "damage"),
    [
        ("quantize_input", "quantize_input", lambda f: lambda x: bit_linear.Activation(f(x)[0] | 1, f(x)[1])),
        ("quantize_input", "quantize_input", lambda f: lambda x: bit_linear.Activation(f(x)[0], f(x)[1] * (1 + 2e-7))),
        ("ternarize", "ternarize", lambda f: lambda weights: f([2 * weights[0] + 0.01])),
        ("norm_quantize_input", "norm_quantize_input", lambda f: lambda x, gain, eps: f(x, gain, eps + 0.1)),
        ("gated_quantize_input", "gated_quantize_input", lambda f: lambda g, u, *rest: f(u, g, *rest)),
        ("ternary_linear", "ternary_linear", lambda f: lambda x, *rest: f(x, *rest) + 1e-6),
        ("gradients exact", "ternary_linear", lambda f: lambda x, *rest: f(x, *rest) * 1.001),
        ("gradients fast", "ternary_linear", lambda f: lambda x, *rest: f(x, *rest) * 1.1),
        ("gradients fast", "ternary_linear", lambda f: lambda x, *rest: f(x, *rest) * float("nan")),
    ],
)
def test_every_check_notices(check, name, damage):
    with pytest.raises(AssertionError, match=r"differ from the reference|relative error"):
        self_check.checks_of(CPU)[check](broken(name, damage), CPU)


@pytest.mark.parametrize("method", training_products.METHODS)
def test_a_wrong_product_is_noticed(method, monkeypatch):
    right = training_products.METHODS[method]
    monkeypatch.setitem(training_products.METHODS, method, lambda *work: (right(*work), work[3].view(-1)[7].add_(1)))
    with pytest.raises(AssertionError, match=r"1 of .* values differ"):
        self_check.checks_of(CPU)[f"product {method}"](bit_linear, CPU)


@pytest.mark.parametrize("name", ["dense_rows_", "rest_rows_"])
def test_wrong_losses_over_the_vocabulary_are_noticed(name, monkeypatch):
    right = getattr(vocabulary_rows, name)

    def slightly_wrong(z, *others):
        results = right(z, *others)
        z[0, 0] += 1e-3
        return results

    monkeypatch.setattr(vocabulary_rows, name, slightly_wrong)
    with pytest.raises(AssertionError, match=r"gradient: relative error"):
        self_check.checks_of(CPU)[self_check.VOCABULARY](bit_linear, CPU)


def test_right_kernels_are_used_and_the_answer_is_kept(answers, fresh, capsys):
    asked = answers({})
    for _ in range(2):
        assert backend.kernels_for(CPU) is bit_linear
        backend.kernels_for.cache_clear()  # as in another process
    assert len(asked) == 1
    assert set(json.loads(fresh.read_text())) == {self_check.machine(CPU)}
    assert "once per machine" in capsys.readouterr().out
    fresh.write_text("broken")
    backend.kernels_for.cache_clear()
    assert backend.kernels_for(CPU) is bit_linear
    assert len(asked) == 2


def test_a_wrong_kernel_is_not_used_and_named(answers, capsys):
    answers({"ternarize": "AssertionError: scale: 1 of 1 values differ from the reference"})
    assert backend.kernels_for(CPU) is None
    said = capsys.readouterr().out
    assert "ternarize (AssertionError: scale" in said
    assert "plain PyTorch" in said
    count = len(self_check.checks_of(CPU))
    assert (
        f"{count - 1} of {count} checks against PyTorch hold; not: ternarize ("
        in backend.kernel_states()["cpu kernels"]
    )


def test_a_wrong_product_leaves_the_other(answers, capsys):
    answers({"product tiles": "ended its process (exit status -11)"})
    assert backend.kernels_for(CPU) is bit_linear
    assert "product tiles (ended its process" in capsys.readouterr().out
    assert training_products.possible() == ["onednn"]


def test_wrong_losses_over_the_vocabulary_are_left_out_alone(answers, capsys):
    answers({self_check.VOCABULARY: "AssertionError: KL: relative error 1.0e+00, at most 1e-05 expected"})
    assert backend.kernels_for(CPU) is bit_linear
    said = capsys.readouterr().out
    assert "losses over the vocabulary (AssertionError: KL" in said
    assert "run on plain PyTorch" in said
    assert vocabulary._row_functions(CPU, torch.float32)[0] is not vocabulary_rows.dense_rows_
    backend.choose_kernels("auto")
    assert backend.kernels_for(CPU) is bit_linear  # the answer is kept: still left out
    assert vocabulary._row_functions(CPU, torch.float32)[0] is not vocabulary_rows.dense_rows_


def test_wrong_attention_is_left_out_alone(answers, capsys, monkeypatch):
    monkeypatch.setattr(backend._Chosen, "attention", True)
    answers({self_check.ATTENTION: "AssertionError: dQ: relative error 1.0e+00, at most 1e-05 expected"})
    assert backend.kernels_for(CPU) is bit_linear
    assert not backend.attention_is_right()
    assert "attention (AssertionError: dQ" in capsys.readouterr().out


def test_without_a_product_for_every_shape_pytorch_does_it(answers):
    answers({"product onednn": "AssertionError: forward: 3 of 9 values differ from the reference"})
    assert backend.kernels_for(CPU) is None


def test_another_machine_or_source_is_checked_anew(monkeypatch):
    before = self_check.machine(CPU)
    assert before == self_check.machine(CPU)
    with monkeypatch.context() as patch:
        patch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
        assert self_check.machine(CPU) != before
    with monkeypatch.context() as patch:
        patch.setattr(self_check.importlib.metadata, "version", lambda library: "99")
        assert self_check.machine(CPU) != before
    monkeypatch.setattr(self_check.Path, "read_bytes", lambda path: b"another source")
    assert self_check.machine(CPU) != before


def test_the_reference_by_hand(answers):
    asked = answers({})
    backend.choose_kernels("reference")
    assert backend.kernels_for(CPU) is None
    assert vocabulary._row_functions(CPU, torch.float32)[0] is not vocabulary_rows.dense_rows_
    backend.choose_kernels("auto")
    assert backend.kernels_for(CPU) is bit_linear
    assert vocabulary._row_functions(CPU, torch.float32)[0] is vocabulary_rows.dense_rows_
    assert len(asked) == 1


CRASHING = """
import json, os, signal, sys
from bitdistill.student import self_check
checks = self_check.checks_of
def damaged(device):
    found = checks(device)
    found["ternarize"] = lambda kernels, device: os.kill(os.getpid(), signal.SIGSEGV)
    found["quantize_input"] = lambda kernels, device: 1 / 0
    return found
self_check.checks_of = damaged
if __name__ == "__main__":
    import torch
    self_check._run(torch.device(sys.argv[1]), sys.argv[2:])
"""


@pytest.mark.parametrize(("device", "cpus", "processes"), [("cpu", 1, 1), ("cpu", 2, 2), ("cuda", 2, 1)])
def test_every_check_is_made_once_by_as_many_processes_as_there_are_cpus(device, cpus, processes, monkeypatch):
    device, shares = torch.device(device), []
    monkeypatch.setattr(self_check, "available_cpus", lambda: cpus)
    monkeypatch.setattr(self_check, "_ask_about", lambda _, names: shares.append(names) or dict.fromkeys(names))
    names = list(self_check.checks_of(device))
    assert list(self_check._ask(device)) == names
    assert len(shares) == processes
    assert sorted(name for share in shares for name in share) == sorted(names)


@pytest.mark.slow
def test_a_kernel_that_crashes_is_an_answer(monkeypatch, tmp_path):
    """The process dies in the middle; the checks after it are made by another."""
    script = tmp_path / "crashing.py"
    script.write_text(CRASHING)
    end_of = self_check._end_of
    monkeypatch.setattr(self_check, "_end_of", lambda command: end_of([sys.executable, str(script), *command[3:]]))
    found = self_check._ask(CPU)
    assert found["ternarize"] == "ended its process (exit status -11)"
    assert found["quantize_input"] == "ZeroDivisionError: division by zero"
    assert {name for name, problem in found.items() if problem} == {"ternarize", "quantize_input"}
    assert set(found) == set(self_check.checks_of(CPU))


@pytest.mark.slow
def test_a_kernel_that_hangs_is_an_answer(monkeypatch):
    monkeypatch.setattr(self_check, "PATIENCE", 0.5)
    end, out, err = self_check._end_of([sys.executable, "-c", "print('x', flush=True); import time; time.sleep(60)"])
    assert end == "was not done after 0.5 seconds"
    assert (out.strip(), err) == ("x", "")


@pytest.mark.slow
def test_env_shows_the_state():
    command = [sys.executable, "-m", "bitdistill.cli", "env"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True)
    count = len(self_check.checks_of(CPU))
    assert f"cpu kernels    {count} of {count} checks against PyTorch hold" in done.stdout
