"""The results of a run's stages on disk: which are there, whether a stage must run again and why, and how its result becomes
whole. Which stages there are is the table in train.py.

A stage's folder holds `done.json`: the settings and the inputs that its result depends on, and an `id` drawn when it
finished. A stage is skipped when both are as they were; so a changed setting reruns the stage, its new id reruns the
stages that depend on it, and the reason is said.
"""

import json
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitdistill.distributed.checkpoint import save_folder_atomically
from bitdistill.errors import UserError

# Settings of which a finished stage may hold more than is wanted: a cache of more blocks serves a run that needs fewer.
MORE_IS_ENOUGH = ("cache.blocks",)


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def file_identity(source: str | Path | None) -> Any:
    """What changes when a local file or folder changes (names, sizes, modification times); a hub id stands for itself."""
    if source is None or not Path(source).expanduser().exists():
        return None if source is None else str(source)
    path = Path(source).expanduser().resolve()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files if file.is_file()]


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
        without_substitute: stages of which nothing takes the place when the run does not have them.
    """

    def __init__(
        self,
        root: str | Path,
        depends_on: dict[str, tuple[str, ...]],
        stages: Collection[str],
        without_substitute: Collection[str] = ("cache",),
    ):
        self.root = Path(root)
        self.depends_on, self.without_substitute = depends_on, without_substitute
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
            elif name not in self.without_substitute:
                found |= dict.fromkeys(self.inputs(name))
        return tuple(found)

    def done(self, stage: str) -> dict[str, Any] | None:
        """done.json of a finished stage, else None."""
        path = self.folder(stage) / "done.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def reason_to_run(self, stage: str, settings: dict[str, Any]) -> str | None:
        """Why the stage must run, or None when its result still stands."""
        done = self.done(stage)
        if done is None:
            return "not run yet"
        before, now = done["settings"], json.loads(json.dumps(flatten(settings)))
        changed = [
            name
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
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


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
