"""The Prefect server of a flow that is started from a terminal."""

import atexit
import signal
import subprocess
from urllib.error import HTTPError
from urllib.request import urlopen

from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE


def start_temporary_server() -> None:
    """Starts a server that outlives Ctrl-C, unless one is configured; that one must answer.

    A terminal sends SIGINT to every process it started. A server that dies of it cannot record how the run ended, and
    Prefect would ask it for a minute. The server inherits the blocked signal; this process is unblocked again.

    Raises:
        ValueError: nothing answers at PREFECT_API_URL.
    """
    if (url := PREFECT_API_URL.value()) is not None:
        return _require_answer(url)
    if PREFECT_SERVER_ALLOW_EPHEMERAL_MODE.value():
        server = SubprocessASGIServer()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            server.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if server.server_process is not None:
            _end_with_this_process(server.server_process.pid)


def _end_with_this_process(pid: int) -> None:
    """Ends process `pid` when this one is killed, which stops no server at its exit: its end of a pipe closes."""
    watch = subprocess.Popen(
        ["sh", "-c", f"cat; kill {pid}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a terminal's Ctrl-C is not for it
    )
    atexit.register(watch.terminate)  # runs before the server's own, which is older


def _require_answer(url: str) -> None:
    try:
        urlopen(f"{url.rstrip('/')}/health", timeout=10).close()
    except HTTPError:
        return  # it answers
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the Prefect server must answer; got PREFECT_API_URL={url} ({error}); start it with "
            "`prefect server start`, or unset the variable for a temporary one"
        ) from None
