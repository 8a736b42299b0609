"""What every entry sets before it imports large libraries: threads, folders that libraries write to, and no telemetry.

All of it is passed to the libraries in environment variables, which they read when they are imported. Variables that the
user has set stay as they are.
"""

import importlib.util
import os
import sys
from pathlib import Path

from bitdistill import console, folders
from bitdistill.cpus import available_cpus
from bitdistill.distributed import openmp
from bitdistill.errors import UserError

# Libraries that keep a cache below the home: variable -> the folder below ~/.cache or ~ that it stands for.
CACHES = {
    "HF_DATASETS_CACHE": ".cache/huggingface/datasets",
    "HF_MODULES_CACHE": ".cache/huggingface/modules",
    "MPLCONFIGDIR": ".config/matplotlib",
    "TRITON_CACHE_DIR": ".triton/cache",
}
# What the main job imports sooner or later, some of it only for the report at the end.
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "safetensors", "tokenizers", "numba", "numpy", "scipy")
LIBRARIES += ("jsonargparse", "yaml", "rich", "tqdm", "matplotlib", "jinja2")
SILENT = {"HF_HUB_DISABLE_TELEMETRY": "1", "DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
SAFE = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}  # torch.load runs no code of a file, also where a library asks it to


def prepare(trains: bool = True) -> None:
    """Sets up this process and those that it starts. Call it first in an entry, before numpy or torch are imported.

    Args:
        trains: whether the libraries of the main job will be used. For other commands their caches are moved, too, but not aloud.

    * OpenMP's waiting threads sleep soon (openmp.py).
    * A user without a home (no HOME and no passwd entry) gets a folder among the temporary files as home; a home that cannot
      be written to stays, and the caches of the libraries move to such a folder. Both are said on stderr.
    * Libraries send no usage statistics, and unpickle nothing but plain data.
    """
    openmp.wait_briefly()
    for name, value in (SILENT | SAFE).items():
        os.environ.setdefault(name, value)
    _settle_home(trains)
    _name_user()


def require_libraries() -> None:
    """Ends the process with status 2 and one line where a library is missing that the main job needs, now or at its end."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        do = "Install them: pip install 'bitdistill[train]'."
        error = UserError(
            "command line", expected="the libraries that training needs", got=f"no {', '.join(missing)}", do=do
        )
        sys.exit(console.complain(error))


def limit_threads() -> None:
    """Sizes the thread pools of OpenMP and BLAS to the CPUs of this process, where OMP_NUM_THREADS does not say otherwise.

    For an entry with a single process; `process_group.initialize` divides them among the ranks of a machine.
    """
    if not os.environ.get("OMP_NUM_THREADS"):
        os.environ["OMP_NUM_THREADS"] = str(available_cpus())


def _settle_home(aloud: bool) -> None:
    home = folders.home()
    if home is None:
        temporary = folders.private_folder()
        os.environ["HOME"] = str(temporary)
        _say(f"HOME is not set and user {_user()} has no passwd entry: files of the libraries go to {temporary}")
        return
    cache = os.environ.get("XDG_CACHE_HOME")
    moved = []
    for variable, place in CACHES.items():
        if variable in os.environ:
            continue
        folder = home / place
        if variable.startswith("HF_"):
            top = Path(os.path.expanduser(os.environ.get("HF_HOME") or Path(cache or home / ".cache") / "huggingface"))
            folder = top / folder.name
        if not _can_be_written(folder):
            moved.append(variable)
            os.environ[variable] = str(folders.private_folder() / variable.lower())
    if moved and aloud:
        _say(f"{home} cannot be written to: {', '.join(moved)} point to {folders.private_folder()}")


def _can_be_written(folder: Path) -> bool:
    """Whether `folder` is, or could be made, writable; nothing is made: it may never be needed."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK) and not _mounted_read_only(folder)


def _mounted_read_only(folder: Path) -> bool:
    if not hasattr(os, "statvfs"):
        return False
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


def _name_user() -> None:
    """A user without a passwd entry gets a name: libraries ask getpass.getuser for one, which raises KeyError then."""
    import getpass

    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["USER"] = f"user-{_user()}"


def _user() -> int:
    return getattr(os, "getuid", int)()


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"bitdistill: {text}", file=sys.stderr)
