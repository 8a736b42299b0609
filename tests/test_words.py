"""Words: American spelling everywhere, and no paths of anybody's machine."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BRITISH = re.compile(
    r"(?i)(?:colour|behaviour|favour(?!ite)|honour|neighbour|labour|centre|fibre|"
    r"(?:initial|normal|quant|optim|token|serial|minim|maxim|summar|general|regular|organ|recogn|random|real|local|special|"
    r"util|emphas|penal|factor|linear|parallel|vector|standard|categor|author|custom|memor)is(?:e[drs]?|ers|ing|ation|able)\b|"
    r"modelling|labelled|labelling|travelled|cancelling|catalogue|artefact|learnt|spelt|\b(?:whilst|towards|grey)\b)"
)
EXCEPTIONS = {"bitdistill/data/demo.py", "tests/test_trimming.py", "tests/test_words.py"}  # words as data
EXCEPTIONS |= {"bench/training_step.py"}  # an older commit's name


def tracked(*patterns):
    """Text files of the repository, without results."""
    command = ["git", "-C", str(ROOT), "ls-files", *patterns]
    names = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    if not names:
        pytest.skip("not a checkout")
    return [name for name in names if not name.startswith("bench/results/") and name not in EXCEPTIONS]


def found(names, pattern, unit):
    """file: text, for each different `unit` of a file in which the pattern finds something."""
    texts = {name: set(re.findall(unit, (ROOT / name).read_text(encoding="utf-8"))) for name in names}
    wrong = {one for one in set().union(*texts.values()) if pattern.search(one)}
    return [f"{name}: {one}" for name, units in texts.items() for one in sorted(units & wrong)]


def test_spelling_is_american():
    assert not found(tracked("*.py", "*.md", "*.yaml", "*.j2", "*.toml", "*.sh"), BRITISH, r"[A-Za-z]+")


def test_no_paths_of_a_machine():
    """Data is named by $DATA or $BITDISTILL_DATA."""
    names, path = tracked("*.py", "*.md", "*.yaml", "*.sh"), re.compile(r"^/(?:work|home|Users)/")
    assert not found(names, path, r"(?<![\w.~])/\w+/\w+/\w+")


@pytest.mark.parametrize("word", ["initialise", "Colours", "tokenised", "optimisers", "unnormalised", "labelled"])
def test_british_words_are_seen(word):
    assert BRITISH.search(word)


@pytest.mark.parametrize(
    "word", ["raise", "noise", "premise", "promised", "otherwise", "centered", "labels", "TOKENIZERS"]
)
def test_american_words_are_not(word):
    assert not BRITISH.search(word)
