"""Progress on stderr: a bar with rate and time left on a terminal, a line now and then elsewhere."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(name: str, *, total: int | None, initial: int = 0, unit: str = "it") -> Any:
    """A tqdm bar on stderr. Where stderr is no terminal it prints a line every 20 seconds."""
    is_terminal = sys.stderr.isatty()
    return tqdm(
        desc=name,
        total=total,
        initial=initial,
        unit=unit,
        file=sys.stderr,
        dynamic_ncols=is_terminal,
        ascii=not is_terminal,
        mininterval=0.2 if is_terminal else 20.0,
        maxinterval=1.0 if is_terminal else 60.0,
    )
