"""The results of a run's stages on disk: which of them exist, whether a stage must run again and why, and how a result is
written such that it is always complete. The table of stages is in train.py.

The folder of a stage holds `done.json`: the settings and the inputs that its result depends on, and an `id` that is drawn
when the stage finishes. A stage is skipped when both are unchanged. If a setting changes, its stage runs again. The new id
then makes the stages that depend on it run again, too. In each case the reason is printed.
"""

import json
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitdistill.distributed.checkpoint import save_folder_atomically
from bitdistill.errors import UserError
from bitdistill.files import write_whole

# Settings of which a finished stage may hold more than is wanted: a cache of more blocks serves a run that needs fewer.
MORE_IS_ENOUGH = ("cache.blocks",)
# Stages that leave nothing to do in their place when a run does not have them.
WITHOUT_SUBSTITUTE = ("cache", "teacher_cache")
# Settings that results of earlier versions do not name: they count as unchanged where nothing is written down.
ADDED_LATER = ("corpus blocks.block_size", "corpus blocks.seed")
NOT_RUN = "not run yet"
BELONGS_TO = "settings.json"  # in a folder of checkpoints: the settings and inputs that they belong to


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


@dataclass(frozen=True)
class Stage:
    """One row of the table in train.py.

    Args:
        depends_on: the stages whose results it needs.
        part_of_run: settings -> whether a run with these settings has this stage.
        reads: names of the settings and files that its result depends on.
        do: the function that does it, given what the stages of the run share.
    """

    depends_on: tuple[str, ...]
    part_of_run: Callable[[Any], bool]
    reads: tuple[str, ...]
    do: Callable[[Any], None]


class RunDirectory:
    """The results of a run's stages on disk.

    Args:
        root: RUN.
        depends_on: every stage that there is -> the stages whose results it needs, in the order in which they run.
        stages: those that this run has (a run on a given base model has no `base`).
    """

    def __init__(
        self,
        root: str | Path,
        depends_on: dict[str, tuple[str, ...]],
        stages: Collection[str],
    ):
        self.root = Path(root)
        self.depends_on = depends_on
        self.stages = tuple(stage for stage in depends_on if stage in stages)

    def folder(self, stage: str) -> Path:
        return self.root / stage

    def checkpoints(self, stage: str) -> Path:
        return self.root / "checkpoints" / stage

    def inputs(self, stage: str) -> tuple[str, ...]:
        """The stages of this run that a stage needs; one that the run does not have is replaced by those that it needs."""
        found: dict[str, None] = {}
        for name in self.depends_on[stage]:
            if name in self.stages:
                found[name] = None
            elif name not in WITHOUT_SUBSTITUTE:
                found |= dict.fromkeys(self.inputs(name))
        return tuple(found)

    def done(self, stage: str) -> dict[str, Any] | None:
        """done.json of a finished stage, else None."""
        path = self.folder(stage) / "done.json"
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            kinds = {"id": str, "settings": dict, "inputs": dict}
            if not isinstance(found, dict) or any(not isinstance(found.get(key), kinds[key]) for key in kinds):
                raise ValueError(f"something else: {_short(found)}")
        except (ValueError, RecursionError) as error:
            do = f"Restore {path}, or move {path.parent} away to run the stage again."
            raise UserError(str(path), expected="the record of a finished stage", got=str(error), do=do) from error
        return found

    def reason_to_run(self, stage: str, settings: dict[str, Any]) -> str | None:
        """Why the stage must run, or None when its result still stands."""
        done = self.done(stage)
        if done is None:
            return NOT_RUN
        before, now = done["settings"], json.loads(json.dumps(flatten(settings)))
        changed = [
            name
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
            and not (name in ADDED_LATER and name not in before)
            and not (name in MORE_IS_ENOUGH and before.get(name, 0) > now.get(name, 0))
        ]
        if changed:
            name = changed[0]
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            return f"{name} changed from {_short(before.get(name))} to {_short(now.get(name))}{more}"
        for name in self.inputs(stage):
            current = self.done(name)
            if current is None or current["id"] != done["inputs"].get(name):
                return f"{name} was run again"
        return None

    def require_inputs(self, stage: str) -> None:
        """Raises UserError when a stage that this one depends on has no result yet."""
        for name in self.inputs(stage):
            if self.done(name) is None:
                raise UserError(
                    "stage",
                    expected=f"a finished `{name}` before `{stage}`",
                    got=f"none in {self.folder(name)}",
                    do=f"Run --stage {name} first, or --stage all.",
                )

    def open_checkpoints(self, stage: str, belongs_to: dict[str, Any], restart: bool = False) -> str | None:
        """Makes `checkpoints(stage)` the place for unfinished work of these settings. Nothing is deleted unless asked.

        Unfinished work of other settings is moved to RUN/checkpoints/aside; when it was of these settings and lies there, it
        is fetched back. One process (rank 0) may call it.

        Args:
            stage: its name. belongs_to: what the work depends on, as nested settings.
            restart: discard unfinished work of this stage, also what lies aside.

        Returns: what was done with earlier work, in words; None when there was nothing to do.
        """
        folder, aside = self.checkpoints(stage), self.root / "checkpoints" / "aside"
        now = json.loads(json.dumps(belongs_to))
        set_aside = sorted(aside.glob(f"{stage}-*"), key=lambda path: path.stat().st_mtime_ns)
        said = None
        if restart:
            discarded = [path for path in (folder, *set_aside) if _has_work(path)]
            for path in (folder, *set_aside):
                shutil.rmtree(path, ignore_errors=True)
            said = f"--restart discards {', '.join(map(str, discarded))}" if discarded else None
            set_aside = []
        known = _known(folder)
        if known == now:
            return said
        if _has_work(folder):
            number = 1 + max((int(path.name.rpartition("-")[2]) for path in set_aside), default=0)
            kept = aside / f"{stage}-{number}"
            aside.mkdir(parents=True, exist_ok=True)
            folder.rename(kept)
            said = f"earlier checkpoints belong to other settings ({_first_change(known, now)}): kept in {kept}"
        shutil.rmtree(folder, ignore_errors=True)
        same = [path for path in set_aside if _known(path) == now]
        if same:
            same[-1].rename(folder)
            found = f"checkpoints of these settings were found in {same[-1]}"
            return f"{said}; {found}" if said else found
        folder.mkdir(parents=True)
        write_whole(folder / BELONGS_TO, json.dumps(now))
        return said

    def has_checkpoints(self, stage: str) -> bool:
        """Whether there is unfinished work of a stage to go on with."""
        return _has_work(self.checkpoints(stage))

    def step_rows(self, stage: str, settings: dict[str, Any], per_rank: int) -> int | None:
        """Rows of an optimizer step, all ranks together, of a stage's unfinished work or of a result that stands.

        Args:
            stage: its name. settings: its present ones; work of others does not count.
            per_rank: rows of one rank by these settings, for checkpoints of earlier versions.

        Returns: the number; None where there is no such work.
        """
        folder, now = self.checkpoints(stage), json.loads(json.dumps(settings))
        if (_known(folder) or {}).get("settings") == now:
            saved = list(folder.glob("checkpoint-*/complete.json"))
            for marker in sorted(saved, key=lambda path: int(path.parent.name.rpartition("-")[2]), reverse=True):
                state, complete = _read_json(marker.with_name("bitdistill_state.json")), _read_json(marker)
                if state is not None and complete is not None:
                    return state.get("step_rows", per_rank * complete["world_size"])
        done = self.done(stage)
        if done is not None and self.reason_to_run(stage, settings) is None:
            return done.get("step_rows")
        return None

    @contextmanager
    def result(self, stage: str, settings: dict[str, Any], facts: dict[str, Any]) -> Iterator[Path]:
        """A temporary folder that becomes the stage's result, whole, when the block ends without an error.

        Args:
            stage: its name.
            settings: what the result depends on.
            facts: numbers worth keeping in done.json (seconds, steps, ...); may be filled inside the block.
        """
        with save_folder_atomically(self.folder(stage)) as folder:
            yield folder
            done = {
                "stage": stage,
                "id": uuid.uuid4().hex,
                "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "settings": flatten(settings),
                "inputs": {name: self.done(name)["id"] for name in self.inputs(stage)},
                **facts,
            }
            (folder / "done.json").write_text(json.dumps(done, indent=1), encoding="utf-8")


def _has_work(folder: Path) -> bool:
    return any(folder.glob("checkpoint-*")) or any(folder.glob("shard-*"))


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None when it is absent or damaged, which is as good as no file here."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _known(folder: Path) -> Any:
    """What a folder of checkpoints belongs to. Earlier versions wrote down the engine, which does not matter any more."""
    known = _read_json(folder / BELONGS_TO)
    if isinstance(known, dict):
        known.pop("engine", None)
    return known


def _first_change(known: Any, now: dict[str, Any]) -> str:
    before, after = flatten(known) if isinstance(known, dict) else {}, flatten(now)
    name = next(name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name))
    return f"{name.removeprefix('settings.')} was {_short(before.get(name))} and is {_short(after.get(name))}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
