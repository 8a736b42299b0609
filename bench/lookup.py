"""Would lookup decoding pay? What k drafted tokens cost, and how many of them are right, for a packed student.

    python bench/lookup.py FILE --texts TEXT.jsonl [--field article] [--prompts 20] [--tokens 96] [--answers_by FOLDER]

Lookup decoding (bitdistill/runtime/drafts.py) computes k drafted tokens in the step of the newest one; those that greedy decoding
would have chosen are kept, so the answer is the same. It pays where a step of k + 1 rows costs less than the tokens that it
gives.

The cost is the processor time of `Decoder.forward` with k + 1 rows, over that with one row, at a context of CONTEXT tokens. The
gain is counted on greedy answers: each is made once, one token at a time, and then walked with drafts of k tokens, a step without
a draft costing one row. `--answers_by` is a Hugging Face model of the same tokenizer that answers in the student's place, where
the student was not trained for the texts. "repeating" is the share of answers whose last 24 tokens hold the same 4-gram three
times: a model that circles makes any lookup look good, so gains are also given without these.

A server computes several sequences in a step. The second table is what drafts cost then: a step of n sequences with k drafted
tokens each, over one without any.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from bitdistill.runtime.cpu import Runtime
from bitdistill.runtime.drafts import Drafts
from measure import machine, table, write_json

DRAFTS = (2, 3, 4, 6, 8)
CONTEXT = 400
TOGETHER = {
    1: (1, 3, 7),
    2: (1, 3),
    3: (1, 2),
    4: (1, 3),
    6: (1,),
    8: (1,),
    16: (1,),
}  # sequences -> drafted tokens of each


def walk(prompt: list[int], answer: list[int], k: int) -> Counter:
    """rows -> steps that lookup decoding takes for this answer; the first token is the prompt's."""
    steps, done, drafts = Counter(), 1, Drafts(k)
    while done < len(answer):
        guess = drafts.draft(prompt + answer[:done], len(answer) - done - 1)
        right = 0
        while right < len(guess) and guess[right] == answer[done + right]:
            right += 1
        steps[1 + len(guess)] += 1
        done += right + 1
    return steps


def circles(answer: list[int]) -> bool:
    """Whether an answer ends in a circle."""
    last = answer[-24:]
    return max(Counter(zip(*(last[i:] for i in range(4)), strict=False)).values(), default=0) >= 3


def costs(runtime: Runtime, rounds: int, sequences: int, counts: Iterable[int]) -> dict[int, float]:
    """rows of each sequence -> processor seconds of a step, the fastest."""
    cache = runtime._keys_values(sequences, CONTEXT + 16)
    decoder, best = runtime._decoder, {}
    for _ in range(rounds):
        for rows in counts:
            slots = [slot for slot in range(sequences) for _ in range(rows)]
            positions = [CONTEXT + row for _ in range(sequences) for row in range(rows)]
            started = time.thread_time()
            decoder.forward([7] * len(slots), slots, positions, cache)
            best[rows] = min(time.thread_time() - started, best.get(rows, 10.0))
    return best


def greedy(runtime: Runtime, prompt: list[int], count: int) -> list[int]:
    """The answer one token at a time, to its end or `count` tokens."""
    cache, answer = runtime.new_cache(len(prompt) + count), []
    logits = runtime.logits(prompt, last_only=True, cache=cache)
    while len(answer) < count:
        answer.append(int(logits[-1].argmax()))
        if answer[-1] in runtime.model.config.eos_token_ids:
            break
        logits = runtime.logits(answer[-1:], last_only=True, cache=cache)
    return answer


def greedy_by(folder: str):
    """`greedy` of a Hugging Face model: (prompt, count) -> answer."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(prompt: list[int], count: int) -> list[int]:
        with torch.inference_mode():
            ids = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=0)
        return ids[0, len(prompt) :].tolist()

    return answer


def main() -> int:
    """Measures, prints, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("file")
    parser.add_argument("--texts", required=True, help="rows as JSON lines, or a text whose blank lines divide it")
    parser.add_argument("--field", default="article", help="of a row")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--length", type=int, default=384, help="tokens of a text, at most")
    parser.add_argument(
        "--answers_by", metavar="FOLDER", help="a Hugging Face model that answers in the student's place"
    )
    parser.add_argument("--suffix", default="", help="what is asked behind a text")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    lines = Path(given.texts).read_text(encoding="utf-8").split("\n" if given.texts.endswith(".jsonl") else "\n\n")
    texts = [
        json.loads(line)[given.field] if given.texts.endswith(".jsonl") else line for line in lines if line.strip()
    ]
    runtime = Runtime(given.file, threads=1)
    cost, answers = costs(runtime, 15, 1, range(1, max(DRAFTS) + 2)), []
    together = {}
    for sequences, drafted in TOGETHER.items():
        found = costs(runtime, 15, sequences, (1, *(1 + k for k in drafted)))
        together[sequences] = {k: found[1 + k] / found[1] for k in drafted}
    answered = greedy_by(given.answers_by) if given.answers_by else lambda prompt, count: greedy(runtime, prompt, count)
    suffix = runtime.tokenizer.encode(given.suffix, add_special_tokens=False).ids
    for text in texts:
        prompt = runtime.tokenizer.encode(text).ids[: given.length]
        if len(prompt) >= given.length // 2 and len(answers) < given.prompts:
            prompt += suffix
            answers.append((prompt, answered(prompt, given.tokens)))
    straight = [pair for pair in answers if not circles(pair[1])]
    print(f"{len(answers)} answers of {statistics.mean(len(a) for _, a in answers):.0f} tokens; "
          f"{len(answers) - len(straight)} of them repeating")  # fmt: skip
    cells, results = [["k", "cost of k + 1 rows", "tokens a step", "gain", "gain without repeating"]], []
    for k in DRAFTS:
        gains = []
        for chosen in (answers, straight):
            steps = sum((walk(prompt, answer, k) for prompt, answer in chosen), Counter())
            made = sum(len(answer) - 1 for _, answer in chosen)
            spent = sum(count * cost[rows] for rows, count in steps.items())
            gains.append((made / max(1, steps.total()), made * cost[1] / spent if spent else float("nan")))
        results.append({"k": k, "cost": cost[k + 1] / cost[1], "tokens_a_step": gains[0][0], "gain": gains[0][1],
                        "gain_straight": gains[1][1]})  # fmt: skip
        cells.append(
            [str(k), f"{cost[k + 1] / cost[1]:.2f}", f"{gains[0][0]:.2f}", f"{gains[0][1]:.2f}", f"{gains[1][1]:.2f}"]
        )
    print(table(cells, ">>>>>"))
    shared = [["sequences", "k", "cost of n (k + 1) rows, over n"]]
    shared += [[str(n), str(k), f"{ratio:.2f}"] for n, found in together.items() for k, ratio in found.items()]
    print(table(shared, ">>>"))
    if given.json:
        write_json(given.json, {"machine": machine(), "texts": Path(given.texts).name, "answers": len(answers),
                                "repeating": len(answers) - len(straight), "seconds": cost, "together": together,
                                "results": results})  # fmt: skip
    runtime.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
