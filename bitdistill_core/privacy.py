"""What leaves the machine, to MLflow or in a report, without what is private in it."""

import re
from pathlib import Path


def without_private(text: str) -> str:
    """`text` without credentials in addresses, and an absolute path without the directories that lead to it.

    A path below the current directory becomes relative to it.
    """
    text = re.sub(r"://[^/@\s]+@", "://", text)
    if text.startswith(("/", "~")) or re.match(r"[A-Za-z]:[\\/]", text):
        path = Path(text)
        return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else f".../{path.name}"
    return text
