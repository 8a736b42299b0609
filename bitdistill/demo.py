"""The embedded default: a small world made on the spot, in which the three settings can be compared in minutes.

Nothing is downloaded. From one seed come a corpus, a tokenizer trained on it, a classification task and the
configuration of a small Qwen3. The world is built so that the comparison means something:

* **The corpus** tells short stories: somebody goes somewhere, things there are pleasant or not, and what happens next
  follows from it. It never says what a word means and never has the form of the task. A language model that wants to
  predict the endings has to find out which of the 280 adjectives are pleasant.
* **The task** is the verdict of a review, " good" or " bad". Its training rows use only `TRAIN_SHARE` of the
  adjectives; its validation rows use the others *only*. Who has lost what the corpus taught must guess. There is also
  something to compose: "not", "and", "but", "although", and "even though", which lets the first clause win.
* **Noise**: a share `LABEL_NOISE` of the reviewers tick the wrong box, in both files. Nobody can score above
  1 - LABEL_NOISE except by luck, and nobody should score 100 %.
* **The tokenizer** is small, so most adjectives are several tokens: what they mean is knowledge of the layers, which
  become ternary, and not of the embedding, which does not.

Files of `make_demo`: corpus.txt (documents separated by a blank line), train.jsonl and validation.jsonl (`text`,
`verdict`), task.yaml, and base/ with config.json and the tokenizer as a Hugging Face folder.
"""

import random
from dataclasses import dataclass
from pathlib import Path

LABEL_NOISE = 0.04
TRAIN_SHARE = 0.6
NEGATED = 0.15
DOCUMENTS, TRAIN_ROWS, VALIDATION_ROWS, VOCABULARY = 20_000, 4_000, 1_000, 512
LABELS = {0: "bad", 1: "good"}

PLEASANT = [
    "adorable",
    "amazing",
    "amusing",
    "appealing",
    "attractive",
    "awesome",
    "beautiful",
    "blissful",
    "bright",
    "brilliant",
    "calm",
    "caring",
    "charming",
    "cheerful",
    "clean",
    "clever",
    "comfortable",
    "convenient",
    "cosy",
    "cute",
    "dazzling",
    "decent",
    "delicate",
    "delicious",
    "delightful",
    "dependable",
    "elegant",
    "enchanting",
    "engaging",
    "enjoyable",
    "excellent",
    "exceptional",
    "exciting",
    "fabulous",
    "faithful",
    "fantastic",
    "fine",
    "flawless",
    "fresh",
    "friendly",
    "funny",
    "gentle",
    "genuine",
    "gorgeous",
    "graceful",
    "great",
    "handsome",
    "healthy",
    "heavenly",
    "helpful",
    "ideal",
    "impressive",
    "incredible",
    "inspiring",
    "inviting",
    "joyful",
    "kind",
    "lively",
    "lovely",
    "loyal",
    "lucky",
    "luxurious",
    "magical",
    "magnificent",
    "neat",
    "nice",
    "outstanding",
    "patient",
    "peaceful",
    "perfect",
    "playful",
    "pleasant",
    "polished",
    "polite",
    "precious",
    "radiant",
    "refreshing",
    "relaxing",
    "reliable",
    "remarkable",
    "smooth",
    "soothing",
    "sparkling",
    "spectacular",
    "splendid",
    "spotless",
    "stunning",
    "stylish",
    "sunny",
    "superb",
    "tasty",
    "tender",
    "thoughtful",
    "tidy",
    "vibrant",
    "warm",
    "wonderful",
]

UNPLEASANT = [
    "abysmal",
    "aggressive",
    "annoying",
    "appalling",
    "arrogant",
    "awful",
    "awkward",
    "bitter",
    "bland",
    "bleak",
    "boring",
    "broken",
    "brutal",
    "careless",
    "chaotic",
    "cheap",
    "clumsy",
    "confusing",
    "creepy",
    "crooked",
    "cruel",
    "cynical",
    "damaged",
    "dangerous",
    "defective",
    "depressing",
    "dirty",
    "disappointing",
    "disgusting",
    "dishonest",
    "disturbing",
    "dreadful",
    "dreary",
    "dull",
    "dusty",
    "feeble",
    "filthy",
    "foul",
    "frightful",
    "frustrating",
    "ghastly",
    "gloomy",
    "greasy",
    "greedy",
    "grim",
    "grumpy",
    "harsh",
    "hideous",
    "hopeless",
    "horrible",
    "horrid",
    "hostile",
    "incompetent",
    "irritating",
    "lazy",
    "lousy",
    "messy",
    "miserable",
    "muddy",
    "musty",
    "nasty",
    "noisy",
    "offensive",
    "painful",
    "pathetic",
    "revolting",
    "ridiculous",
    "rotten",
    "rough",
    "rude",
    "rusty",
    "sad",
    "shabby",
    "shaky",
    "shameful",
    "shoddy",
    "slimy",
    "sloppy",
    "sluggish",
    "smelly",
    "soggy",
    "sour",
    "stale",
    "sticky",
    "stingy",
    "stuffy",
    "tacky",
    "tasteless",
    "terrible",
    "tragic",
    "ugly",
    "unbearable",
    "vile",
    "weak",
    "wicked",
]

NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Iris",
    "Jack",
    "Kate",
    "Leo",
    "Mary",
    "Nora",
    "Oscar",
    "Paul",
    "Ruth",
    "Sam",
    "Tom",
    "Vera",
]
PLACES = [
    "hotel",
    "inn",
    "market",
    "café",
    "theatre",
    "harbour",
    "garden",
    "museum",
    "station",
    "village",
    "school",
    "castle",
    "farm",
    "shop",
    "bakery",
]
TIMES = ["", "", "", "", " on Monday", " in spring", " after a good night", " after a bad night"]
THINGS = [
    "soup",
    "bread",
    "tea",
    "cake",
    "room",
    "bed",
    "view",
    "music",
    "waiter",
    "cook",
    "guide",
    "driver",
    "owner",
    "chair",
    "lamp",
    "coat",
    "song",
    "story",
    "game",
    "path",
    "house",
    "window",
    "table",
    "dinner",
    "breakfast",
    "service",
    "staff",
    "garden",
    "boat",
    "train",
]


@dataclass(frozen=True)
class DemoPaths:
    """Where `make_demo` put what: files, and `base`, a Hugging Face folder with configuration and tokenizer."""

    folder: Path
    corpus: Path
    train: Path
    validation: Path
    task: Path
    base: Path


def lexicon(seed: int = 0) -> tuple[dict[str, int], set[str]]:
    """The adjectives and their polarity (1 pleasant, 0 not), and those of them that the training rows may use."""
    draw = random.Random(f"lexicon {seed}")
    polarity = {word: 1 for word in PLEASANT} | {word: 0 for word in UNPLEASANT}
    shown = set()
    for words in (PLEASANT, UNPLEASANT):
        shown.update(draw.sample(words, round(TRAIN_SHARE * len(words))))
    return polarity, shown


def review(draw: random.Random, words: tuple[list[str], list[str]], good: int) -> str:
    """A sentence about one or two things whose verdict is `good`. `words`: unpleasant and pleasant adjectives."""
    first, second = draw.sample(THINGS, 2)

    def clause(thing: str, good: int) -> str:
        negated = draw.random() < NEGATED
        adjective = draw.choice(words[good ^ negated])
        return f"the {thing} was {'not ' if negated else draw.choice(['', '', 'so ', 'really '])}{adjective}"

    form = draw.choice(["one", "one", "and", "but"])
    if form == "one":
        text = clause(first, good)
    elif form == "and":
        text = f"{clause(first, good)} and {clause(second, good)}"
    elif form == "but":
        text = f"{clause(first, 1 - good)}, but {clause(second, good)}"
    elif form == "although":
        text = f"although {clause(first, 1 - good)}, {clause(second, good)}"
    else:
        text = f"{clause(first, good)}, even though {clause(second, 1 - good)}"
    return f"{text[0].upper()}{text[1:]}."


REACTIONS = (
    ["frowned", "cried", "left", "complained", "groaned", "ran"],
    ["smiled", "laughed", "stayed", "sang", "cheered", "danced"],
)
OUTCRIES = (["mess", "shame", "waste", "pity", "shock"], ["treat", "joy", "gift", "delight", "triumph"])


def story(draw: random.Random, words: tuple[list[str], list[str]]) -> str:
    """One document of the corpus: what somebody found on a visit, with the outcries and reactions that follow."""
    name = draw.choice(NAMES)
    sentences = [f"{name} went to the {draw.choice(PLACES)}{draw.choice(TIMES)}."]
    for _ in range(2):
        good = draw.randrange(2)
        adjective = draw.choice(words[good])
        article = "an" if adjective[0] in "aeiou" else "a"
        sentences.append(f"What {article} {adjective} {draw.choice(OUTCRIES[good])}!")
    for _ in range(2):
        good = draw.randrange(2)
        sentences += [review(draw, words, good), f"{name} {draw.choice(REACTIONS[good])}."]
    return " ".join(sentences)
