"""BitLinear: the linear layer of a student in training.

Latent fp32 weights, ternary in the forward pass; INT8 activations per token; optionally an RMSNorm on its input
(SubLN). The packed layer of the CPU engine is another matter: bitdistill_core/engine.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from bitdistill_core.quantize.activation import fake_quantize_activation
from bitdistill_core.quantize.ternary import fake_quantize_weight


class BitLinear(nn.Module):
    """y = fake_quantize_activation(input_norm(x)) @ fake_quantize_weight(weight)^T + bias. BitDistill Eq. 1-6.

    `weight` (N, K) and `bias` (N) are the latent, full-precision parameters. x is (..., K), y is (..., N).
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, *, sub_norm_eps: float | None) -> None:
        """Takes over the parameters; `sub_norm_eps` None means no SubLN, else its epsilon (gain starts at 1)."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.bias = bias
        self.input_norm = None
        if sub_norm_eps is not None:
            self.input_norm = nn.RMSNorm(self.in_features, eps=sub_norm_eps, device=weight.device, dtype=weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_norm is not None:
            x = self.input_norm(x).to(x.dtype)
        return F.linear(fake_quantize_activation(x), fake_quantize_weight(self.weight), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
