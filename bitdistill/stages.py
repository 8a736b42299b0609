"""The stages of a run: what each stands on, whether it must run again and why, and how its result becomes whole.

    base -> teacher ------------------\\
    base -> refine -> pretrain -> distill -> evaluate -> export        (base: the embedded demo's own base model)
    base -> cache ----/              /                                 (cache: teacher logits for stage 2, if wanted)
    base -> baseline ----------------/

A stage's folder holds `done.json`: the settings and the inputs that its result depends on, and an `id` drawn when it
finished. A stage is skipped when both are as they were; so a changed setting reruns the stage, its new id reruns what
stands on it, and the reason is said.
"""

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitdistill.distributed.checkpoint import save_folder_atomically
from bitdistill.errors import UserError

AFTER = {
    "base": (),
    "teacher": ("base",),
    "refine": ("base",),
    "cache": ("base",),
    "pretrain": ("refine", "cache"),
    "distill": ("pretrain", "teacher"),
    "baseline": ("base",),
    "evaluate": ("teacher", "distill", "baseline"),
    "export": ("distill", "baseline", "evaluate"),
}
OPTIONAL = ("cache",)  # left out, it has no place to fill: what it stands on itself does not matter
ENOUGH = ("cache.blocks",)  # settings of which a finished stage may hold more than is wanted


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


class RunDirectory:
    """The results of a run's stages on disk.

    Args:
        root: RUN.
        stages: the stages that this run has, a subset of AFTER (a run on a given base model has no `base`).
    """

    def __init__(self, root: str | Path, stages: tuple[str, ...]):
        self.root = Path(root)
        self.stages = tuple(stage for stage in AFTER if stage in stages)

    def folder(self, stage: str) -> Path:
        return self.root / stage

    def checkpoints(self, stage: str) -> Path:
        return self.root / "checkpoints" / stage

    def inputs(self, stage: str) -> tuple[str, ...]:
        """The stages of this run that a stage stands on; a stage left out is replaced by what it would stand on itself."""
        found: dict[str, None] = {}
        for name in AFTER[stage]:
            if name in self.stages:
                found[name] = None
            elif name not in OPTIONAL:
                found |= dict.fromkeys(self.inputs(name))
        return tuple(found)

    def done(self, stage: str) -> dict[str, Any] | None:
        """done.json of a finished stage, else None."""
        path = self.folder(stage) / "done.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def reason_to_run(self, stage: str, settings: dict[str, Any]) -> str | None:
        """Why the stage must run, or None when its result still stands."""
        done = self.done(stage)
        if done is None:
            return "not run yet"
        before, now = done["settings"], json.loads(json.dumps(flatten(settings)))
        changed = [
            name
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name) and not (name in ENOUGH and before.get(name, 0) > now.get(name, 0))
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
        """Raises UserError when a stage that this one stands on has no result yet."""
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
            (folder / "done.json").write_text(json.dumps(done, indent=1))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
