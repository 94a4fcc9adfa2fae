"""The temporary Prefect server of a flow that is started from a terminal."""

import signal

from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE


def start_temporary_server() -> None:
    """Starts a server that outlives Ctrl-C, unless one is configured.

    A terminal sends SIGINT to every process it started. A server that dies of it cannot record how the run ended, and
    Prefect would ask it for a minute. The server inherits the blocked signal; this process is unblocked again.
    """
    if PREFECT_API_URL.value() is None and PREFECT_SERVER_ALLOW_EPHEMERAL_MODE.value():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            SubprocessASGIServer().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
