"""How long a stage will take is said once, from its first steps."""

from types import SimpleNamespace

import pytest

from bitdistill.training import progress_bar
from bitdistill.training.progress_bar import in_words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (3600, "60 min"),
        (5400, "1.5 h"),
        (86400, "24.0 h"),
        (2e5, "2.3 days"),
    ],
)
def test_durations_in_words(seconds, words):
    assert in_words(seconds) == words


@pytest.mark.parametrize(("already_done", "said"), [(0, "about 10 min to go"), (40, "about 6 min to go")])
def test_a_stage_is_foretold_from_its_second_to_fourth_step(monkeypatch, capsys, already_done, said):
    clock = [0.0]
    monkeypatch.setattr(progress_bar.time, "perf_counter", lambda: clock[0])
    bar, state = progress_bar.ProgressBar("pretrain"), SimpleNamespace(max_steps=104, global_step=already_done)
    bar.on_train_begin(None, state, None)
    clock[0] = 500.0  # the first step compiles
    for _ in range(8):
        state.global_step += 1
        bar.on_step_end(None, state, None)
        clock[0] += 6.0
    bar.on_train_end(None, state, None)
    lines = [line for line in capsys.readouterr().out.splitlines() if "to go" in line]
    assert len(lines) == 1
    assert f"pretrain: 104 steps, {said} on this machine" in lines[0]


def test_a_stage_of_a_few_steps_is_not(capsys):
    bar, state = progress_bar.ProgressBar("distill"), SimpleNamespace(max_steps=4, global_step=0)
    bar.on_train_begin(None, state, None)
    for _ in range(4):
        state.global_step += 1
        bar.on_step_end(None, state, None)
    bar.on_train_end(None, state, None)
    assert "to go" not in capsys.readouterr().out
