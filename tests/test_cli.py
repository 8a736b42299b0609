"""`bitdistill generate` and `bitdistill eval`: options, files, what they print and refuse. Each call is a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_runtime import byte_tokenizer

import bitdistill
import forked
from bitdistill.evaluation.score import text_perplexity
from bitdistill.export.write import write_packed
from bitdistill.runtime.cpu import Runtime
from bitdistill.runtime.sampling import Sampling
from tiny_students import student

CLI = Path(__file__).parent.parent / "bitdistill" / "cli.py"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A student over single bytes."""
    model = student("qwen3")
    model.resize_token_embeddings(257, mean_resizing=False)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    path = tmp_path_factory.mktemp("cli") / "student.safetensors"
    write_packed(path, model, tokenizer_json=byte_tokenizer().to_str().encode())
    return path


def call(*arguments, text=""):
    command = [sys.executable, "-m", "bitdistill.cli", "generate", *map(str, arguments), "--threads", "1"]
    return subprocess.run(command, input=text.encode(), capture_output=True, check=False)


def test_lines_of_a_file(file, tmp_path):
    """In their order, each what it would be alone; blank lines are left out, and that is said."""
    (tmp_path / "prompts.txt").write_bytes("Größe\nab\r\n\n   \nGröße und\n".encode())
    options = ["--max_new_tokens", 9, "--slots", 2, "--temperature", 1.2, "--top_p", 0.9, "--seed", 3, "--stop", "x"]
    options += ["--top_k", 200, "--min_p", 0.01, "--repetition_penalty", 1.1, "--kv_cache", "fp32", "--context", 40]
    result = call(file, "--prompts_file", tmp_path / "prompts.txt", *options)
    assert result.returncode == 0, result.stderr.decode()
    lines = [json.loads(line) for line in result.stdout.decode().splitlines()]
    assert [(line["index"], line["prompt"]) for line in lines] == [(0, "Größe"), (1, "ab"), (2, "Größe und")]
    assert "2 blank lines left out" in result.stderr.decode()
    runtime = Runtime(file, 1, "fp32", 40)
    for line in lines:
        settings = {"temperature": 1.2, "top_p": 0.9, "top_k": 200, "min_p": 0.01, "repetition_penalty": 1.1}
        sampling = Sampling(seed=3 + line["index"], **settings)
        assert line["text"] == "".join(runtime.generate(line["prompt"], 9, sampling, "x"))
        assert line["stopped_by"] == runtime.stats.stopped_by
        assert line["prompt_tokens"] == runtime.stats.prompt_tokens
        assert line["new_tokens"] == runtime.stats.new_tokens
    piped = call(file, "--prompts_file", "-", *options, text="Größe\nab\nGröße und")
    assert piped.stdout == result.stdout


def test_refusals(file, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    for arguments, field in (
        ([file], "prompt"),
        ([file, "x", "--prompts_file", "-"], "prompt"),
        ([file, "--prompts_file", tmp_path / "no.txt"], "prompts_file"),
        ([file, "--prompts_file", tmp_path / "empty.txt"], "prompts_file"),
        ([file, "--prompts_file", tmp_path / "latin.txt"], "prompts_file"),
        ([file, "x", "--top_k", "5"], "temperature"),
        ([tmp_path / "nowhere", "x"], "RUN_OR_FILE"),
        ([file, "x", "--device", "cuda"], "device"),  # with --threads
    ):
        result = call(*arguments)
        message = result.stderr.decode()
        assert result.returncode == 2, message
        assert message.startswith(f"bitdistill: {field}: expected"), message
        assert "Traceback" not in message


def test_a_missing_library_is_named(file):
    script = (
        "import sys; sys.modules['jsonargparse'] = None; from bitdistill.cli import main; "
        "sys.argv = ['bitdistill', 'env']; sys.exit(main())"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "library jsonargparse" in result.stderr
    assert "bitdistill[train]" in result.stderr


def test_no_command_shows_the_commands_and_version_the_version():
    for arguments, beginning in (((), "usage: bitdistill"), (("--version",), f"bitdistill {bitdistill.__version__}\n")):
        result = forked.run([CLI, *arguments], Path.cwd())
        assert (result.code, result.stderr) == (0, "")
        assert result.stdout.startswith(beginning)


def test_train_is_the_main_job(tmp_path):
    """The same settings from the same options, the same refusal, and help that names the command."""
    options = ["--output_dir", tmp_path, "--distill.learning_rate", "3e-4", "--print_config"]
    ours = forked.run([CLI, "train", *options], tmp_path)
    assert ours.code == 0, ours.stderr
    assert "learning_rate: 0.0003" in ours.stdout
    assert ours.stdout == forked.run([CLI.with_name("train.py"), *options], tmp_path).stdout
    refused = forked.run([CLI, "train", "--stage", "chek"], tmp_path)
    assert refused.code == 2
    assert "Did you mean check?" in refused.stderr
    assert forked.run([CLI, "train", "--help"], tmp_path).stdout.startswith("usage: bitdistill train")


def evaluate(*arguments, check=0):
    result = forked.run([CLI, "eval", *arguments, "--threads", "1"], Path.cwd())
    assert result.code == check, result.stderr
    assert "Traceback" not in result.stderr
    return result


def test_eval_scores_splits_and_perplexity(file, tmp_path, monkeypatch):
    """A task of one's own on local rows of two splits; then the perplexity of a text, equal to that of the same logits."""
    task = (
        "kind: classification\nprompt: '{text}:'\ntruncate_column: text\nlabel_column: label\nlabels: {0: no, 1: yes}\n"
    )
    task = task.replace("no, 1: yes", "'no', 1: 'yes'")
    (tmp_path / "mine.yaml").write_text(task + "splits: {train: a, validation: b, validation_other: c}\n")
    rows = [json.dumps({"text": f"row {i}", "label": i % 2}) for i in range(6)]
    (tmp_path / "main.jsonl").write_text("\n".join(rows))
    (tmp_path / "other.jsonl").write_text("\n".join(rows[:4]))
    options = ["--task", tmp_path / "mine.yaml", "--validation_file", tmp_path / "main.jsonl"]
    result = evaluate(file, *options)
    assert "mine: packed accuracy" in result.stdout
    assert "on 6 rows" in result.stdout
    assert "[validation_other is not scored; --extra_validation_files.validation_other FILE adds it]" in result.stderr
    options += ["--extra_validation_files.validation_other", tmp_path / "other.jsonl"]
    result = evaluate(file, *options, "--json_file", tmp_path / "out.json")
    assert "mine, validation_other: packed accuracy" in result.stdout
    scores = json.loads((tmp_path / "out.json").read_text())
    assert (scores["examples"], scores["validation_other"]["examples"]) == (6, 4)
    assert scores["validation_other"]["predictions"] == scores["predictions"][:4]

    runtime = Runtime(file, 1)
    (tmp_path / "text.txt").write_text("boats on a river. " * 20)
    options = ["--perplexity", tmp_path / "text.txt", "--block_size", 60, "--json_file", tmp_path / "out.json"]
    refused = evaluate(file, *options, check=2)  # byte_tokenizer has no end-of-text token, which ends a document
    assert "bitdistill: tokenizer: expected an EOS token" in refused.stderr
    blocks = torch.tensor([[*b"boats on a river. " * 3], [*b"a river with boats" * 3]])
    monkeypatch.setattr("bitdistill.evaluation.score.LOGIT_ROWS", 7)  # in pieces, one after the other
    found = text_perplexity(runtime, blocks, "packed")
    logits = torch.stack([torch.from_numpy(runtime.logits(block[:-1].tolist())) for block in blocks]).double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
    assert found["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert found["tokens"] == blocks.numel() - 2


def test_eval_refusals(file, tmp_path):
    for arguments, message in (
        ([file], "task: expected a task to score it on"),
        ([file, "--setting", "FP16-SFT", "--task", "sst2"], "setting: expected a run directory"),
        ([file, "--perplexity", "a.txt", "--lm_eval", "sst2"], "perplexity: expected --perplexity or --lm_eval"),
        ([tmp_path / "nowhere", "--task", "sst2"], "RUN_OR_FILE"),
    ):
        if "sst2" in arguments and "--lm_eval" not in arguments:
            rows = tmp_path / "rows.jsonl"
            rows.write_text('{"sentence": "a", "label": 0}')
            arguments = [*arguments, "--validation_file", rows]
        assert evaluate(*arguments, check=2).stderr.splitlines()[-1].startswith(f"bitdistill: {message}")
