"""The one training loop. Pre-training, teacher fine-tuning and distillation differ in `batches` and `loss_fn` only.

Everything random is a function of (seed, step), so a run that was interrupted continues from its last checkpoint to
the same weights as one that was not.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitdistill_core.choices import Precision, Schedule
from bitdistill_core.disk import sync
from bitdistill_core.errors import one_line
from bitdistill_core.progress import progress_bar
from bitdistill_core.schedules import learning_rate_factor

Report = Callable[[dict[str, float], int], None]
LossParts = dict[str, Tensor]  # weighted parts that add up to the loss
LossFn = Callable[[Any], LossParts]  # of a micro-batch


class MicroBatch(Protocol):
    """What training asks of a micro-batch; the rest is its loss function's."""

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence."""

    def to(self, device: torch.device) -> "MicroBatch":
        """The same batch on a device."""


Batches = Callable[[int], Sequence[MicroBatch]]  # step -> the micro-batches of that step


def fit(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    *,
    name: str,
    title: str | None = None,
    num_steps: int,
    seed: int,
    learning_rate: float,
    schedule: Schedule,
    warmup_ratio: float,
    weight_decay: float,
    adam_beta2: float,
    max_grad_norm: float,
    precision: Precision,
    report_every: int,
    checkpoint_every: int,
    grad_norm_every: int = 0,
    balance_grad_norms: float = 0.0,
    on_step: Callable[[int, int], None] | None = None,
    work_dir: Path,
    device: torch.device,
    report: Report,
) -> dict[str, float]:
    """Trains `model` in place and returns the last reported metrics.

    Reports `NAME/loss`, each part as `NAME/PART`, `NAME/learning_rate`, `NAME/grad_norm`, `NAME/tokens_per_second`
    and, every `grad_norm_every` steps, the norm of each part's gradient over the step as `NAME/grad_norm_PART`. Parts
    are averages over the steps since the last report. Schedule `two_stage` also ends weight decay at the middle step.

    Args:
        balance_grad_norms: every part but `task_loss` is scaled so that its gradient norm, a moving average of those
            measured, stays at so many times that of `task_loss`; 0: the parts as they come.
        title: of the progress bar; None: the name.
        on_step: called with (step, num_steps) before each step.
    Raises:
        ValueError: a loss or gradient that is not finite, at the next report or checkpoint; names the step. The last
            good checkpoint stays.
    """

    def parts_of(batch: Any) -> LossParts:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            return loss_fn(batch)

    model.to(device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = _optimizer(model, learning_rate=learning_rate, weight_decay=weight_decay, adam_beta2=adam_beta2)
    balance = _Balance(balance_grad_norms)
    start = _resume(work_dir, model, optimizer, balance)
    window, last_report, metrics = _Window(name, work_dir), time.perf_counter(), {}
    with progress_bar(title or name, total=num_steps, initial=start, unit="step") as bar:
        for step in range(start, num_steps):
            torch.manual_seed(seed * 1_000_003 + step)
            factor = learning_rate_factor(step, num_steps, schedule=schedule, warmup_ratio=warmup_ratio)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * factor
                if schedule == "two_stage" and step >= num_steps // 2:
                    group["weight_decay"] = 0.0
            if on_step is not None:
                on_step(step, num_steps)
            part_norms: dict[str, float] = {}
            micro_batches = [batch.to(device) for batch in batches(step)]
            if grad_norm_every and step % grad_norm_every == 0:
                part_norms = _part_grad_norms(parts_of, micro_batches, parameters)
                balance.update(part_norms)
                part_norms = {part: norm * balance.scale(part) for part, norm in part_norms.items()}
                torch.manual_seed(seed * 1_000_003 + step)  # the step itself is the same, measured or not
            for batch in micro_batches:
                parts = {part: value * balance.scale(part) for part, value in parts_of(batch).items()}
                loss = torch.stack(list(parts.values())).sum()
                loss.backward()
                window.add(step, {"loss": loss, **parts, "num_tokens": batch.lengths.sum()})
            window.add(step, {"grad_norm": nn.utils.clip_grad_norm_(parameters, max_grad_norm)})
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            is_last = step + 1 == num_steps
            saves, reports = (step + 1) % checkpoint_every == 0 and not is_last, (step + 1) % report_every == 0
            if saves or reports or is_last or part_norms:
                window.read()
            if saves:  # before a report, which may end the process
                _save(work_dir, step + 1, model, optimizer, balance)
            if reports or is_last:
                now = time.perf_counter()
                means, grad_norm, num_tokens = window.close()
                metrics = {f"{name}/{part}": value for part, value in means.items()}
                metrics[f"{name}/learning_rate"] = learning_rate * factor
                metrics[f"{name}/grad_norm"] = grad_norm
                metrics[f"{name}/tokens_per_second"] = num_tokens / max(now - last_report, 1e-9)
                bar.set_postfix(loss=f"{metrics[f'{name}/loss']:.3f}", refresh=False)
                last_report = now
                report(metrics, step + 1)
            if part_norms:
                report({f"{name}/grad_norm_{part}": value for part, value in part_norms.items()}, step + 1)
            bar.update()
    model.eval()
    return metrics


class _Window:
    """What training says of the steps since the last report. Read together, as each value that is read stops a GPU."""

    def __init__(self, name: str, work_dir: Path) -> None:
        self.name, self.work_dir = name, work_dir
        self.unread: list[tuple[int, str, Tensor]] = []
        self.steps: dict[int, dict[str, float]] = {}

    def add(self, step: int, values: dict[str, Tensor]) -> None:
        """Adds to the step's values."""
        self.unread += [(step, part, value.detach()) for part, value in values.items()]

    def read(self) -> None:
        """Raises ValueError at the first step with a value that is not finite."""
        if not self.unread:
            return
        read = torch.stack([value.double() for _, _, value in self.unread]).tolist()
        for (step, part, _), value in zip(self.unread, read, strict=True):
            values = self.steps.setdefault(step, {})
            values[part] = values.get(part, 0.0) + value
        self.unread = []
        for step, values in self.steps.items():
            bad = [part for part, value in values.items() if not math.isfinite(value)]
            if bad:
                kept = _latest(self.work_dir)
                raise ValueError(
                    f"{self.name} diverged at step={step + 1}: {', '.join(bad)} is not finite; the last good "
                    f"checkpoint is {kept.name if kept else 'none'}; lower the learning_rate of {self.name} and run "
                    "again"
                )

    def close(self) -> tuple[dict[str, float], float, int]:
        """Means of the parts over the steps that were read, the last gradient norm, and the tokens; begins anew."""
        totals: dict[str, float] = {}
        for values in self.steps.values():
            for part, value in values.items():
                totals[part] = totals.get(part, 0.0) + value
        num_steps, last = len(self.steps), self.steps[max(self.steps)]["grad_norm"]
        num_tokens = int(totals.pop("num_tokens"))
        totals.pop("grad_norm")
        self.steps = {}
        return {part: value / num_steps for part, value in totals.items()}, last, num_tokens


class _Balance:
    """Scales of the loss parts from moving averages of their gradient norms."""

    KEEP = 0.7  # of the average at each measurement

    def __init__(self, target: float) -> None:
        self.target = target
        self.norms: dict[str, float] = {}

    def update(self, norms: dict[str, float]) -> None:
        for part, norm in norms.items():
            self.norms[part] = self.KEEP * self.norms.get(part, norm) + (1 - self.KEEP) * norm

    def scale(self, part: str) -> float:
        if not self.target or part == "task_loss" or not self.norms.get(part):
            return 1.0
        return self.target * self.norms["task_loss"] / self.norms[part]


def _optimizer(model: nn.Module, *, learning_rate: float, weight_decay: float, adam_beta2: float) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, so neither norms nor biases decay."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, adam_beta2), eps=1e-8, fused=True)


def _part_grad_norms(
    parts_of: LossFn, micro_batches: Sequence[MicroBatch], parameters: Sequence[Tensor]
) -> dict[str, float]:
    """L2 norm of each part's gradient over all micro-batches of a step; none where the loss has one part.

    One gradient is held at a time, so several micro-batches are computed again for each part.
    """
    parts = parts_of(micro_batches[0])
    names, is_whole = list(parts), len(micro_batches) == 1
    norms = {}
    for name in names if len(names) > 1 else []:
        total: list[Tensor | None] = [None] * len(parameters)
        for batch in micro_batches:
            parts = parts if is_whole else parts_of(batch)
            grads = torch.autograd.grad(parts[name], parameters, retain_graph=is_whole, allow_unused=True)
            pairs = zip(total, grads, strict=True)
            total = [old if new is None else new if old is None else old + new for old, new in pairs]
        squares = [grad.float().square().sum() for grad in total if grad is not None]
        norms[name] = math.sqrt(float(torch.stack(squares).sum())) if squares else 0.0
    return norms


def compute_dtype(precision: Precision) -> torch.dtype:
    """The type of a section's `precision`."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def has_checkpoint(work_dir: Path) -> bool:
    """Whether a training that was interrupted in `work_dir` will go on from a checkpoint."""
    return _latest(work_dir) is not None


def _latest(work_dir: Path) -> Path | None:
    steps = sorted(work_dir.glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))
    return steps[-1] if steps else None


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Whatever a damaged checkpoint of a training raises while it is read, as a ValueError that says what to delete."""
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"unreadable training checkpoint path={path}: {one_line(error)}; delete it to begin that training again"
        ) from None


def _save(work_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, balance: _Balance) -> None:
    """Writes work_dir/step-N atomically and removes older ones."""
    final, temporary = work_dir / f"step-{step}", work_dir / "saving"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    # clone() breaks the storage that tied weights share, which safetensors refuses
    weights = {n: p.detach().cpu().clone() for n, p in model.named_parameters()}
    save_file(weights, temporary / "model.safetensors")
    moments = {
        f"{index}.{key}": value.detach().cpu().clone()
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    save_file(moments, temporary / "optimizer.safetensors")
    (temporary / "step.json").write_text(json.dumps({"step": step, "grad_norms": balance.norms}))
    for path in (*temporary.iterdir(), temporary):  # on the disk before the older one goes
        sync(path)
    older = _latest(work_dir)
    os.replace(temporary, final)
    if older is not None and older != final:
        shutil.rmtree(older)


def _resume(work_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer, balance: _Balance) -> int:
    """Loads the latest checkpoint of work_dir, if there is one, and returns the step to go on from."""
    latest = _latest(work_dir)
    if latest is None:
        return 0
    with damage_named(latest):
        weights = load_file(latest / "model.safetensors")
        moments = load_file(latest / "optimizer.safetensors")
        record = json.loads((latest / "step.json").read_text())
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(weights[parameter_name])
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        index, _, field = key.partition(".")
        state.setdefault(int(index), {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    balance.norms = record["grad_norms"]
    return int(record["step"])
