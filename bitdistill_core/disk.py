"""Files that a crash or a power cut leaves whole: the old one or the new one."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def sync(path: Path) -> None:
    """Waits until a file, or a directory's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
