"""The documents: every relative link leads somewhere, and the maps name what is there."""

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bitdistill import cli
from bitdistill.command_line import explicit_settings

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"[\w/]+\.py\b")


def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    broken = []
    for link in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(link)
    assert not broken


def python_files():
    folders = ("bitdistill", "kernels", "distributed", "bench", "tests")
    return [path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_python_files_exist(page):
    """A file may be named by any end of its path: `losses.py`, `training/losses.py`."""
    if page.name in ("log.md", "CHANGELOG.md"):
        pytest.skip("a history names what was there at the time")
    there = ["/" + path for path in python_files()] + ["/setup.py"]
    named = set(FILE.findall(page.read_text()))
    assert not {name for name in named if not any(path.endswith("/" + name) for path in there)}


def shown_commands():
    """The command lines of the pages and of the list of commands, without the explanations beside them."""
    for page in [page for page in PAGES if page.name != "log.md"] + [ROOT / "bitdistill" / "cli.py"]:
        for line in page.read_text().splitlines():
            command = re.split(r"\s{3,}|\s#", line.removeprefix("    "))[0].strip()
            if re.fullmatch(r"bitdistill [a-z]+( [^:`|]*)?", command):
                yield command


@pytest.mark.parametrize("line", sorted(set(shown_commands())))
def test_shown_commands_have_the_options_that_they_show(line, monkeypatch):
    """Parsed as the command line is, without the work."""
    words = shlex.split(line)[1:]
    if words[0] == "train":
        assert explicit_settings(words[1:])
        return
    ran = []

    def named_only(function):
        @functools.wraps(function)
        def record(*arguments, **options):
            ran.append(function.__name__)

        return record

    monkeypatch.setattr(cli, "COMMANDS", {name: named_only(function) for name, function in cli.COMMANDS.items()})
    cli._run_command(words)
    assert len(ran) == 1


def test_design_names_every_folder_of_the_package():
    folders = {p.name for p in (ROOT / "bitdistill").iterdir() if (p / "__init__.py").is_file()}
    design, readme = (ROOT / "docs/design.md").read_text(), (ROOT / "README.md").read_text()
    assert folders
    assert not {name for name in folders if f"  {name}/" not in design}
    assert not {name for name in folders if f"](bitdistill/{name})" not in readme}


def test_the_map_names_every_file():
    """docs/design.md, section 1, has a place for each file of the package."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w]+\.py", text))
    files = [path for folder in ("bitdistill", "kernels", "distributed") for path in (ROOT / folder).rglob("*.py")]
    assert not [str(path.relative_to(ROOT)) for path in files if path.name not in named | {"__init__.py"}]


CAPS = {"bitdistill/train.py": "--max_steps 2 --evaluate.max_rows 16 --export.proof_rows 2 --export.speed_tokens 4"}


def tutorial_steps():
    """(language, text) of the blocks of docs/tutorial.md that are to be run, with few steps in place of many."""
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", (ROOT / "docs/tutorial.md").read_text(), flags=re.M | re.S)
    for language, text in blocks:
        text = re.sub(r"max_steps=\d+", "max_steps=2", text)
        for program, options in CAPS.items():
            text = text.replace(program, f"{program} {options}")
        yield language, text


@pytest.mark.slow
def test_the_tutorial_runs_as_it_is_written(tmp_path):
    """In an empty folder that has only the package's folder, as a clone has it; 2 steps of each stage."""
    (tmp_path / "bitdistill").symlink_to(ROOT / "bitdistill")
    (tmp_path / "runs").mkdir()
    tools = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    outputs = []
    for language, text in tutorial_steps():
        command = ["bash", "-euc", text] if language == "sh" else [sys.executable, "-P", "-c", text]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{text}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
        outputs.append(result.stdout)
    assert len(outputs) == 9
    assert '"verdict"' in outputs[1]
    assert "BitDistill" in outputs[3]
    assert (tmp_path / "runs/verdicts/report.html").is_file()
    assert re.fullmatch(r"(good|bad)  [\d.]+%   \((good|bad) [\d.]+%\)\n", outputs[4])
    assert [json.loads(line)["prompt"] for line in outputs[5].splitlines()] == ["The music was", "The dinner was so"]
    assert "accuracy" in outputs[6]
    assert "'linears': 56" in outputs[8]


def test_pictures_of_the_documents_are_small():
    for picture in ROOT.glob("docs/tutorial/*.png"):
        assert picture.stat().st_size < 100_000, picture
