"""The data of the embedded demo: a small world, made on the spot, in which the three settings can be compared in minutes.

Nothing is downloaded. From one seed come a corpus, a tokenizer trained on it, a classification task and the
configuration of a small Qwen3. The world is built so that the comparison means something:

* **The corpus** tells short stories: somebody goes somewhere, the things there are pleasant or not, and what people say and
  do next follows from that. It never says what a word means, and it never has the form of the task. A language model that
  is to predict what happens next has to find out which of the adjectives are pleasant.
* **The task** is the verdict of a review, "good" or "bad". Its training rows use only `TRAIN_SHARE` of the adjectives; its
  validation rows use *only* the others. A model that has lost what the corpus taught must therefore guess. There is also
  something to combine: "not", "and", and "but", after which the second clause decides.
* **Noise**: a share `LABEL_NOISE` of the reviewers tick the wrong box, in both files. Except by luck, nobody can score
  above 1 - LABEL_NOISE.
* **The tokenizer** is small, so that most adjectives consist of several tokens. What they mean is therefore known by the
  layers, which become ternary, and less by the embedding, which does not.
* **The model** is narrow and deep for its size, because the errors of ternary weights average out over the width and build
  up over the depth. In a wide and shallow model of this size they would hardly be noticed, and the demo would show nothing
  of what happens to a real model.

`make_demo` writes corpus.txt (as corpus.py reads it), train.jsonl and validation.jsonl (`text`, `verdict`), task.yaml (as
tasks.py reads it), and base/, a Hugging Face folder with config.json and the tokenizer but without weights.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from bitdistill.data.corpus import SEPARATOR
from bitdistill.distributed import process_group
from bitdistill.files import make_once

LABEL_NOISE = 0.05
TRAIN_SHARE = 0.6
NEGATED = 0.15
DOCUMENTS, TRAIN_ROWS, VALIDATION_ROWS = 12_000, 4_000, 1_000
VOCABULARY = 768
INITIALIZER_RANGE = 0.1  # a narrow model learns sooner from larger weights than the usual 0.02
PAD, EOS = "<pad>", "<eos>"

TASK = """\
# Is a review, written in words that the training rows never use, good or bad?
name: demo
kind: classification
prompt: "Review: {text}\\nVerdict:"
label_column: verdict
labels: {0: bad, 1: good}
truncate_column: text
"""

PLEASANT = """
adorable amazing amusing appealing attractive awesome beautiful blissful bright brilliant calm caring charming
cheerful clean clever comfortable convenient cosy cute dazzling decent delicate delicious delightful dependable
elegant enchanting engaging enjoyable excellent exceptional exciting fabulous faithful fantastic fine flawless fresh
friendly funny gentle genuine gorgeous graceful great handsome healthy heavenly helpful ideal impressive incredible
inspiring inviting joyful kind lively lovely loyal lucky luxurious magical magnificent neat nice outstanding patient
peaceful perfect playful pleasant polished polite precious radiant refreshing relaxing reliable remarkable smooth
soothing sparkling spectacular splendid spotless stunning stylish sunny superb tasty tender thoughtful tidy vibrant
warm wonderful
""".split()  # noqa: SIM905

UNPLEASANT = """
abysmal aggressive annoying appalling arrogant awful awkward bitter bland bleak boring broken brutal careless chaotic
cheap clumsy confusing creepy crooked cruel cynical damaged dangerous defective depressing dirty disappointing
disgusting dishonest disturbing dreadful dreary dull dusty feeble filthy foul frightful frustrating ghastly gloomy
greasy greedy grim grumpy harsh hideous hopeless horrible horrid hostile incompetent irritating lazy lousy messy
miserable muddy musty nasty noisy offensive painful pathetic revolting ridiculous rotten rough rude rusty sad shabby
shaky shameful shoddy slimy sloppy sluggish smelly soggy sour stale sticky stingy stuffy tacky tasteless terrible
tragic ugly unbearable vile weak wicked
""".split()  # noqa: SIM905

NAMES = """
Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mary Nora Oscar Paul Ruth Sam Tom Vera
""".split()  # noqa: SIM905
PLACES = """
hotel inn market café theatre harbour garden museum station village school castle farm shop bakery
""".split()  # noqa: SIM905
THINGS = """
soup bread tea cake room bed view music waiter cook guide driver owner chair lamp coat song story game path house
window table dinner breakfast service staff garden boat train
""".split()  # noqa: SIM905
TIMES = ["", "", "", "", " on Monday", " in spring", " after a good night", " after a bad night"]
OUTCRIES = (["mess", "shame", "waste", "pity", "shock"], ["treat", "joy", "gift", "delight", "triumph"])
REACTIONS = (
    ["frowned", "cried", "left", "complained", "groaned", "ran"],
    ["smiled", "laughed", "stayed", "sang", "cheered", "danced"],
)


@dataclass(frozen=True)
class DemoPaths:
    """Where `make_demo` writes: files, and `base`, the folder with the model's configuration and the tokenizer."""

    corpus: Path
    train: Path
    validation: Path
    task: Path
    base: Path


def lexicon(seed: int = 0) -> tuple[dict[str, int], set[str]]:
    """The adjectives with their polarity (1 pleasant, 0 not), and those of them that the training rows may use."""
    draw = random.Random(f"lexicon {seed}")
    polarity = {word: 1 for word in PLEASANT} | {word: 0 for word in UNPLEASANT}
    shown = set()
    for words in (PLEASANT, UNPLEASANT):
        shown.update(draw.sample(words, round(TRAIN_SHARE * len(words))))
    return polarity, shown


def review(draw: random.Random, words: tuple[list[str], list[str]], good: int) -> str:
    """A sentence about one or two things.

    Args:
        draw: the source of chance.
        words: the unpleasant and the pleasant adjectives it may use.
        good: its verdict, 0 or 1: that of its last clause ("not" turns a clause round).
    """
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
    else:
        text = f"{clause(first, 1 - good)}, but {clause(second, good)}"
    return f"{text[0].upper()}{text[1:]}."


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


def reviews(draw: random.Random, words: tuple[list[str], list[str]], rows: int, taken: set[str]) -> list[dict]:
    """Rows of the task, all different and none in ``taken`` (which grows); half of them good, before the noise."""
    result = []
    while len(result) < rows:
        good = len(result) % 2
        text = review(draw, words, good)
        if text not in taken:
            taken.add(text)
            result.append({"text": text, "verdict": good ^ (draw.random() < LABEL_NOISE)})
    draw.shuffle(result)
    return result


def train_tokenizer(documents: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` tokens. It can write any text; what it has not seen costs one token per byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=[PAD, EOS], show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def demo_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """A Qwen3 of about 0.4 million parameters."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def demo_model(folder: str | Path, seed: int = 0) -> Qwen3ForCausalLM:
    """The base model before training: the configuration in ``folder`` with fresh fp32 weights drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(Qwen3Config.from_pretrained(folder))


def make_demo(folder: str | Path, seed: int = 0) -> DemoPaths:
    """Writes the demo's files into ``folder``: the same bytes for the same seed, whole or not at all.

    Args:
        folder: must not exist yet; it is written beside itself and renamed.
        seed: of all texts, and of the split of the adjectives.
    """
    folder = Path(folder)
    assert not folder.exists(), f"{folder} exists already"
    _, shown = lexicon(seed)
    draw = random.Random(f"texts {seed}")
    documents = [story(draw, (UNPLEASANT, PLEASANT)) for _ in range(DOCUMENTS)]
    tokenizer = train_tokenizer(documents)
    files, taken = {"corpus.txt": f"\n{SEPARATOR}\n".join(documents) + "\n", "task.yaml": TASK}, set()
    for name, count, may_use in (("train", TRAIN_ROWS, True), ("validation", VALIDATION_ROWS, False)):
        words = tuple([word for word in pool if (word in shown) == may_use] for pool in (UNPLEASANT, PLEASANT))
        rows = reviews(draw, words, count, taken)
        files[f"{name}.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)

    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name, text in files.items():
        (unfinished / name).write_text(text, encoding="utf-8")
    tokenizer.save_pretrained(unfinished / "base")
    demo_config(tokenizer).save_pretrained(unfinished / "base")
    unfinished.rename(folder)
    return _paths(folder)


def demo_of_run(run_dir: Path, seed: int) -> DemoPaths:
    """The demo's files in RUN/demo: made unless those of this seed and this version of this file exist.

    Every rank calls it; rank 0 writes.
    """
    folder, marker = run_dir / "demo", run_dir / "demo.json"
    if process_group.is_main():
        source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        make_once(folder, marker, json.dumps({"seed": seed, "source": source}), lambda: _make_anew(folder, seed))
    process_group.barrier()
    return _paths(folder)


def _make_anew(folder: Path, seed: int) -> None:
    process_group.say("demo: makes its own corpus, tokenizer and task")
    shutil.rmtree(folder, ignore_errors=True)
    make_demo(folder, seed)


def _paths(folder: Path) -> DemoPaths:
    names = ("corpus.txt", "train.jsonl", "validation.jsonl", "task.yaml", "base")
    return DemoPaths(*(folder / name for name in names))
