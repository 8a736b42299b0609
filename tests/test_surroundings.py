"""Where it runs: quotas of CPUs, launchers, homes, consoles, closed pipes, arguments and paths of every kind."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from test_runtime import byte_tokenizer

from bitdistill import console, cpus, folders, preflight_checks
from bitdistill.command_line import parse_config
from bitdistill.distributed import process_group
from bitdistill.errors import UserError
from bitdistill.export.write import write_packed
from tiny_students import student

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for room in ("bitdistill", "distributed", "kernels") for path in (ROOT / room).rglob("*.py"))
V2, V1 = "0::/", "4:cpu,cpuacct:/"
GROUPS = "/sys/fs/cgroup"


def quota(folder, limit, period=100000):
    return {f"{folder}/cpu.max": f"{limit} {period}"}


def quota_v1(folder, limit, period=100000):
    return {f"{folder}/cpu.cfs_quota_us": str(limit), f"{folder}/cpu.cfs_period_us": str(period)}


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        (V2, {}, 64),
        (None, {}, 64),  # no /proc
        (V2, quota(GROUPS, "max"), 64),
        (V2, quota(GROUPS, 200000), 2),
        (V2, quota(GROUPS, 250000), 2),
        (V2, quota(GROUPS, 50000), 1),  # half a CPU
        (V2, quota(GROUPS, 10000000), 64),  # more than there are
        (V2, quota(GROUPS, 300000, 50000), 6),
        (V2, quota(GROUPS, "nonsense"), 64),
        (V2, quota(GROUPS, 200000, 0), 64),
        (f"{V2}a.slice/b.service", quota(f"{GROUPS}/a.slice/b.service", 300000), 3),
        (f"{V2}a.slice/b.service", quota(f"{GROUPS}/a.slice", 200000) | quota(f"{GROUPS}/a.slice/b.service", "max"), 2),
        (f"{V2}a/b/c", quota(f"{GROUPS}/a", 500000) | quota(f"{GROUPS}/a/b/c", 400000), 4),
        (f"{V2}../../b", quota(f"{GROUPS}/b", 300000), 3),
        (f"{V2}docker/5e4", quota(GROUPS, 200000), 2),  # the host's path, seen in a container
        (V1, quota_v1(f"{GROUPS}/cpu", 200000), 2),
        (V1, quota_v1(f"{GROUPS}/cpu,cpuacct", 200000), 2),
        (V1, quota_v1(f"{GROUPS}/cpu", -1), 64),
        (f"{V1}docker/5e4", quota_v1(f"{GROUPS}/cpu/docker/5e4", 300000), 3),
        (f"{V1}docker/5e4", quota_v1(f"{GROUPS}/cpu", 300000), 3),
        (f"4:memory:/\n3:cpu:/x\n{V2}", quota_v1(f"{GROUPS}/cpu/x", 700000), 7),
        (f"{V1}\n{V2}y", quota(f"{GROUPS}/unified/y", 700000), 7),
    ],
)
def test_a_quota_of_cpus_is_found(monkeypatch, group, files, expected):
    if group is not None:
        files = files | {"/proc/self/cgroup": group}
    monkeypatch.setattr(cpus, "read_lines", lambda path: files.get(str(path), "").splitlines())
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    assert cpus.available_cpus() == expected


def memory(folder, limit, used, copies=0, names=("memory.max", "memory.current", "inactive_file")):
    return {
        f"{folder}/{names[0]}": limit,
        f"{folder}/{names[1]}": used,
        f"{folder}/memory.stat": f"x 1\n{names[2]} {copies}",
    }


MEMORY_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        (V2, {}, 64 * 1024),
        (V2, memory(GROUPS, "max", "9000"), 64 * 1024),
        (V2, memory(GROUPS, "9000", "2000"), 7000),
        (V2, memory(GROUPS, "9000", "8000", copies=6000), 7000),  # a model file was read: the system gives that back
        (V2, memory(GROUPS, "9000", "9500"), 0),
        (f"{V2}slurm/job_1", memory(GROUPS, "max", "1") | memory(f"{GROUPS}/slurm/job_1", "9000", "2000"), 7000),
        (f"{V2}slurm/job_1", memory(f"{GROUPS}/slurm", "5000", "2000"), 3000),
        ("4:memory:/docker/5e4", memory(f"{GROUPS}/memory", "9000", "2000", 100, MEMORY_V1), 7100),
        ("4:memory:/docker/5e4", memory(f"{GROUPS}/memory/docker/5e4", "9000", "2000", 0, MEMORY_V1), 7000),
    ],
)
def test_a_limit_of_memory_is_found(monkeypatch, group, files, expected):
    files = files | {"/proc/self/cgroup": group, "/proc/meminfo": "MemTotal: 99 kB\nMemAvailable: 64 kB"}
    for module in (cpus, preflight_checks):
        monkeypatch.setattr(module, "read_lines", lambda path: files.get(str(path), "").splitlines())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert preflight_checks.free_memory() == expected


def test_nothing_else_counts_cpus():
    for path in SOURCES:
        if path.name != "cpus.py":
            text = path.read_text(encoding="utf-8")
            assert "sched_getaffinity" not in text, path
            assert "cpu_count" not in text, path


def test_torch_and_the_runtime_take_that_count(tmp_path):
    """A rank has its share of the machine's quota, and a runtime all of it."""
    script = (
        "import os; from bitdistill import cpus; cpus.read_lines = lambda path: "
        "['500000 100000'] if str(path) == '/sys/fs/cgroup/cpu.max' else []; os.sched_getaffinity = lambda pid: set(range(64));"
        "from bitdistill.distributed import process_group; import torch, bitdistill.runtime.cpu as cpu;"
        "os.environ |= {'RANK': '0', 'WORLD_SIZE': '1', 'LOCAL_WORLD_SIZE': '2'};"
        "process_group.initialize('cpu'); print(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'], cpu.available_cpus())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split()[-3:] == ["2", "2", "5"]


LAUNCHER = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_LOCALID",
)
MEETING = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def surroundings_of_a_launcher(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.setenv(name, "")  # restored at the end, whatever is set in between
        monkeypatch.delenv(name)
    return lambda variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1)),
        ({"RANK": "3"}, (0, 1)),  # left over from something else
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"} | MEETING, (0, 1)),  # one process per machine: Kubernetes
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_LOCALID": "1"} | MEETING, (1, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"} | MEETING, (1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "", "LOCAL_WORLD_SIZE": "2"} | MEETING, (0, 2)),
    ],
)
def test_variables_of_a_launcher(surroundings_of_a_launcher, variables, place):
    surroundings_of_a_launcher(variables)
    assert process_group._find_place() == place
    assert os.environ["LOCAL_RANK"] == str(place[0])
    assert os.environ["MASTER_PORT"].isdecimal()


@pytest.mark.parametrize(
    ("variables", "field"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"} | MEETING, "RANK"),
        ({"RANK": "one", "WORLD_SIZE": "2"} | MEETING, "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "-1"} | MEETING, "WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"} | MEETING, "LOCAL_RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1"}, "MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "http"}, "MASTER_PORT"),
    ],
)
def test_variables_of_a_launcher_that_do_not_fit(surroundings_of_a_launcher, variables, field):
    surroundings_of_a_launcher(variables)
    with pytest.raises(UserError) as caught:
        process_group._find_place()
    assert caught.value.field == field


@pytest.mark.parametrize(
    "launcher", [["--local_rank=0"], ["--local-rank=0"], ["--local_rank", "0"], ["--local-rank", "0"]]
)
def test_what_a_launcher_puts_before_the_arguments_is_taken_away(launcher):
    assert process_group.without_local_rank([*launcher, "--seed", "0"]) == ["--seed", "0"]
    assert parse_config([*launcher, "--seed", "3"])[0].seed == 3


# --------------------------------------------------------------------------------------------- processes of their own

NOBODY = """
import os, pwd
def unknown(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = unknown
from bitdistill import surroundings
surroundings.prepare()
import getpass, json, warnings
warnings.simplefilter("always")
from bitdistill.kernels.cpu import instructions
names = ("HOME", "HF_DATASETS_CACHE", "MPLCONFIGDIR", "HF_HUB_DISABLE_TELEMETRY")
print(json.dumps({name: os.environ.get(name) for name in names} | {
    "user": getpass.getuser(), "kernels": str(instructions.cache_folder()), "home": os.path.expanduser("~")}))
"""
PERSONAL = (
    "HOME",
    "XDG_CACHE_HOME",
    "USER",
    "LOGNAME",
    "USERNAME",
    "LNAME",
    "HF_HOME",
    "HF_DATASETS_CACHE",
    "MPLCONFIGDIR",
)


def run_as_nobody(tmp_path, **variables):
    kept = {name: value for name, value in os.environ.items() if name not in PERSONAL}
    environment = kept | {"TMPDIR": str(tmp_path)} | variables
    result = subprocess.run([sys.executable, "-c", NOBODY], env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout), result.stderr


def test_no_home_and_no_passwd_entry(tmp_path):
    found, said = run_as_nobody(tmp_path)
    assert "HOME is not set" in said
    for name in ("HOME", "home", "kernels"):
        assert found[name].startswith(str(tmp_path)), name
    assert found["user"].startswith("user-")
    assert found["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_a_home_that_cannot_be_written_to(tmp_path):
    (tmp_path / "home").write_text("a file, so that nothing can be made in it, whoever tries")
    found, said = run_as_nobody(tmp_path, HOME=str(tmp_path / "home"), HF_DATASETS_CACHE=str(tmp_path / "mine"))
    assert "cannot be written to" in said
    assert found["HOME"] == str(tmp_path / "home")
    assert found["HF_DATASETS_CACHE"] == str(tmp_path / "mine")  # the user's own
    for name in ("MPLCONFIGDIR", "kernels"):
        assert found[name].startswith(f"{tmp_path}/bitdistill-"), name


def test_commands_that_train_nothing_say_nothing_of_caches_that_they_do_not_use(tmp_path):
    (tmp_path / "home").write_text("a file, so that nothing can be made in it, whoever tries")
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)}
    said = {}
    for name in ("info", "env"):
        command = [sys.executable, "-m", "bitdistill.cli", name, *(["missing.safetensors"] if name == "info" else [])]
        for variable in PERSONAL[1:]:
            environment.pop(variable, None)
        said[name] = subprocess.run(command, env=environment, capture_output=True, text=True).stderr
    assert "MPLCONFIGDIR" in said["env"]
    assert "MPLCONFIGDIR" not in said["info"]


def test_a_home_of_ones_own_is_left_alone(tmp_path):
    (tmp_path / "home").mkdir()
    found, said = run_as_nobody(tmp_path, HOME=str(tmp_path / "home"), USER="me")
    assert "bitdistill:" not in said
    assert found["user"] == "me"
    assert found["kernels"].startswith(f"{tmp_path}/home/.cache/bitdistill/")
    assert found["MPLCONFIGDIR"] is None


def test_a_private_folder_of_somebody_else_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(folders.tempfile, "tempdir", str(tmp_path))
    own = folders.private_folder()
    assert own == folders.private_folder()
    own.chmod(0o777)
    assert folders.private_folder() != own


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A student over single bytes."""
    model = student("qwen3")
    model.resize_token_embeddings(257, mean_resizing=False)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    path = tmp_path_factory.mktemp("surroundings") / "student.safetensors"
    write_packed(path, model, tokenizer_json=byte_tokenizer().to_str().encode())
    return path


def bitdistill(*arguments, text=b"", **variables):
    command = [sys.executable, "-m", "bitdistill.cli", *arguments]
    return subprocess.run(
        command, input=text, env=os.environ | variables, capture_output=True, check=False, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_every_console_takes_every_character(file, encoding):
    """What a console has no character for is escaped; JSON lines stay JSON."""
    options = ["--max_new_tokens", "6", "--threads", "1", "--temperature", "2"]
    variables = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    result = bitdistill(
        "generate", str(file), "--prompts_file", "-", *options, text="Größe 漢字\n".encode(), **variables
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.decode(encoding))["prompt"] == "Größe 漢字"
    refused = bitdistill("generate", "漢字".encode(), "x", **variables)
    assert refused.returncode == 2
    assert b"Traceback" not in refused.stderr


@pytest.mark.slow
def test_a_reader_that_has_gone_ends_it_quietly(file):
    command = [
        sys.executable,
        "-m",
        "bitdistill.cli",
        "generate",
        str(file),
        "abc",
        "--max_new_tokens",
        "50",
        "--threads",
        "1",
    ]
    for arguments in (command, [sys.executable, "-m", "bitdistill.cli", "env"]):
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            process.stdout.close()
            said = process.stderr.read().decode()
            assert process.wait() == 141, said
        assert "Traceback" not in said
        assert "BrokenPipe" not in said


def test_output_that_is_closed_from_the_start(tmp_path):
    """`>&-`: what is printed does not end up in the next file that is opened."""
    script = (
        "import os; from bitdistill import console\n"
        "def body():\n"
        "    file = open('result.txt', 'w', encoding='utf-8')\n"
        "    print('hello', flush=True); os.write(1, b'from a library'); file.write('ours')\n"
        "raise SystemExit(console.run(body))"
    )
    command = f'exec {sys.executable} -c "$SCRIPT" >&-'
    result = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=os.environ | {"SCRIPT": script, "PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 0
    assert (tmp_path / "result.txt").read_text() == "ours"


@pytest.mark.parametrize("place", ["before", "inside", "after"])
def test_ctrl_c_is_quiet_from_the_first_line_to_the_last(place):
    script = (
        "import os, signal, sys; from bitdistill import console\n"
        "console.end_at_once()\n"
        "interrupt = lambda place: os.kill(os.getpid(), signal.SIGINT) if sys.argv[1] == place else None\n"
        "interrupt('before')\n"
        "status = console.run(lambda: interrupt('inside'))\n"
        "interrupt('after'); print('not reached' if status == 0 else ''); raise SystemExit(status)"
    )
    done = subprocess.run([sys.executable, "-c", script, place], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (130, "", "")


def test_exit_statuses(capsys):
    def body(error):
        def run():
            raise error

        return run

    assert console.run(lambda: None) == 0
    assert console.run(lambda: 7) == 7
    assert console.run(body(KeyboardInterrupt())) == 130
    assert console.run(body(UserError("seed", expected="x", got="two\nlines \x1b[31m", do="Set it."))) == 2
    assert capsys.readouterr().err == "bitdistill: seed: expected x; got two lines \\x1b[31m. Set it.\n"
    assert console.run(body(OSError(28, "No space left on device", "run/a.json"))) == 2
    assert capsys.readouterr().err.startswith(
        "bitdistill: run/a.json: expected a system that allows it; got No space left"
    )
    assert console.run(body(MemoryError())) == 2
    for defect in (OSError(2, "No such file", "x"), ValueError("x"), BrokenPipeError(32, "x")):
        if not isinstance(defect, BrokenPipeError):
            with pytest.raises(type(defect)):
                console.run(body(defect))


def test_an_absurdly_long_message_is_cut():
    line = console.one_line("a" * 10**6 + " end.")
    assert len(line) < 5000
    assert line.endswith(" end.")


@pytest.mark.parametrize("option", ["prompt", "stop"])
def test_arguments_that_are_not_utf8(file, option):
    arguments = [b"caf\xe9"] if option == "prompt" else [b"x", b"--stop", b"\xe9"]
    result = bitdistill(b"generate", str(file).encode(), *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"bitdistill: {option}: expected text in UTF-8; got ".encode())
    assert b"\\xe9" in result.stderr


def test_libraries_of_training_that_are_missing_are_all_named():
    """Also those that only the report at the end needs; and what needs no torch does without it."""
    script = (
        "import importlib.util, runpy, sys; found = importlib.util.find_spec; gone = ('torch', 'matplotlib')\n"
        "importlib.util.find_spec = lambda name, *rest: None if name in gone else found(name, *rest)\n"
        "sys.modules['torch'] = None; sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__')"
    )

    def call(*arguments):
        command = [sys.executable, "-c", script, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)

    refused = call("bitdistill.train", "--stage", "check")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1] == (
        "bitdistill: command line: expected the libraries that training needs; got no torch, matplotlib. "
        "Install them: pip install 'bitdistill[train]'."
    )
    shown = call("bitdistill.cli", "env")
    assert shown.returncode == 0, shown.stderr
    assert "no torch" in shown.stdout


def test_settings_that_are_not_utf8():
    with pytest.raises(UserError, match=r"command line: expected text in UTF-8; got --output_dir=caf\\xe9"):
        parse_config(["--output_dir=caf\udce9"])


# --------------------------------------------------------------------------------------------- paths


def test_settings_mean_the_same_wherever_they_are_read(tmp_path, monkeypatch):
    """config.yaml of a run that was started with relative paths, and with ~."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "base").mkdir(parents=True)
    (tmp_path / "start" / "[v2] data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "start")
    for name in ("rows.jsonl", "task.yaml", "[v2] data/a.txt"):
        Path(name).write_text("x")
    arguments = ["--model", "~/base", "--task=task.yaml", "--train_file=rows.jsonl", "--corpus", "[v2] data/a.txt"]
    arguments += ["--extra_validation_files.other", "rows.jsonl", "--output_dir", "~/run"]
    _, text = parse_config(arguments)
    settings = yaml.safe_load(text)
    assert settings["model"] == str(tmp_path / "home" / "base")
    assert settings["output_dir"] == str(tmp_path / "home" / "run")
    assert settings["corpus"] == str(tmp_path / "start" / "[v2] data" / "a.txt")
    for given in (settings["task"], settings["train_file"], settings["extra_validation_files"]["other"]):
        assert Path(given).is_absolute()
        assert Path(given).is_file()
    (tmp_path / "home" / "config.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert parse_config(["--config", "home/config.yaml"])[1] == text
    assert parse_config(["--config", "~/config.yaml"])[1] == text


def test_names_that_are_no_paths_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sst2").mkdir()
    config, _ = parse_config(["--model", "Qwen/Qwen3-0.6B", "--task", "sst2", "--corpus", "tiiuae/falcon-refinedweb"])
    assert (config.model, config.task, config.corpus) == ("Qwen/Qwen3-0.6B", "sst2", "tiiuae/falcon-refinedweb")


def test_a_result_that_cannot_be_written_is_said_first(tmp_path):
    """Before anything is read: neither the file nor the rows are there."""
    (tmp_path / "file").write_text("kept")
    for place in (tmp_path / "no" / "out.json", tmp_path, tmp_path / "file" / "out.json"):
        result = bitdistill("eval", str(tmp_path / "nowhere"), "--task", "sst2", "--json_file", str(place))
        assert result.returncode == 2
        assert result.stderr.startswith(b"bitdistill: json_file: expected a file that can be written"), result.stderr
    assert (tmp_path / "file").read_text() == "kept"


def test_text_files_are_utf8_on_every_system():
    """A text file is opened with its encoding: the locale's would be ASCII in a container and cp1252 on Windows."""
    missing = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and opens_text_without_encoding(node):
                missing.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not missing


def opens_text_without_encoding(call):
    method = isinstance(call.func, ast.Attribute)
    name = call.func.attr if method else getattr(call.func, "id", "")
    if any(keyword.arg in ("encoding", None) for keyword in call.keywords):
        return False
    if name in ("read_text", "write_text"):
        return method
    if name != "open" or (method and ast.unparse(call.func.value) in ("os", "self", "gzip", "bz2", "lzma", "Image")):
        return False
    modes = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    return not any(isinstance(mode, str) and "b" in mode and len(mode) <= 3 for mode in modes)
