"""BitLinear: the linear layer of a student in training.

Latent fp32 weights, ternary or binary in the forward pass; INT8 activations per token; optionally an RMSNorm on its
input (SubLN). The packed layer of the CPU engine is another matter: bitdistill_core/engine.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitdistill_core.quantize.activation import fake_quantize_activation
from bitdistill_core.quantize.weight import WeightQuantizer, fake_quantize_weight


class BitLinear(nn.Module):
    """y = fake_quantize_activation(input_norm(x)) @ fake_quantize_weight(weight)^T + bias. BitDistill Eq. 1-6.

    `weight` (N, K) and `bias` (N) are the latent, full-precision parameters. x is (..., K), y is (..., N).
    `hardness` below 1 mixes in what is not quantised, of weights and activations alike: x + hardness * (Q(x) - x).
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        sub_norm_eps: float | None,
        quantizer: WeightQuantizer = WeightQuantizer(),  # noqa: B008  (frozen)
    ) -> None:
        """Takes over the parameters; `sub_norm_eps` None means no SubLN, else its epsilon (gain starts at 1)."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.bias = bias
        self.quantizer = quantizer
        self.hardness = 1.0
        self.input_norm = None
        self._is_frozen = False
        if sub_norm_eps is not None:
            self.input_norm = nn.RMSNorm(self.in_features, eps=sub_norm_eps, device=weight.device, dtype=weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.quantized_input(x), self.quantized_weight(), self.bias)

    def quantized_input(self, x: Tensor) -> Tensor:
        """What the weights multiply: x (..., K) normed and on the INT8 grid, in the dtype of x."""
        if self.input_norm is not None:
            x = self.input_norm(x.float()).to(x.dtype)  # in float32, as its gain is
        return self._mixed(x, fake_quantize_activation(x))

    def quantized_weight(self) -> Tensor:
        """The weight (N, K) of the forward pass."""
        if self._is_frozen:
            return self.weight
        return self._mixed(self.weight, fake_quantize_weight(self.weight, self.quantizer))

    @torch.no_grad()
    def freeze(self) -> None:
        """Replaces the latent weight by the quantised one: generation would quantise it again for every token."""
        self.weight = nn.Parameter(self.quantized_weight(), requires_grad=False)
        self._is_frozen = True

    def _mixed(self, exact: Tensor, quantized: Tensor) -> Tensor:
        return quantized if self.hardness >= 1.0 else torch.lerp(exact, quantized, self.hardness)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.quantizer}"
        )
