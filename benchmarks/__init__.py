"""Timed comparisons with other CPU engines. Never tests: what must hold is in tests/."""
