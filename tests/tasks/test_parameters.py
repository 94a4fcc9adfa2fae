"""Parameters on their way to MLflow."""

from tasks.parameters import flatten


def test_flatten_joins_names_and_keeps_lists() -> None:
    nested = {"base": {"checkpoint": None, "scratch": {"seed": 0}}, "distill": {"distill_layers": [-2]}}
    expected = {"base.checkpoint": None, "base.scratch.seed": 0, "distill.distill_layers": [-2]}
    assert flatten(nested) == expected
    assert flatten(expected) == expected
