"""Prefect flows: when which stage runs. `tasks` comes first: it sets environment defaults that Prefect reads."""

import tasks as tasks
