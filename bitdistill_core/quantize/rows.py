"""INT8 rows of an embedding or output head: around their mean, with a scale for each row and one for each column.

Rows of trained models share a large mean and a few columns with large weights. A scale of the whole row then has to
reach for what nearly all rows have in common, and the steps are coarse for what tells them apart. Taking the mean away
and giving such columns larger steps halves the error (measured: docs/LOG.md), and the output head of the engine, which
scans the upper bits of every row, excludes far more rows by them.

The mean is a multiple of a power of two and column scales are powers of two, both so coarse that rounded rows have the
same ones: a student with rounded embeddings and its packed file hold the same codes, and the same numbers to float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MEAN_STEP = 1 / 4  # of the standard deviation of all weights, then rounded down to a power of two
COLUMN_EXPONENT = 0.75  # column_scale ~ (deviation of the column / that of all) ^ 0.75: fewest rows left to the head
MIN_COLUMN = 2.0**-10  # deviation of a column, at least, to that of all
ROWS_AT_ONCE = 8192
MAX_ROUNDS = 16


@dataclass(frozen=True)
class QuantizedRows:
    """weight[v] ~ mean + column_scale * row_scale[v] * w_int8[v], V rows of D columns."""

    w_int8: Tensor  # (V, D) in [-127, 127]
    row_scale: Tensor  # (V,) fp32
    column_scale: Tensor  # (D,) fp32, powers of two
    mean: Tensor  # (D,) fp32

    def dequantize(self) -> Tensor:
        """(V, D) fp32."""
        rounded = self.w_int8.float()
        return rounded.mul_(self.row_scale[:, None]).mul_(self.column_scale).add_(self.mean)


@torch.no_grad()
def quantize_rows(weight: Tensor) -> QuantizedRows:
    """INT8 codes of the rows of (V, D) `weight`, in its order; row_scale is the absmax of what is rounded / 127."""
    mean, column_scale = _common(weight)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    row_scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for begin in range(0, len(weight), ROWS_AT_ONCE):
        rows = (weight[begin : begin + ROWS_AT_ONCE].float() - mean) / column_scale
        scale = rows.abs().amax(dim=1).clamp_(min=1e-12) / 127.0
        codes[begin : begin + len(rows)] = (rows / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        row_scale[begin : begin + len(rows)] = scale
    return QuantizedRows(codes, row_scale, column_scale, mean)


@torch.no_grad()
def round_rows(weight: Tensor) -> Tensor:
    """(V, D) fp32, `weight` rounded so that quantising it again gives the same codes, mean and column scales.

    Two or three rows may never settle; then the last try is returned.
    """
    rows = quantize_rows(weight)
    for _ in range(MAX_ROUNDS):
        rounded = rows.dequantize()
        again = quantize_rows(rounded)
        if torch.equal(again.mean, rows.mean) and torch.equal(again.column_scale, rows.column_scale):
            break
        # Rounding moved the mean or deviation of a column over an edge: move it on, by about what weights are rounded.
        spread = (again.column_scale / rows.column_scale) ** (1 / 64)
        rows = quantize_rows((rounded - rows.mean) * spread + rows.mean + (again.mean - rows.mean) / 16)
    return rounded


def _common(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`mean` and `column_scale`."""
    total = torch.zeros(weight.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for begin in range(0, len(weight), ROWS_AT_ONCE):
        rows = weight[begin : begin + ROWS_AT_ONCE].to("cpu", torch.float64)
        total += rows.sum(dim=0)
        squares += rows.square().sum(dim=0)
    mean = total / len(weight)
    deviation = (squares / len(weight) - mean.square()).clamp_(min=0).mean().sqrt()
    if not deviation > 0:  # one row, or rows that are all the same
        return torch.zeros_like(mean, device=weight.device).float(), torch.ones_like(mean, device=weight.device).float()
    step = torch.exp2(torch.floor(torch.log2(deviation * MEAN_STEP)))
    coarse = (mean / step).round() * step
    column = (squares / len(weight) - 2 * coarse * mean + coarse.square()).clamp_(min=0).sqrt() / deviation
    column_scale = torch.exp2((COLUMN_EXPONENT * torch.log2(column.clamp_(min=MIN_COLUMN))).round())
    return coarse.float().to(weight.device), column_scale.float().to(weight.device)
