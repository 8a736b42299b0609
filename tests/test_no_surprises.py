"""What nobody asked for does not happen: no network, no unpickling, no code of a model's, no tokens in files, no telemetry."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitdistill import console, surroundings
from bitdistill.command_line import parse_config
from bitdistill.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for room in ("bitdistill", "distributed", "kernels") for path in (ROOT / room).rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
# Imported by a process that is to be watched: connections are refused and noted, and so is who unpickles a class.
WATCH = """
import os, sys

def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        line = f"network {event} {arguments[-1]!r}"
    elif event == "pickle.find_class":
        frame = sys._getframe(1)
        while frame.f_back and frame.f_globals.get("__name__", "").startswith(("pickle", "_pickle", "numba.core.serialize")):
            frame = frame.f_back
        line = f"pickle {frame.f_globals.get('__name__')} {arguments!r}"
    else:
        return
    with open(os.environ["WATCHED"], "a", encoding="utf-8") as file:
        print(line, file=file)
    if line.startswith("network"):
        raise PermissionError("the network is closed")

sys.addaudithook(note)
"""
MAY = ("harness.py",)  # names an exception of requests; lm-evaluation-harness downloads what --lm_eval asks for
DEMO = [
    "--max_steps",
    "2",
    "--evaluate.max_rows",
    "20",
    "--evaluate.weight_only",
    "false",
    "--export.speed_tokens",
    "0",
]
DEMO += ["--baseline.enabled", "false", "--export.proof_rows", "1", "--report_to", "[tensorboard]"]
TOKEN = "hf_" + "aBcDeFgHiJ" * 3 + "kLmN"


def calls(*names: str):
    """(file and line, call) of every call of a function or method of one of these names."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in names:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(one.value) for one in call.keywords if one.arg == name), None)


def test_nothing_in_the_source_unpickles():
    """Numba keeps its machine code by pickle, in the user's own cache alone; nothing of ours reads a pickle. DeepSpeed's
    checkpoints are read with `weights_only=True`, which makes tensors and nothing that a file names."""
    wrong = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            taken = {name.split(".")[0] for name in names} & {
                "pickle",
                "joblib",
                "dill",
                "cloudpickle",
                "shelve",
                "marshal",
            }
            wrong += [f"{path.relative_to(ROOT)}:{node.lineno} imports {name}" for name in taken]
    wrong += [place for place, call in calls("load") if "allow_pickle=True" in ast.unparse(call)]
    wrong += [
        place
        for place, call in calls("load")
        if ast.unparse(call.func) == "torch.load" and keyword(call, "weights_only") != "True"
    ]
    wrong += [
        place
        for place, call in calls("load", "load_all")
        if ast.unparse(call.func) == "yaml.load" and len(call.args) < 2
    ]
    wrong += [place for place, call in calls("unsafe_load", "full_load", "read_pickle", "eval", "exec", "system") if
              ast.unparse(call.func) in ("yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system")
              or ast.unparse(call.func).endswith("read_pickle")]  # fmt: skip
    assert not wrong, wrong


def test_models_are_opened_without_code_of_theirs():
    """Every Auto class says so itself; the rest is read as the class that it names."""
    opened = list(calls("from_pretrained", "from_config"))
    assert len(opened) > 8
    for place, call in opened:
        if ast.unparse(call.func).startswith("Auto"):
            said = ast.unparse(call)
            assert "trust_remote_code=False" in said or "**FROM_DISK" in said or "from_config" in said, place
    assert not [place for place, call in calls("from_pretrained") if keyword(call, "trust_remote_code") == "True"]
    assert not [place for place, call in calls("run", "Popen", "check_output") if keyword(call, "shell") == "True"]


def test_nothing_in_the_source_opens_a_connection_by_itself():
    clients, wrong = {"requests", "urllib.request", "http.client", "httpx", "aiohttp", "ftplib"}, []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            taken = clients & set(names)
            wrong += [f"{path.relative_to(ROOT)}: {name}" for name in taken if path.name not in MAY]
    assert not wrong


class Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_library_that_unpickles_is_refused(tmp_path):
    """transformers loads optimizer states with weights_only, DeepSpeed without; an entry sets it for both."""
    torch.save({"state": Evil(tmp_path / "was here")}, tmp_path / "optimizer.pt")
    script = (
        "from bitdistill import surroundings; surroundings.prepare(); import sys, torch\n"
        "try:\n    torch.load(sys.argv[1], weights_only=False)\n"
        "except Exception as error:\n    print(type(error).__name__)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "optimizer.pt")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["UnpicklingError"]
    assert not (tmp_path / "was here").exists()


def test_no_telemetry(monkeypatch):
    for name in surroundings.SILENT:
        monkeypatch.delenv(name, raising=False)
    surroundings.prepare()
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == os.environ["DO_NOT_TRACK"] == "1"


@pytest.mark.parametrize(
    "value", [f"https://me:{TOKEN}@host/a", f"https://{TOKEN}@hub/a", f"{TOKEN}", "https://me:pw@host/a"]
)
@pytest.mark.parametrize("place", ["command line", "file"])
def test_settings_hold_no_secret(tmp_path, value, place):
    (tmp_path / "mine.yaml").write_text(f"teacher: {{model: '{value}'}}\n")
    given = ["--teacher.model", value] if place == "command line" else ["--config", str(tmp_path / "mine.yaml")]
    with pytest.raises(UserError, match=r"no token or password.*\*\*\*.*HF_TOKEN") as error:
        parse_config(given)
    assert TOKEN not in str(error.value)
    assert ":pw" not in str(error.value)


def test_messages_hold_no_secret(capsys):
    console.complain(UserError("model", expected="x", got=f"https://me:secret@host/a and {TOKEN}", do="Look."))
    assert capsys.readouterr().err == "bitdistill: model: expected x; got https://***@host/a and ***. Look.\n"
    assert console.one_line("a@b.c, hf_short, https://host/a@1") == "a@b.c, hf_short, https://host/a@1"


@pytest.mark.slow
def test_the_demo_without_a_network(tmp_path):
    """All stages with every connection refused and a token in the environment: none is tried, nothing of ours is unpickled,
    and the token is in no file and no line."""
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    environment |= {"PYTHONPATH": str(tmp_path), "WATCHED": str(tmp_path / "watched"), "HF_TOKEN": TOKEN}
    environment |= {"HF_HOME": str(tmp_path / "hub")}
    command = [sys.executable, str(ROOT / "bitdistill" / "train.py"), "--output_dir", str(tmp_path / "run"), *DEMO]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run/report.html").is_file()
    watched = (tmp_path / "watched").read_text().splitlines() if (tmp_path / "watched").is_file() else []
    assert not [line for line in watched if line.startswith("network")]
    assert {line.split()[1].split(".")[0] for line in watched} <= {"numba"}, "its cache of machine code"
    assert TOKEN not in done.stdout + done.stderr
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert json.loads((tmp_path / "run/versions.json").read_text())["bitdistill"]
