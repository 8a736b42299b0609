"""A short description of local files and folders that changes when their content does, and not when only their dates do.

It consists of names, sizes and digests of the content. A file is read once: its digest is remembered together with what the
system records about the file (size, both times, inode), and no program can set the time of its last change. When the files
are very large together, only pieces are read, spread evenly over each file.
"""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from bitdistill.files import write_whole

WHOLE_BYTES = 4 << 30  # of one source that are read; some seconds
PIECE_BYTES = 1 << 20
# A file changed twice within one tick of the file system's clock has the same times both times: nothing so fresh is remembered.
FRESH_SECONDS = 2


class Identities:
    """The identities of sources, and a memory of the digests in them.

    Args:
        memory: a file for the memory, which may be absent or damaged; None remembers only as long as this object lives.
        keep: write it; for one process per file.
    """

    def __init__(self, memory: Path | None = None, keep: bool = True):
        self._file = memory if keep else None
        self._known: dict[str, list] = {}
        if memory is not None:
            with contextlib.suppress(OSError, ValueError):
                content = json.loads(memory.read_text(encoding="utf-8"))
                lines = content.items() if isinstance(content, dict) else ()
                self._known = {name: line for name, line in lines if isinstance(line, list) and len(line) == 6}

    def of(self, source: str | Path | None) -> list[str] | str | None:
        """A line for each file of a local file or folder, hidden ones left out; a hub id stands for itself, None for nothing."""
        if source is None:
            return None
        path = Path(os.path.expanduser(source)).resolve()
        if not path.exists():
            return str(source)
        files = {path.name: path}
        if path.is_dir():
            below = {file.relative_to(path): file for file in sorted(path.rglob("*")) if file.is_file()}
            shown = {name: file for name, file in below.items() if not any(part[0] == "." for part in name.parts)}
            files = {name.as_posix(): file for name, file in shown.items()}
        sizes = {name: file.stat().st_size for name, file in files.items()}
        share = min(1.0, WHOLE_BYTES / max(1, sum(sizes.values())))
        before = dict(self._known)
        found = [f"{name}:{sizes[name]}:{self._digest(file, share)}" for name, file in files.items()]
        if self._file is not None and before != self._known:
            write_whole(self._file, json.dumps(self._known))
        return found

    def _digest(self, file: Path, share: float) -> str:
        status = file.stat()
        pieces = None if share == 1 else max(2, int(share * status.st_size / PIECE_BYTES))
        signature = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, pieces]
        *remembered, digest = self._known.get(str(file)) or [None]
        if remembered == signature:
            return digest
        digest = digest_of(file, pieces)
        if time.time() - status.st_ctime > FRESH_SECONDS:
            self._known[str(file)] = [*signature, digest]
        return digest


def digest_of(file: Path, pieces: int | None = None) -> str:
    """The first 16 hex digits of the SHA-256 of a file, or of so many evenly spread pieces of it.

    Args:
        file: its path. pieces: of PIECE_BYTES each, the first and the last included; None reads all.
    """
    size = file.stat().st_size
    with file.open("rb") as content:
        if pieces is None or pieces * PIECE_BYTES >= size:
            return hashlib.file_digest(content, "sha256").hexdigest()[:16]
        found = hashlib.sha256()
        for i in range(pieces):
            content.seek(i * (size - PIECE_BYTES) // (pieces - 1))
            found.update(content.read(PIECE_BYTES))
    return found.hexdigest()[:16]
