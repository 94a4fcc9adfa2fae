"""What a scale costs before it is run: tokens, arithmetic and hours, each shared stage counted once."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from bitdistill_core.config import BlocksSection, DistillConfig, PretrainConfig, TaskSection
from bitdistill_core.tables.cell import Step, chain
from bitdistill_core.tables.plan import Cell, Plan

FORWARD, TRAINING = 2, 6  # floating-point operations a weight and token


@dataclass(frozen=True)
class Cost:
    """One training stage."""

    recipe: str
    stage: str
    tokens: float
    flops: float


def estimate(plan: Plan, *, teraflops: float = 150.0) -> str:
    """A Markdown table of the work of every training stage of a plan.

    A weight costs 6 operations a token in training and 2 in a teacher's forward pass. Evaluation, attention and
    quantisation are left out, and so is what `drop_contained` spares, which only the data tells.

    Args:
        teraflops: what the machine reaches in training; an H100 in bfloat16 about 150 on models this small.
    Raises:
        ValueError: the plan lacks a model's num_parameters, or a task's num_train_examples or tokens_per_example.
    """
    costs: dict[str, Cost] = {}
    for cell in plan.cells():
        for step in chain(plan, cell).before():
            cost = _cost(plan, cell, step)
            if cost is not None:
                costs[cost.recipe] = cost
    lines = ["| stage | runs | tokens | 10^18 operations | hours |", "|---|---|---|---|---|"]
    for stage in dict.fromkeys(cost.stage for cost in costs.values()):
        lines.append(_line(stage, [cost for cost in costs.values() if cost.stage == stage], teraflops))
    lines.append(_line("total", costs.values(), teraflops))
    head = f"{plan.scale.description}: {len(plan.cells())} cells, at {teraflops:g} teraflops a second\n\n"
    return head + "\n".join(lines)


def _line(name: str, costs: Iterable[Cost], teraflops: float) -> str:
    costs = list(costs)
    flops = sum(cost.flops for cost in costs)
    tokens = sum(cost.tokens for cost in costs)
    return f"| {name} | {len(costs)} | {tokens:.3g} | {flops / 1e18:.3g} | {flops / teraflops / 1e12 / 3600:.3g} |"


def _cost(plan: Plan, cell: Cell, step: Step) -> Cost | None:
    config = step.config
    # a teacher of another size is that model's own stage
    owner = plan.methods[cell.method].teacher_model or cell.model
    model = plan.scale.models[owner if step.name == "teacher" else cell.model]
    if step.name == "base" or not isinstance(config, BlocksSection | TaskSection):
        return None
    weights = model.num_parameters
    if weights is None:
        raise ValueError(f"an estimate needs num_parameters of model={cell.model}; add it to tables/{plan.name}.yaml")
    if isinstance(config, BlocksSection):
        tokens, available = float(config.num_tokens), math.inf
    else:
        available = float(_examples(plan, cell) * _tokens_per_example(plan, cell))
        tokens = config.num_epochs * available
    guide = plan.scale.models[owner if step.name == "distill" else cell.model].num_parameters or weights
    flops = tokens * TRAINING * weights
    if isinstance(config, PretrainConfig | DistillConfig):
        flops += tokens * FORWARD * guide * config.has_taught_loss
        if config.blockwise.num_epochs:
            held = min(available, config.blockwise.num_tokens)  # each passes teacher and finished student once
            flops += held * (config.blockwise.num_epochs * TRAINING * weights + FORWARD * (weights + guide))
            tokens += config.blockwise.num_epochs * held
    return Cost(step.recipe, step.name, tokens, flops) if tokens else None


def _examples(plan: Plan, cell: Cell) -> int:
    limit = plan.params(cell).data.max_train_examples
    official = plan.scale.tasks[cell.task].num_train_examples
    if official is None:
        raise ValueError(f"an estimate needs num_train_examples of task={cell.task}; add it to tables/{plan.name}.yaml")
    return min(limit, official) if limit else official


def _tokens_per_example(plan: Plan, cell: Cell) -> int:
    tokens = plan.scale.tasks[cell.task].tokens_per_example
    if tokens is None:
        raise ValueError(f"an estimate needs tokens_per_example of task={cell.task}; add it to tables/{plan.name}.yaml")
    return tokens
