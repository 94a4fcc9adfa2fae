"""Which cells make up the tables: tables/methods.yaml says what each method is, tables/SCALE.yaml how large it is run.

A cell is one model, trained for one task by one method with one seed. Its parameters are params.yaml, then what the
scale, the model, the task and the method change, in that order; a seed is that of fine-tuning and distillation.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from bitdistill_core.config import Params, Section
from bitdistill_core.params import merged, read_yaml, validated

TITLES = {  # the groups that figures and the paper's numbers know
    "table1": "Table 1: text classification",
    "table2": "Table 2: summarisation",
    "table3": "Table 3: backbones",
    "table4": "Table 4: weight quantisers",
    "table5": "Table 5: the stages",
    "table6": "Table 6: the distillation terms",
    "figure3b": "Figure 3b: the distilled layer",
    "figure3c": "Figure 3c: the size of the teacher",
    "options": "Options beyond the paper's tables",
}
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]  # names files and folders of results
NO_SCALE = {"methods", "dvc"}  # files beside those of the scales


@dataclass(frozen=True)
class Cell:
    """One result of a table."""

    model: str
    task: str
    method: str
    seed: int

    @property
    def path(self) -> Path:
        """MODEL/TASK/METHOD/seedN.json, below the folder of cells."""
        return Path(self.model, self.task, self.method, f"seed{self.seed}.json")

    def __str__(self) -> str:
        return f"{self.model} {self.task} {self.method} seed={self.seed}"


class Method(Section):
    """How a cell is trained, as changes of params.yaml."""

    label: str
    result: Literal["teacher", "ptq", "student"] = "student"  # ptq: the teacher, quantised and not trained again
    teacher_model: str | None = None  # the model whose teacher distils; null: the cell's own
    params: dict[str, Any] = Field(default_factory=dict)


class Model(Section):
    """A base model of a scale."""

    label: str
    stands_for: str | None = None  # the model of the paper's tables that it is shown beside
    num_parameters: int | None = None  # for `bitdistill estimate`
    params: dict[str, Any] = Field(default_factory=dict)


class Task(Section):
    """A task of a scale."""

    label: str
    num_train_examples: int | None = None  # for `bitdistill estimate`, like the next
    tokens_per_example: int | None = None
    params: dict[str, Any] = Field(default_factory=dict)


class Group(Section):
    """Every combination of these is a cell."""

    title: str | None = Field(default=None, min_length=1)  # its heading; a group that TITLES lacks needs one
    models: list[str] = Field(min_length=1)
    tasks: list[str] = Field(min_length=1)
    methods: list[str] = Field(min_length=1)
    seeds: list[int] | None = None  # null: the scale's


class Scale(Section):
    """tables/SCALE.yaml."""

    description: str
    seeds: list[int] = Field(min_length=1)
    params: dict[str, Any]
    models: dict[Name, Model]
    tasks: dict[Name, Task]
    methods: dict[Name, Method] = Field(default_factory=dict)  # in addition to tables/methods.yaml
    groups: dict[Name, Group]  # in the order of their worth


class Methods(Section):
    """tables/methods.yaml."""

    methods: dict[Name, Method]


@dataclass(frozen=True)
class Plan:
    """The cells of one scale and their parameters."""

    name: str
    scale: Scale
    methods: Mapping[str, Method]
    defaults: Mapping[str, Any]  # params.yaml

    @property
    def default_results(self) -> Path:
        """Where results are written unless another folder is given."""
        return Path("results", self.name)

    @property
    def default_store(self) -> Path:
        """Where checkpoints are kept unless another folder is given."""
        return Path("runs", "tables", self.name)

    def title(self, group: str) -> str:
        """The heading of a group's table."""
        return self.scale.groups[group].title or TITLES[group]

    def cells(self, groups: Sequence[str] | None = None) -> list[Cell]:
        """The cells of the groups (None: all), each once. Every seed but the first comes after all first seeds.

        Raises:
            ValueError: a group that the scale lacks.
        """
        for name in groups or ():
            _check_known("group", name, self.scale.groups)
        cells = [
            Cell(model, task, method, seed)
            for name, group in self.scale.groups.items()
            if groups is None or name in groups
            for seed, task, model, method in product(
                group.seeds or self.scale.seeds, group.tasks, group.models, group.methods
            )
        ]
        rank = {seed: index for index, seed in enumerate(dict.fromkeys(cell.seed for cell in cells))}
        return sorted(dict.fromkeys(cells), key=lambda cell: rank[cell.seed])

    def find(self, model: str, task: str, method: str, seed: int) -> Cell:
        """The cell of these names, in a group or not.

        Raises:
            ValueError: a model, task or method that the scale lacks, or parameters that do not go together.
        """
        _check_known("model", model, self.scale.models)
        _check_known("task", task, self.scale.tasks)
        _check_known("method", method, self.methods)
        cell = Cell(model, task, method, seed)
        self.params(cell)
        return cell

    def params(self, cell: Cell, *, data_root: str | None = None) -> Params:
        """The parameters of a cell.

        Raises:
            ValueError: a wrong key or value; names the cell.
        """
        changes = (
            self.scale.params,
            self.scale.models[cell.model].params,
            self.scale.tasks[cell.task].params,
            self.methods[cell.method].params,
            {"teacher": {"seed": cell.seed}, "distill": {"seed": cell.seed}},
        )
        values = dict(self.defaults)
        for change in changes:
            values = merged(values, change)
        if data_root is not None:
            values = merged(values, {"data": {"data_root": data_root}})
        try:
            return validated(Params, values)
        except ValueError as error:
            raise ValueError(f"cell {cell}: {error}") from None


def _check_known(kind: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise ValueError(f"unknown {kind}={name}; the {kind}s are {', '.join(known)}")


def list_scales(folder: Path) -> list[str]:
    """The scales that the folder defines."""
    return sorted(path.stem for path in folder.glob("*.yaml") if path.stem not in NO_SCALE)


def read_plan(folder: Path, scale: str, params_file: Path) -> Plan:
    """The plan of a scale, every cell's parameters checked.

    Raises:
        ValueError: an unknown scale, model, task or method, or wrong parameters.
    """
    if scale not in list_scales(folder):
        raise ValueError(f"unknown scale={scale}; {folder} defines {', '.join(list_scales(folder)) or 'none'}")
    definition = validated(Scale, read_yaml(folder / f"{scale}.yaml"))
    methods = {**validated(Methods, read_yaml(folder / "methods.yaml")).methods, **definition.methods}
    plan = Plan(scale, definition, methods, read_yaml(params_file))
    for name, group in definition.groups.items():
        if group.title is None and name not in TITLES:
            raise ValueError(
                f"unknown group={name} in scale={scale}; the groups are {', '.join(TITLES)}; another one needs a title"
            )
        known: dict[str, list[str]] = {
            "models": list(definition.models),
            "tasks": list(definition.tasks),
            "methods": list(methods),
        }
        for kind, names in known.items():
            for entry in getattr(group, kind):
                if entry not in names:
                    raise ValueError(
                        f"group={name} names an unknown entry of {kind}: {entry}; there are {', '.join(known[kind])}"
                    )
    for cell in plan.cells():
        teacher = methods[cell.method].teacher_model
        if teacher is not None and teacher not in definition.models:
            raise ValueError(f"method={cell.method} has an unknown teacher_model={teacher}")
        plan.params(cell)
    return plan
