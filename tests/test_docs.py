"""The documents: every relative link leads somewhere, and the maps name what is there."""

import re
from pathlib import Path

import pytest

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


def test_design_names_every_folder_of_the_package():
    folders = {p.name for p in (ROOT / "bitdistill").iterdir() if (p / "__init__.py").is_file()}
    design, readme = (ROOT / "docs/design.md").read_text(), (ROOT / "README.md").read_text()
    assert folders
    assert not {name for name in folders if f"  {name}/" not in design}
    assert not {name for name in folders if f"](bitdistill/{name})" not in readme}
