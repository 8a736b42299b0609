"""What lies beside an export: a model card that the hub reads, an Ollama Modelfile; and the upload, against a hub of our own."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from test_deliver import run  # noqa: F401 (a fixture)
from test_gguf_file import byte_level

from bitdistill.commands.export import export
from bitdistill.errors import UserError
from bitdistill.export.card import base_license, proof_of_packed, proof_of_tool, upload, write_modelfile

SCORES = {
    "task": "sst2",
    "metric": "accuracy",
    "rows": [
        {"setting": "FP16-SFT", "score": 91.5, "interval": [89.0, 93.2], "examples": 872},
        {"setting": "BitDistill", "score": 90.25, "interval": [88.1, 92.0], "examples": 872},
    ],
}
PROOF = {"tool": "llama-cpp-python 1", "tokens": 90, "mean_kl": 0.0123, "same_top1": 0.97, "perplexity_ratio": 1.01}
PROOF |= {"greedy_tokens": 32, "same_greedy": 0.5, "max_mean_kl": 0.05, "min_same_top1": 0.85}


@pytest.fixture
def scored(run, tmp_path):  # noqa: F811
    """The same with scores, and a base model that states its license."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\n---\n# A base model\n")
    (run / "evaluate" / "scores.json").write_text(json.dumps(SCORES))
    settings = {"model": str(base), "task": "sst2", "corpus": "stories.txt"}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    return run


def test_a_card_beside_a_folder(scored):
    export(str(scored), format="transformers")
    card = ModelCard.load(scored / "export" / "student-transformers" / "README.md")
    assert card.data.license == "mit"
    assert card.data.eval_results[0].metric_value == 90.25
    for text in (
        "stories.txt",
        "| BitDistill | 90.25 | 88.10 to 92.00 | 872 |",
        "norms none",
        "* Base model: base\n",
        "transformers",
        "mean KL",
    ):
        assert text in card.text
    assert (scored / "export" / "student-transformers" / "proof.json").is_file()


def test_a_card_of_a_student_of_its_tasks_rows(scored):
    settings = yaml.safe_load((scored / "config.yaml").read_text())
    (scored / "config.yaml").write_text(yaml.safe_dump(settings | {"corpus": "task"}))
    export(str(scored), format="transformers")
    card = (scored / "export" / "student-transformers" / "README.md").read_text()
    assert "* Text of the continued pre-training: the training rows of sst2\n" in card + "\n"


def test_a_card_and_a_modelfile_beside_a_gguf_file(scored, monkeypatch):
    monkeypatch.setattr("bitdistill.export.deliver.tool_version", lambda format: None)
    export(str(scored), format="gguf", type="q4_0")
    text = (scored / "export" / "student.gguf.README.md").read_text()
    assert "is unproven: llama-cpp-python is not installed" in text
    assert "21 matrices q4_0" in text
    assert "ollama create my-student -f student.gguf.Modelfile" in text
    lines = (scored / "export" / "student.gguf.Modelfile").read_text().splitlines()
    assert lines == [
        "FROM ./student.gguf",
        "PARAMETER temperature 0",
        'PARAMETER stop "<end>"',
        'TEMPLATE "{{ .Prompt }}"',
    ]


def test_a_chat_template_is_left_to_the_gguf_file(tmp_path):
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ messages }}"
    write_modelfile(tmp_path / "Modelfile", "s.gguf", tokenizer)
    assert "TEMPLATE" not in (tmp_path / "Modelfile").read_text()


def test_what_is_not_known_is_said(run):  # noqa: F811
    export(str(run), format="transformers", prove=False)
    text = (run / "export" / "student-transformers" / "README.md").read_text()
    for part in ("not stated by the base model", "It was not evaluated", "unproven: --prove false"):
        assert part in text


@pytest.mark.parametrize("content", ["", "no metadata", "---\nlicense: [1\n---\n", "---\nlicense: {a: b}\n---\n"])
def test_a_license_that_cannot_be_read_is_unknown(tmp_path, content):
    (tmp_path / "README.md").write_text(content)
    assert base_license(str(tmp_path)) is None
    assert base_license("someone/something") is None


def test_proofs_in_words():
    text = proof_of_tool("gguf", PROOF)
    for part in ("llama-cpp-python 1", "0.0123 nats", "97.0 %", "50.0 % of 32"):
        assert part in text
    figures = {"linears": 21, "tokens": 90, "mean_kl": 1e-5, "noise_mean_kl": 2e-5, "same_top1": 1.0}
    assert "all 21 ternary matrices" in proof_of_packed(figures)


class Hub:
    """A hub that keeps what it is given, or refuses it."""

    def __init__(self, error=None):
        self.error, self.repositories, self.commits = error, [], []

    def create_repo(self, repo, private, exist_ok):
        if self.error:
            raise self.error
        self.repositories.append((repo, private))

    def create_commit(self, repo, operations, commit_message):
        self.commits.append((repo, {one.path_in_repo: one.path_or_fileobj for one in operations}))
        return type("Commit", (), {"commit_url": f"https://hub/{repo}/commit/1"})


def test_an_upload_is_one_commit_of_all_files(scored, monkeypatch, capsys):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    export(str(scored), format="gguf", type="q4_0", prove=False, push_to_hub="me/student")
    assert hub.repositories == [("me/student", True)]
    ((repo, files),) = hub.commits
    assert repo == "me/student"
    assert sorted(files) == ["Modelfile", "README.md", "student.gguf"]
    assert "uploaded: https://hub/me/student/commit/1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (HFValidationError("bad name"), "push_to_hub: expected the name of a repository; got me/student"),
        (LocalTokenNotFoundError("the token hf_SECRET is wrong"), "expected an upload to me/student; got LocalToken"),
        (ConnectionError("hf_SECRET"), "got ConnectionError"),
    ],
)
def test_a_refused_upload_is_a_line_without_the_token(scored, monkeypatch, error, match):
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub(error))
    with pytest.raises(UserError, match=match) as caught:
        upload("me/student", {"README.md": scored / "config.yaml"})
    assert "hf_SECRET" not in str(caught.value)
