"""Checks all claims with one command: one table, one exit status.

    python bench/claims.py [--rounds 3] [--threads N] [--llama_bench PATH ...] [--peers FILE] [--resident FILE] [--json FILE]
    python bench/claims.py --from bench/results/claims.json --page docs/claims.md --readme README.md

The second form measures nothing: it writes the whole table into one page, and its main rows into the other.
There is one row per claim: where it comes from, the command behind the figure, what was measured with its spread, and
whether it holds. What could not be measured here is marked so and never assumed. The exit status is 1 when a claim was
measured and does not hold, and 2 when the command was used wrongly.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import cpu_training
import peers
import resident
from bitdistill.distributed import openmp
from bitdistill.kernels.packing import bits_per_weight
from cpu_training import NATIVE, VNNI
from measure import Bandwidth, cores, machine, write_json
from random_models import SHAPES, write_packed_model

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- claims: made by bench/claims.py, do not edit -->", "<!-- end of claims -->"
SHAPE = "0.6B"
TARGETS = {"fp16": 2.8, "int8": 4.5, "int4": 6.7, "ternary": 10.0}  # the whole model, by embedding: times smaller
NOT_MEASURED = "not measured"
OURS, TERNARY, FULL = "2bit, int4 head", "few-bit", "full-precision"
FULL_TYPES = ("F16", "BF16", "bfloat16", "float32")
TARGETS_OF_SPEED = (  # column, the runners, times as fast; few-bit ones are ternary formats and int4, where ours has 2 bits
    ("decode 16", TERNARY, 2.0),
    ("decode 2048", TERNARY, 1.5),
    ("prefill 128", TERNARY, 1.8),
    ("prefill 512", TERNARY, 1.6),
    ("batch 16", TERNARY, 1.5),
    ("decode 16", FULL, 2.65),
    ("prefill 128", FULL, 2.65),
)
ACCURACY = "BitDistill within one point of FP16-SFT on"
HEADLINES = (  # how the claims begin that README.md shows; at most eight
    "linears 10x smaller",
    f"whole Qwen3-{SHAPE} file, int4",
    "process that decodes",
    "CPU decode 16, the processor as it is: 2.0x",
    "CPU prefill 128, the processor as it is: 2.65x",
    "GPU decode",
    f"{ACCURACY} sst2",
    f"{ACCURACY} qnli",
)


def row(claim, source, command, target, value=None, spread=None, unit="x", why="") -> dict:
    """One claim. value: what was measured, None if it was not; it holds when it is at least the target, and beyond the
    noise when its spread (low and high, or a word on it) is, too."""
    holds = NOT_MEASURED if value is None else "holds" if value >= target else "does not hold"
    if holds == "holds" and isinstance(spread, list) and spread[0] < target:
        holds = "holds, within the noise"
    return {
        "claim": claim, "source": source, "command": command, "target": target, "measured": value, "spread": spread,
        "unit": unit, "holds": holds, "why": why,
    }  # fmt: skip


def size_rows(folder: Path) -> list[dict]:
    """Exact arithmetic of the linears, and real files of the whole model in each embedding format."""
    shape = SHAPES[SHAPE]
    command, source = "bench/claims.py", "paper: 1.20 -> 0.11 GB"
    linears = [matrix for matrix in shape.linears().values()] * shape.layers
    rows = [
        row(
            "linears 10x smaller than FP16 (apart from one scale per matrix)",
            source,
            command,
            9.99,
            16 / bits_per_weight(linears, "base3"),
        ),
        row("linears 8x smaller, 2 bits", "2-bit packing", command, 7.99, 16 / bits_per_weight(linears, "2bit")),
    ]
    fp16 = 2 * (shape.linear_weights() + shape.vocabulary * shape.hidden)
    for embedding, target in TARGETS.items():
        path = folder / f"{SHAPE}-base3-{embedding}.safetensors"
        if not path.is_file():
            write_packed_model(path, shape, "base3", embedding)
        claim = f"whole Qwen3-{SHAPE} file, {embedding} embedding, {target}x smaller than FP16"
        rows.append(row(claim, "exact arithmetic", command, target, fp16 / path.stat().st_size))
    return rows


def memory_rows(folder: Path, earlier: dict | None = None) -> list[dict]:
    """Resident memory of a process that decodes, beside one of transformers in bf16.

    Weights: the pages of the packed file that are resident when every weight has been read, beside the bytes of the
    parameters. Process: what either grows by, KV cache, activations and scratch in both.

    Args:
        earlier: a --json report of bench/resident.py, instead of a new run.
    """
    report = earlier or {
        "resident": resident.measure(SHAPES[SHAPE], list(TARGETS), folder),
        "context": resident.CONTEXT,
    }
    found, context = report["resident"], report["context"]
    full, command, source = found["transformers"], "bench/resident.py", "paper: 1.20 -> 0.11 GB"
    linears = found["transformers, linears"]["weights"] / found["linears"]["weights"]
    rows = [
        row("linears and norms 9.8x smaller resident than bf16, 256 words", source, command, 9.8, linears, "one run")
    ]
    for embedding, target in TARGETS.items():
        claim = f"weights of Qwen3-{SHAPE}, {embedding} embedding, {target}x smaller resident than bf16"
        rows.append(row(claim, source, command, target, full["weights"] / found[embedding]["weights"], "one run"))
    cache = f"KV cache of {full['kv_cache'] / 1e6:.1f} MB in both"
    claim = (
        f"process that decodes to {context} positions, int4 embedding, grows 5x less than transformers bf16, {cache}"
    )
    rows.append(row(claim, "aim", command, 5.0, full["growth"] / found["int4"]["growth"], "one run"))
    return rows


def speed_rows(result: dict) -> list[dict]:
    """Our 2-bit form with a head of 4 bits over the best other runners of a run of bench/peers.py, which each row names.

    The best one is found anew for each column, among all that the run measured with their best flags: TERNARY formats, or
    FULL precision. With a forced instruction set, ours is compared with peers that have the same or no use for more.
    """
    rows = []
    for isa in (NATIVE, VNNI):
        ours = next(r for r in result["rows"] if r["name"] == "bitdistill" and r["weights"] == _named(OURS, isa))
        for column, kind, target in TARGETS_OF_SPEED:
            rivals = [r for r in result["rows"] if _is_rival(r, kind, isa) and column in r]
            claim = f"CPU {column}, {_kind(isa)}: {target}x as fast as the best {kind} runner"
            source, command = "paper: 427 -> 1,135 tokens/s" if kind == FULL else "aim", "bench/peers.py"
            if not rivals or column not in ours:
                rows.append(row(claim, source, command, target, why="not in the committed run"))
                continue
            best = max(rivals, key=lambda r: r[column]["median"])
            words = f"{best['name']}, {best['weights'].split(',')[0]} {best[column]['flags']}".strip()
            rows.append(row(f"{claim} ({words})", source, command, target, *_ratio(ours[column], best[column])))
        if "batch 16" in ours and "decode 16" in ours:
            claim = f"CPU batch 16, {_kind(isa)}: 3x as fast as one sequence"
            rows.append(row(claim, "aim", "bench/peers.py", 3.0, *_ratio(ours["batch 16"], ours["decode 16"])))
    return rows


def _named(weights: str, isa: str) -> str:
    return weights if isa == NATIVE else f"{weights}, {isa}"


def _kind(isa: str) -> str:
    return "the processor as it is" if isa == NATIVE else f"{isa}, no AMX"


def _is_rival(one: dict, kind: str, isa: str) -> bool:
    """A runner of a kind that is compared with ours under an instruction set.

    Only llama.cpp's few-bit products and transformers use AMX, so there is another build, or a forced set, of these.
    """
    name, weights, *forced = one["name"], *one["weights"].split(", ")
    if name == "bitdistill" or (weights in FULL_TYPES) != (kind == FULL):
        return False
    if name == "transformers":
        return isa == NATIVE if VNNI not in forced else isa != NATIVE
    if kind == FULL:
        return True
    return isa == NATIVE if name == "llama.cpp" else isa != NATIVE if name == "llama.cpp-no-amx" else True


def _ratio(ours: dict, theirs: dict) -> tuple[float, list[float]]:
    """Of the medians; then the least and the greatest of their rounds."""
    spread = [ours["min"] / theirs["max"], ours["max"] / theirs["min"]]
    return ours["median"] / theirs["median"], spread


def gpu_rows() -> list[dict]:
    """From the latest committed run of bench/gpu_proof.py; without one: not measured."""
    files = sorted((ROOT / "bench" / "results" / "gpu").glob("*.json"))
    measured = json.loads(files[-1].read_text())["rows"] if files else []
    rows = []
    for claim, section, target in (
        (f"GPU decode 2.33x bf16 ({SHAPE})", "decoding", 2.33),
        (f"GPU training step at least as fast as bf16's ({SHAPE})", "training step", 1.0),
    ):
        found = [one for one in measured if one["section"].startswith(section) and one["target"]["kind"] == "speedup"]
        found = [one for one in found if one["what"].startswith((SHAPE, "exact")) and one["figure"] is not None]
        value = found[0]["figure"] if found else None
        rows.append(row(claim, "paper and aims", "bench/gpu_proof.py", target, value, why="no run on a GPU yet"))
    return rows


def cpu_training_rows(folder: Path = ROOT / "bench" / "results" / "cpu") -> list[dict]:
    """From the committed runs of bench/cpu_training.py, training_*.json; what no run has: not measured."""
    measured = {}
    for path in sorted(folder.glob("training_*.json")):
        for one in json.loads(path.read_text())["targets"]:
            for isa, ratio in ((one["isa"], one["ratio"]), (NATIVE, one["native"])):
                if ratio is not None:
                    measured[isa, one["what"]] = ratio
    rows = []
    for isa, what, _, _, _, target in cpu_training.TARGETS:
        for where in (isa, NATIVE) if isa == VNNI else (isa,):
            claim = f"CPU training ({'the processor as it is' if where == NATIVE else where}): {what}"
            value = measured.get((where, what))
            why = "no run on such a CPU yet"
            rows.append(row(claim, "aim", "bench/cpu_training.py", target, value, "one run", why=why))
    return rows


def accuracy_rows(folder: Path = ROOT / "bench" / "results" / "studies") -> list[dict]:
    """From the latest study of each task (`difference_to_fp16_sft`, bench/study.py); without one: not measured."""
    studies = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    studies.sort(key=lambda study: study.get("machine", {}).get("date", ""))
    rows = []
    for task in ("sst2", "qnli", "mnli"):
        claim = f"{ACCURACY} {task}"
        found = [study for study in studies if task in study.get("difference_to_fp16_sft", {})]
        if not found:
            rows.append(row(claim, "paper, table 1", "bench/study.py", -1.0, why="no study yet"))
            continue
        one, command = (
            found[-1]["difference_to_fp16_sft"][task],
            f"bench/study.py bench/studies/{found[-1]['name']}.yaml",
        )
        rows.append(row(claim, "paper, table 1", command, -1.0, one["points"], one["interval"], "points"))
    return rows


def markdown(report: dict, headlines: bool = False) -> str:
    """The table for docs/claims.md, or with `headlines` its main rows, for README.md."""
    at, threads = report["machine"], report["threads"]
    rows = [one for one in report["rows"] if not headlines or one["claim"].startswith(HEADLINES)]
    lines = [
        BEGIN,
        f"Measured {at['date'][:10]} on {at['processor']}, {threads} thread{'s' * (threads > 1)}, commit {at['commit']}.",
        "",
        "| claim | measured | spread | holds | command |",
        "|---|---|---|---|---|",
    ]
    for one in rows:
        unit = "x" if one["unit"] == "x" else f" {one['unit']}"
        if one["measured"] is None:
            cells = [f"not measured ({one['why']})", "", NOT_MEASURED]
        else:
            spread = one["spread"] or "exact"
            spread = spread if isinstance(spread, str) else f"{spread[0]:.2f} to {spread[1]:.2f}"
            cells = [f"{one['measured']:.2f}{unit}", spread, one["holds"]]
        lines.append(f"| {one['claim']} | {' | '.join(cells)} | `{one['command']}` |")
    return "\n".join([*lines, END])


def into_page(text: str, report: dict, headlines: bool = False) -> str:
    """`text` with the table between its two markers.

    Raises:
        ValueError: the markers are missing.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(
            f"page: expected the lines {BEGIN!r} and {END!r}; got neither. Put them where the table belongs."
        )
    return text[: text.index(BEGIN)] + markdown(report, headlines) + text[text.index(END) + len(END) :]


def main() -> int:
    """Measures or reads, prints, and says with its status whether every measured claim holds."""
    openmp.wait_briefly()
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama_bench", action="append", default=[], metavar="PATH")
    parser.add_argument("--folder", type=Path, help="keeps the model files here")
    parser.add_argument("--peers", metavar="FILE", help="speeds from a --json file of bench/peers.py, not a new run")
    parser.add_argument("--resident", metavar="FILE", help="memory from a --json file of bench/resident.py")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument(
        "--from",
        dest="source",
        metavar="FILE",
        help="a --json file of an earlier run: only committed results are read again",
    )
    parser.add_argument("--page", metavar="FILE", help="writes the table there")
    parser.add_argument("--readme", metavar="FILE", help="writes the main rows of the table there")
    arguments = parser.parse_args()
    if arguments.source:
        report = json.loads(Path(arguments.source).read_text())
        again = {one["claim"]: one for one in [*gpu_rows(), *cpu_training_rows(), *accuracy_rows()]}
        report["rows"] = [again.get(one["claim"], one) for one in report["rows"]]
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = arguments.folder or Path(temporary)
            sizes = size_rows(folder)
            earlier = json.loads(Path(arguments.resident).read_text()) if arguments.resident else None
            memory = memory_rows(folder, earlier)
            if arguments.peers:
                earlier = json.loads(Path(arguments.peers).read_text())
                result, where = next(one for one in earlier["results"] if one["shape"] == SHAPE), earlier["machine"]
            else:
                arguments.contexts, arguments.prefill, arguments.batch, arguments.tokens = (
                    [16, 2048],
                    [128, 512],
                    [16],
                    32,
                )
                arguments.ours_only, arguments.leave_out, arguments.isa = False, [], [VNNI]
                arguments.only, arguments.seconds, arguments.wait = None, 0.0, False
                peers.add_llama_bench_on_path(arguments)
                where = machine()
                result = peers.measure(SHAPE, arguments, folder, Bandwidth(arguments.threads))
        rows = [*sizes, *memory, *speed_rows(result), *gpu_rows(), *cpu_training_rows(), *accuracy_rows()]
        report = {"machine": where, "threads": result["threads"], "rows": rows}
    print(markdown(report))
    if arguments.json:
        write_json(arguments.json, report)
    for file, headlines in ((arguments.page, False), (arguments.readme, True)):
        if file:
            page = Path(file)
            page.write_text(into_page(page.read_text(), report, headlines))
    return 1 if any(one["holds"] == "does not hold" for one in report["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
