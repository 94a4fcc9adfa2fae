"""Students made of dense models."""

import copy

from transformers import PreTrainedModel

from bitdistill_core.choices import Subln
from bitdistill_core.quantize.weight import WeightQuantizer
from bitdistill_core.surgery import operate

TERNARY = WeightQuantizer()


def student_of(
    model: PreTrainedModel, subln: Subln = "output", quantizer: WeightQuantizer = TERNARY
) -> PreTrainedModel:
    """A student with the model's weights, all of it trainable; the model stays as it is."""
    student = copy.deepcopy(model).requires_grad_(True)
    operate(student, subln=subln, sub_norm_eps=1e-6, quantizer=quantizer)
    return student.to(model.device)
