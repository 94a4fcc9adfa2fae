"""The one params schema: a frozen pydantic model per section of params.yaml.

A stage receives only its own section. There are no defaults here: params.yaml holds every value, a profile only what
differs from it; params.py reads them. Not for anything that is derived at run time.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bitdistill_core.choices import (
    ChannelWeights,
    Encoding,
    Granularity,
    Grid,
    Initializer,
    LossVariant,
    ModelType,
    Precision,
    ScaleRule,
    Schedule,
    Subln,
    SublnGain,
)
from bitdistill_core.engine.config import MAX_THREADS
from bitdistill_core.templates import TEMPLATES, Template

MAX_SEED = 10**12  # times a million, and a step, is a seed of PyTorch's


class Section(BaseModel):
    """A section of params.yaml. Frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RuntimeConfig(Section):
    """params.yaml section `runtime`: what the machine is. Never part of a stage's fingerprint."""

    device: Literal["auto", "cpu", "cuda"]
    num_threads: int = Field(ge=0, le=MAX_THREADS)  # 0: every core


class DataConfig(Section):
    """params.yaml section `data`: the task's examples and the general corpus."""

    task: str
    template: Template | None  # the template of task `custom`; null for a built-in task
    examples: str  # file, directory of SPLIT* files, or hub id[@REVISION]
    examples_config: str | None  # configuration of that data set on the hub
    train_split: str
    eval_splits: list[str] = Field(min_length=1)  # the first one is the headline
    max_train_examples: int = Field(ge=0)  # 0: all
    max_eval_examples: int = Field(ge=0)  # 0: all
    corpus: str  # file, directory of files, or hub id[@REVISION]
    corpus_column: str
    corpus_documents: int = Field(ge=0)  # 0: all
    data_root: str | None  # read parquet below this directory instead of the hub

    @model_validator(mode="after")
    def _template_matches_task(self) -> "DataConfig":
        if (self.task == "custom") != (self.template is not None):
            raise ValueError(f"data.template must be set exactly when data.task is custom; got task={self.task}")
        if self.task != "custom" and self.task not in TEMPLATES:
            raise ValueError(f"data.task must be one of {', '.join(TEMPLATES)}, custom; got task={self.task}")
        return self

    @model_validator(mode="after")
    def _splits_are_names(self) -> "DataConfig":
        for name in (self.train_split, *self.eval_splits):  # of files, and in the report
            if not name.isprintable() or name.startswith(".") or set(name) & set("/\\$") or not 1 <= len(name) <= 100:
                raise ValueError(
                    "a split must be a name of 1 to 100 printable characters without / \\ $ that begins with no dot; "
                    f"got split={name[:120]!r}"
                )
        return self

    @model_validator(mode="after")
    def _splits_differ(self) -> "DataConfig":
        wrong = {"train", self.train_split} & set(self.eval_splits)
        if wrong:  # the training examples are kept under the name train
            raise ValueError(
                "data.eval_splits must be other splits than data.train_split, and none named train; "
                f"got {sorted(wrong)}"
            )
        if len(set(self.eval_splits)) < len(self.eval_splits):
            raise ValueError(f"data.eval_splits must be different splits; got eval_splits={self.eval_splits}")
        return self

    @property
    def resolved_template(self) -> Template:
        """The template of the task, built in or custom."""
        return self.template if self.template is not None else TEMPLATES[self.task]


class TrainSection(Section):
    """What every training stage shares."""

    seed: int = Field(ge=0, le=MAX_SEED)
    batch_size: int = Field(gt=0)  # sequences an optimiser step
    gradient_accumulation: int = Field(gt=0)  # micro-batches a step; must divide batch_size
    learning_rate: float = Field(gt=0)
    schedule: Schedule
    warmup_ratio: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    adam_beta2: float = Field(gt=0, lt=1)
    max_grad_norm: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)  # of the hidden states after the embedding and after each block
    precision: Precision  # of the forward pass; weights stay float32
    report_every: int = Field(gt=0)  # steps
    checkpoint_every: int = Field(gt=0)  # steps

    @model_validator(mode="after")
    def _accumulation_divides_batch(self) -> "TrainSection":
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                "gradient_accumulation must divide batch_size; got "
                f"gradient_accumulation={self.gradient_accumulation}, batch_size={self.batch_size}"
            )
        return self


class BlocksSection(TrainSection):
    """Training on packed blocks of a corpus."""

    num_tokens: int = Field(ge=0)  # 0: skip
    block_size: int = Field(gt=1)

    def require_step(self, num_tokens: int, batch_size: int, key: str) -> None:
        """Raises ValueError when `num_tokens` make no optimiser step."""
        if 0 < num_tokens < self.block_size * batch_size:
            raise ValueError(
                f"{key} must be 0 or at least one step's tokens, block_size * batch_size = "
                f"{self.block_size * batch_size}; got {key}={num_tokens}"
            )

    @model_validator(mode="after")
    def _tokens_make_a_step(self) -> "BlocksSection":
        self.require_step(self.num_tokens, self.batch_size, "num_tokens")
        return self


class TaskSection(TrainSection):
    """Training on the task's examples."""

    num_epochs: float = Field(gt=0)
    max_length: int = Field(gt=1)  # tokens of prompt and answer; longer prompts are cut


class ScratchConfig(BlocksSection):
    """A small causal LM trained from nothing, for the demo. Used when base.checkpoint is null."""

    architecture: ModelType
    vocab_size: int = Field(ge=300)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=1)

    @model_validator(mode="after")
    def _heads_fit(self) -> "ScratchConfig":
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ValueError(
                "base.scratch.num_kv_heads must divide num_heads, and head_dim be even; got "
                f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
            )
        return self


class BaseConfig(Section):
    """params.yaml section `base`: the full-precision LM to convert."""

    checkpoint: str | None  # directory, hub id[@REVISION], .gguf file or package:MODULE/file.gguf; null: `scratch`
    num_layers: int = Field(ge=0)  # keep the first so many blocks; 0: all
    scratch: ScratchConfig


class SurgeryConfig(Section):
    """params.yaml section `surgery`."""

    subln: Subln
    subln_gain: SublnGain  # preserve: the gain that changes the layer's input least
    sub_norm_eps: float = Field(gt=0)
    weight_grid: Grid
    weight_granularity: Granularity  # the weights that share a scale
    weight_block_size: int = Field(ge=16, multiple_of=16)  # of a row; for granularity block
    weight_scale: ScaleRule
    initializer: Initializer
    calibration: Literal["corpus", "examples"]  # texts for initializer and subln_gain
    calibration_sequences: int = Field(gt=0)
    calibration_length: int = Field(gt=1)  # tokens a sequence
    seed: int = Field(ge=0, le=MAX_SEED)  # of the choice of texts

    @property
    def is_calibrated(self) -> bool:
        """Whether texts go through the student."""
        return self.initializer != "none" or (self.subln_gain != "one" and self.subln != "none")

    @model_validator(mode="after")
    def _scale_fits(self) -> "SurgeryConfig":
        if self.weight_scale != "absmean" and (self.weight_grid != "ternary" or self.initializer != "none"):
            raise ValueError(
                "surgery.weight_scale least_squares is for weight_grid ternary and initializer none; got "
                f"weight_grid={self.weight_grid}, initializer={self.initializer}"
            )
        return self


class BlockwiseConfig(Section):
    """Section `blockwise` of a stage that trains a student: first each decoder block alone, on its teacher's output."""

    num_epochs: float = Field(ge=0)  # 0: skip
    learning_rate: float = Field(gt=0)
    batch_size: int = Field(ge=0)  # sequences a step, in one micro-batch; 0: as in the rest of the stage
    num_tokens: int = Field(gt=0)  # at most; the hidden states of so many tokens are held in memory
    channel_weights: ChannelWeights  # of the distance: the gains of the norm that reads the output


class TaskBlockwiseConfig(BlockwiseConfig):
    """Section `distill.blockwise`, on the task's examples."""

    drop_contained: bool  # leave out examples whose text lies within a longer one's


class StudentTraining(Section):
    """What the stages that train a student share."""

    blockwise: BlockwiseConfig
    threshold_margin: float = Field(ge=0, lt=0.5)  # least distance to a threshold before training, in scales; 0: none
    quantization_warmup: float = Field(ge=0, le=1)  # share of the steps in which quantisation sets in linearly
    hidden_kd_weight: float = Field(ge=0)  # of the distance between the outputs of the blocks, all of them; 0: none

    @model_validator(mode="after")
    def _warmup_undoes_blocks(self) -> "StudentTraining":
        if self.quantization_warmup and self.blockwise.num_epochs:
            raise ValueError(
                "quantization_warmup begins with weights that are not quantised, for which blocks trained by blockwise "
                f"are not made; got quantization_warmup={self.quantization_warmup}, "
                f"blockwise.num_epochs={self.blockwise.num_epochs}; set one of them to 0"
            )
        return self

    @property
    def is_taught(self) -> bool:
        """Whether a teacher runs."""
        return bool(self.blockwise.num_epochs or self.has_taught_loss)

    @property
    def has_taught_loss(self) -> bool:
        """Whether the loss over the whole student has a teacher: a weight of distillation above 0."""
        return any(getattr(self, name) for name in type(self).model_fields if name.endswith("_kd_weight"))


class PretrainConfig(BlocksSection, StudentTraining):
    """params.yaml section `pretrain`: continued pre-training of the student (stage 2 of the paper).

    The paper's is cross-entropy alone. With logits_kd_weight or hidden_kd_weight the base model is its teacher.
    """

    task_loss_weight: float = Field(ge=0)  # of the cross-entropy
    logits_kd_weight: float = Field(ge=0)
    kd_temperature: float = Field(gt=0)

    @model_validator(mode="after")
    def _blockwise_makes_a_step(self) -> "PretrainConfig":
        if self.blockwise.num_epochs:
            batch_size = self.blockwise.batch_size or self.batch_size
            self.require_step(self.blockwise.num_tokens, batch_size, "blockwise.num_tokens")
        return self

    @model_validator(mode="after")
    def _something_to_learn(self) -> "PretrainConfig":
        if self.task_loss_weight not in (0, 1) and not self.has_taught_loss:
            raise ValueError(
                "pretrain.task_loss_weight weighs cross-entropy against distillation; got "
                f"task_loss_weight={self.task_loss_weight} without any; set it to 1.0"
            )
        if not self.task_loss_weight and not self.has_taught_loss:
            raise ValueError(
                "pretrain needs a loss: one of task_loss_weight, logits_kd_weight and hidden_kd_weight above 0; "
                "got 0 for each"
            )
        return self


class TeacherConfig(TaskSection):
    """params.yaml section `teacher`: full-precision fine-tuning."""


class BitnetSftConfig(TaskSection):
    """params.yaml section `bitnet_sft`: the paper's baseline, ternary fine-tuning and nothing else."""


class DistillConfig(TaskSection, StudentTraining):
    """params.yaml section `distill` (stage 3). Symbols from the BitDistill paper in brackets.

    With no distillation weight above 0 it is plain fine-tuning of the student, and no teacher runs.
    """

    blockwise: TaskBlockwiseConfig
    loss: LossVariant  # Eq. 8-12, or what the authors' code computes
    logits_kd_weight: float = Field(ge=0)  # [lambda]
    attention_kd_weight: float = Field(ge=0)  # [gamma]
    kd_temperature: float = Field(gt=0)  # [tau]
    num_relation_heads: int = Field(gt=0)  # [A_r]
    distill_layers: list[int]  # [Upsilon] student layers; negative counts from the end; empty: all
    teacher_layers: list[int]  # the teacher's, one for one; empty: the same indices
    grad_norm_every: int = Field(ge=0)  # steps between gradient norms of each loss part; 0: never
    balance_grad_norms: float = Field(ge=0)  # hold each term's gradient norm at so many times the task loss's; 0: off

    @model_validator(mode="after")
    def _balance_measures(self) -> "DistillConfig":
        if self.balance_grad_norms and not self.grad_norm_every:
            raise ValueError("distill.balance_grad_norms needs grad_norm_every above 0; got grad_norm_every=0")
        return self

    @model_validator(mode="after")
    def _layers_pair_up(self) -> "DistillConfig":
        if self.teacher_layers and len(self.teacher_layers) != len(self.distill_layers):
            raise ValueError(
                "distill.teacher_layers must be empty or as long as distill.distill_layers; got "
                f"teacher_layers={self.teacher_layers}, distill_layers={self.distill_layers}"
            )
        return self


class PackConfig(Section):
    """params.yaml section `pack`."""

    verify_examples: int = Field(ge=1)  # prompts on which the packed model's logits must be the student's
    encoding: Encoding  # of the ternary codes in the file


class EvaluateConfig(Section):
    """params.yaml section `evaluate`."""

    batch_size: int = Field(gt=0)
    max_new_tokens: int = Field(gt=0)  # generation tasks


class BenchmarkConfig(Section):
    """params.yaml section `benchmark`."""

    prompt_tokens: int = Field(gt=0)
    new_tokens: int = Field(ge=2)  # decoding is timed from the first to the last
    num_rounds: int = Field(gt=0)
    warmup_rounds: int = Field(ge=0)


class ReportConfig(Section):
    """params.yaml section `report`."""

    title: str
    loss_smoothing: float = Field(ge=0, lt=1)  # of the loss curves; 0 shows them raw


class Params(Section):
    """All of params.yaml."""

    runtime: RuntimeConfig
    data: DataConfig
    base: BaseConfig
    teacher: TeacherConfig
    surgery: SurgeryConfig
    pretrain: PretrainConfig
    distill: DistillConfig
    bitnet_sft: BitnetSftConfig
    pack: PackConfig
    evaluate: EvaluateConfig
    benchmark: BenchmarkConfig
    report: ReportConfig

    @model_validator(mode="after")
    def _warmup_from_latent_weights(self) -> "Params":
        late = self.distill.quantization_warmup
        warmup = max(self.pretrain.quantization_warmup, late)
        if warmup and self.surgery.initializer != "none":
            raise ValueError(
                "quantization_warmup begins with the latent weights, which an initializer moves far from the base's; "
                f"got quantization_warmup={warmup}, surgery.initializer={self.surgery.initializer}; set one of them off"
            )
        if late and (self.pretrain.num_tokens or self.pretrain.blockwise.num_epochs):
            raise ValueError(
                "distill.quantization_warmup begins with weights that are not quantised, but pretrain has trained them "
                f"to be; got distill.quantization_warmup={late}, pretrain.num_tokens={self.pretrain.num_tokens}, "
                f"pretrain.blockwise.num_epochs={self.pretrain.blockwise.num_epochs}; take "
                "pretrain.quantization_warmup, or no pre-training"
            )
        return self

    @model_validator(mode="after")
    def _margin_of_absmean(self) -> "Params":
        margin = max(self.pretrain.threshold_margin, self.distill.threshold_margin)
        if margin and self.surgery.weight_scale != "absmean":
            raise ValueError(
                f"threshold_margin needs surgery.weight_scale absmean; got weight_scale={self.surgery.weight_scale}, "
                f"threshold_margin={margin}; set it to 0"
            )
        return self
