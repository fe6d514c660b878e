"""Code and configuration as one archive, named by the hash of what is in it."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

LAUNCH = ".launch"  # folder in the archive with this program's part on the worker


def pack(root: Path, extra: Sequence[Path], out: Path) -> tuple[str, Path]:
    """(hash, archive) of the files of a git checkout, tracked or untracked but not ignored, as they are now.

    extra: files that are put at the top beside them.  The same contents give the same hash and the same bytes,
    whatever their times and owners.  Raises ValueError where there is no checkout, or a file of that name already.
    """
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True
    )
    if listed.returncode:
        raise ValueError(f"--code {root}: not a git checkout ({listed.stderr.decode(errors='replace').strip()})")
    members = {name: root / name for name in listed.stdout.decode().split("\0") if name}
    members = {name: path for name, path in members.items() if os.path.lexists(path) and not path.is_dir()}
    if not members:
        raise ValueError(f"--code {root}: no files there")
    for path in extra:
        if path.name in members:
            raise ValueError(f"--file {path}: the code has a file {path.name} at its top already; rename one")
        if not path.is_file():
            raise ValueError(f"--file {path}: no such file")
        members[path.name] = path
    members[f"{LAUNCH}/supervise.py"] = Path(__file__).with_name("supervise.py")
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name in sorted(members):
            add(tar, name, members[name])
    digest = hashlib.sha256(raw.getvalue()).hexdigest()[:16]
    archive = out / f"jaxtrain-{digest}.tar.gz"
    with archive.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        packed.write(raw.getvalue())
    return digest, archive


def add(tar: tarfile.TarFile, name: str, path: Path) -> None:
    info = tarfile.TarInfo(name)
    if path.is_symlink():
        info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)
        tar.addfile(info)
        return
    content = path.read_bytes()
    info.size, info.mode = len(content), 0o755 if os.access(path, os.X_OK) else 0o644
    tar.addfile(info, io.BytesIO(content))
