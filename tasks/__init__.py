"""The core's stages as Prefect tasks, MLflow tracking and DVC versioning. No arithmetic here.

Importing this package sets environment defaults, which Prefect, MLflow and DVC read when they are imported; a value
that is already set wins.
"""

import os
from pathlib import Path

# PREFECT_HOME below the project keeps runs together; the profile chosen with `prefect config` stays in force.
_PREFECT_PROFILES = Path.home() / ".prefect" / "profiles.toml"
if "PREFECT_HOME" not in os.environ and _PREFECT_PROFILES.is_file():
    os.environ.setdefault("PREFECT_PROFILES_PATH", str(_PREFECT_PROFILES))

for _name, _value in {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # a dead tracking server costs seconds, once
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "PREFECT_HOME": str(Path.cwd() / ".prefect"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # the default, 20, is too short for a first start
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
}.items():
    os.environ.setdefault(_name, _value)
