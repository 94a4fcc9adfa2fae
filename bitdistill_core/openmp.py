"""How OpenMP's threads wait. It is read when PyTorch loads, so set it before."""

import os

# Threads that wait must sleep, or a busy neighbour stalls every step; not at once though, since in small models the
# next work comes within microseconds (docs/LOG.md).
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}


def set_waiting() -> None:
    """Sets what the user has not set."""
    for name, value in WAITING.items():
        os.environ.setdefault(name, value)
