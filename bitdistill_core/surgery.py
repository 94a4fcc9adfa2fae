"""Stage 1 of BitDistill: insert SubLN and replace Linear by BitLinear, on transformers' own models.

Works on any Qwen3, Qwen2, Llama-family or Gemma3 text model without forking it: only the linear layers inside the
decoder blocks change. Embeddings, lm_head and the model's own norms stay dense.
"""

from dataclasses import asdict, dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from bitdistill_core.bitlinear import BitLinear
from bitdistill_core.choices import ModelType, Subln
from bitdistill_core.quantize.weight import WeightQuantizer, require_divisible

FAMILIES: dict[ModelType, str] = {  # as users know them
    "qwen3": "Qwen3",
    "qwen2": "Qwen2 and Qwen2.5",
    "llama": "Llama and SmolLM2",
    "mistral": "Mistral",
    "gemma3_text": "Gemma3 text",
}
OUTPUT_PROJECTIONS = ("o_proj", "down_proj")


@dataclass(frozen=True)
class Change:
    """One module that surgery replaced."""

    module: str  # its name in the model
    in_features: int
    out_features: int
    has_sub_norm: bool


def require_supported(config: PretrainedConfig) -> None:
    """Raises ValueError, naming the supported architectures, if surgery does not know this one."""
    if config.model_type not in FAMILIES:
        supported = ", ".join(f"{key} ({name})" for key, name in FAMILIES.items())
        raise ValueError(
            f"unsupported architecture model_type={config.model_type}; supported are {supported}; "
            "start from a checkpoint of one of these"
        )


def operate(
    model: PreTrainedModel,
    *,
    subln: Subln,
    sub_norm_eps: float,
    quantizer: WeightQuantizer = WeightQuantizer(),  # noqa: B008  (frozen)
) -> list[Change]:
    """Turns `model` into a student in place and reports every module changed; the model's config records how.

    SubLN is an RMSNorm on the input of a projection, gain 1. The paper (Eq. 4-5) norms the input of `o_proj` and
    `down_proj` (`output`); the authors' released configurations norm the input of all seven projections (`all`).

    Raises:
        ValueError: unsupported architecture, no module to change, or blocks that do not divide a layer's width.
    """
    require_supported(model.config)
    decoder = model.get_decoder()
    linears = {f"layers.{n}": m for n, m in decoder.layers.named_modules() if isinstance(m, nn.Linear)}
    changes = []
    for name, linear in linears.items():
        parent_name, _, child = name.rpartition(".")
        has_sub_norm = subln == "all" or (subln == "output" and child in OUTPUT_PROJECTIONS)
        weight = linear.get_parameter("weight")
        require_divisible(quantizer, linear.in_features, name)
        bit_linear = BitLinear(
            weight, linear.bias, sub_norm_eps=sub_norm_eps if has_sub_norm else None, quantizer=quantizer
        )
        setattr(decoder.get_submodule(parent_name), child, bit_linear)
        changes.append(Change(f"model.{name}", linear.in_features, linear.out_features, has_sub_norm))
    if not changes:
        raise ValueError(
            f"surgery changed no module of this {model.config.model_type} model: no linear layer is left in its "
            "decoder; it may be a student already"
        )
    model.config.bitdistill = {"subln": subln, "sub_norm_eps": sub_norm_eps, "quantizer": asdict(quantizer)}
    return changes
