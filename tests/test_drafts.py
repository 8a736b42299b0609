"""Lookup decoding: drafts by hand, and answers that are token for token those without it, in fewer steps."""

import pytest

from bitdistill.errors import UserError
from bitdistill.export.write import write_packed
from bitdistill.runtime.cpu import Runtime
from bitdistill.runtime.drafts import Drafts
from bitdistill.runtime.sampling import Sampling
from tiny_students import student

SAMPLINGS = (Sampling(), Sampling(repetition_penalty=1.3), Sampling(temperature=0.7, top_k=3, seed=4))
PROMPTS = ([5, 6, 7, 8, 5, 6, 7, 8, 5, 6], [9] * 12, [1, 2, 3], [40], list(range(30)))


def test_drafts_by_hand():
    drafts = Drafts(3)
    assert drafts.draft([1], 9) == []
    assert drafts.draft([1, 2, 3, 4, 5, 9, 2, 3], 9) == [4, 5, 9]  # two tokens are enough
    assert drafts.draft([1, 2, 3, 4, 5, 9, 2, 3], 2) == [4, 5]
    assert drafts.draft([1, 2, 3, 4, 5, 9, 2, 3], -1) == []
    assert drafts.draft([1, 2, 3, 4, 5, 9, 2, 3, 7], 9) == []
    assert drafts.draft([1, 2, 3, 4, 5, 9, 2, 3, 7, 1, 2, 3], 9) == [4, 5, 9]  # three before two, which say 7
    assert drafts.draft([1, 2, 3, 4, 5, 9, 2, 3, 7, 1, 2, 3, 8, 2, 3], 9) == [8, 2, 3]  # the last occurrence
    assert Drafts(4).draft([6, 6, 6, 6], 9) == [6]  # what follows ends with the sequence


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafts")
    write_packed(folder / "s", student("qwen3"))
    return folder / "s"


@pytest.mark.parametrize("lookup", [1, 3, 16])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "penalty", "drawn"])
def test_answers_are_the_same_in_fewer_steps(path, sampling, lookup):
    """Alone, continued from what the cache holds, side by side, and up to the end of the context."""
    plain, looking = Runtime(path, 1), Runtime(path, 1, lookup=lookup)
    steps = []
    for count in (1, 2, 17, 64):
        for prompt in PROMPTS:
            want = list(plain.generate_ids(prompt, count, sampling))
            assert list(looking.generate_ids(prompt, count, sampling)) == want
            assert looking.stats.new_tokens == len(want)
            assert looking.stats.decoded_tokens == plain.stats.decoded_tokens
            assert looking.stats.stopped_by == plain.stats.stopped_by
            steps.append((looking.stats.decode_steps, plain.stats.decode_steps))
            longer = prompt + want[:5]
            assert list(looking.generate_ids(longer, 3, sampling)) == list(plain.generate_ids(longer, 3, sampling))
    assert all(ours <= theirs for ours, theirs in steps)
    if sampling == Sampling():
        assert sum(ours for ours, _ in steps) < sum(theirs for _, theirs in steps)
    batches = [
        {
            answer.index: (answer.token_ids, answer.stopped_by)
            for answer in runtime.generate_batch(PROMPTS, 20, sampling, slots=3)
        }
        for runtime in (plain, looking)
    ]
    assert batches[0] == batches[1]


def test_sequences_share_the_rows_of_a_step(path, monkeypatch):
    """Drafts fill a step up to 16 rows, the same number for each sequence, and none beside more than 8."""
    looking, seen = Runtime(path, 1, lookup=16), []
    forward = looking._decoder.forward

    def counting(ids, slots, positions, *rest, **out):
        seen.append([slots.count(slot) for slot in sorted(set(slots))])
        return forward(ids, slots, positions, *rest, **out)

    monkeypatch.setattr(looking._decoder, "forward", counting)
    monkeypatch.setattr(Drafts, "draft", lambda self, ids, room: [7] * room)
    for together in (1, 2, 3, 8, 9):
        seen.clear()
        answers = list(looking.generate_batch([[7 + i, 8, 9] for i in range(together)], 40, slots=together))
        assert len(answers) == together
        steps = [rows for rows in seen[1:] if len(rows) == together]
        assert max(map(max, steps)) == (16 // together if together <= 8 else 1)


def test_an_end_inside_a_draft(path):
    """A token that ends the sequence, and a caller that stops, in the middle of what one step gave."""
    plain, looking = Runtime(path, 1), Runtime(path, 1, lookup=8)
    prompt = PROMPTS[1]
    want = list(plain.generate_ids(prompt, 40))
    for end in sorted(set(want)):
        for runtime in (plain, looking):
            object.__setattr__(runtime.model.config, "eos_token_ids", (end,))
        assert list(looking.generate_ids(prompt, 40)) == list(plain.generate_ids(prompt, 40))
        assert looking.stats.stopped_by == plain.stats.stopped_by == "eos"
        for runtime in (plain, looking):
            object.__setattr__(runtime.model.config, "eos_token_ids", ())
    for taken in range(1, 9):
        answer = looking.generate_ids(prompt, 40)
        assert [next(answer) for _ in range(taken)] == want[:taken]
        answer.close()
        assert list(looking.generate_ids(prompt, 40)) == want


def test_a_lookup_out_of_range_is_refused(path):
    for lookup in (-1, 17):
        with pytest.raises(UserError, match=r"^lookup: expected 0 to 16"):
            Runtime(path, lookup=lookup)
