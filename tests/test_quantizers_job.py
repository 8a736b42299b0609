"""The main job with another quantizer, scales of groups and annealing, from the surgery to the proof of the exported file."""

import json

import pytest
from test_train import job, losses, world  # noqa: F401  (a fixture)

pytestmark = pytest.mark.slow


def test_the_main_job_with_gptq_in_groups_and_annealing(world, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    options = ("--baseline.enabled", "false", "--report", "false", "--export.speed_tokens", "0", "--max_steps", "4")
    quantizer = ("--refine.weight_quantizer", "gptq", "--refine.weight_scale", "group", "--refine.group_size", "64")
    annealing = ("--pretrain.annealing", "linear", "--pretrain.annealing_end", "0.5")
    output = job(world, run, "--stage", "all", *options, *quantizer, *annealing)
    assert "codes of 14 linears equal" in output
    assert [line["annealing"] for line in losses(run, "pretrain").values()] == [0, 0.5, 1, 1]
    assert "annealing" not in losses(run, "distill")[1]
    record = json.loads((run / "distill" / "config.json").read_text())["bitdistill"]
    assert (record["weight_quantizer"], record["weight_scale"], record["group_size"]) == ("gptq", "group", 64)
