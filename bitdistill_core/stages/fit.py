"""What a base model and its tokenizer must have for the parameters of a run, asked before anything is trained."""

from itertools import chain, permutations
from pathlib import Path

import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from bitdistill_core import checkpoint
from bitdistill_core.block_outputs import require_same_blocks
from bitdistill_core.config import Params
from bitdistill_core.corpus import iter_texts
from bitdistill_core.data import encode_answer
from bitdistill_core.quantize.weight import require_divisible
from bitdistill_core.stages import distill, surgery
from bitdistill_core.stages.student import require_same_vocabulary
from bitdistill_core.stages.training import require_window


def require_fit(
    params: Params,
    base_dir: Path,
    *,
    data_dir: Path,
    examples_dir: Path | None = None,
    teacher_dir: Path | None = None,
) -> None:
    """Raises ValueError for lengths, layers or heads that the base model does not have, before anything is trained.

    Args:
        data_dir: the `data` stage that pre-training reads.
        examples_dir: the one with the examples, where it is another.
        teacher_dir: what the teacher is made from, where it is another model.
    """
    model = checkpoint.read_config(base_dir)
    lengths = {
        "teacher.max_length": params.teacher.max_length,
        "distill.max_length": params.distill.max_length,
        "bitnet_sft.max_length": params.bitnet_sft.max_length,
        "benchmark.prompt_tokens + new_tokens": params.benchmark.prompt_tokens + params.benchmark.new_tokens,
    }
    if params.pretrain.num_tokens or params.pretrain.blockwise.num_epochs:
        lengths["pretrain.block_size"] = params.pretrain.block_size
    if params.surgery.is_calibrated:
        lengths["surgery.calibration_length"] = params.surgery.calibration_length
    if params.data.resolved_template.kind == "generation":
        lengths["evaluate.max_new_tokens + 1"] = params.evaluate.max_new_tokens + 1
    for key, length in lengths.items():
        require_window(model, length, key)
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    widths = {"o_proj": model.num_attention_heads * head_dim, "down_proj": model.intermediate_size}
    for name, width in {"q_proj": model.hidden_size, **widths}.items():
        require_divisible(surgery.weight_quantizer(params.surgery), width, name)
    tokenizer = checkpoint.load_tokenizer(base_dir)
    teacher = checkpoint.read_config(teacher_dir or base_dir)
    if params.distill.attention_kd_weight:
        distill.layer_pairs(params.distill, model, teacher)
    if params.distill.hidden_kd_weight or params.distill.blockwise.num_epochs:
        require_same_blocks(model, teacher, "distill.hidden_kd_weight or blockwise")
    if teacher_dir is not None and params.distill.is_taught:
        require_same_vocabulary(tokenizer, checkpoint.load_tokenizer(teacher_dir))
    if tokenizer.vocab_size > model.vocab_size:  # tokens that were added to it may have no row, like Gemma's of images
        raise ValueError(
            f"the base model must have an embedding for every token; got tokenizer.vocab_size={tokenizer.vocab_size}, "
            f"vocab_size={model.vocab_size} in its config.json; take the tokenizer that the model was trained with"
        )
    require_tokenizer(params, tokenizer)
    require_rows(tokenizer, model.vocab_size, examples_dir or data_dir, corpus=data_dir / "corpus")
    if params.surgery.is_calibrated:  # as surgery does, before the teacher is trained
        surgery.calibration_ids(params.surgery, data_dir, tokenizer)
    if params.pretrain.num_tokens or params.pretrain.blockwise.num_epochs:
        require_block(data_dir / "corpus", tokenizer, params.pretrain.block_size)


def require_block(corpus: Path, tokenizer: PreTrainedTokenizerBase, block_size: int) -> None:
    """Raises ValueError for a corpus that has fewer tokens than one block of pre-training."""
    num_tokens = 0
    for texts in iter_texts(corpus):
        for text in texts:  # one by one: the first documents are enough
            num_tokens += len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
            if num_tokens >= block_size:
                return
    raise ValueError(
        f"the corpus must hold at least one block; got num_tokens={num_tokens}, pretrain.block_size={block_size}; "
        "lower it, or give more texts"
    )


def require_rows(tokenizer: PreTrainedTokenizerBase, vocab_size: int, data_dir: Path, *, corpus: Path) -> None:
    """Raises ValueError for a text with a token that was added to the tokenizer but not to the model."""
    rowless = [token for token, index in tokenizer.get_added_vocab().items() if index >= vocab_size]
    if not rowless:
        return
    paths = sorted((data_dir / "examples").glob("*.parquet"))
    tables = ((path.stem, pq.read_table(path, columns=["prompt", "answer"])) for path in paths)
    examples = ((split, column.to_pylist()) for split, table in tables for column in table.columns)
    for place, texts in chain(examples, (("corpus", texts) for texts in iter_texts(corpus))):
        for text in texts:
            if token := next((token for token in rowless if token in text), None):
                raise ValueError(
                    f"the base model must have an embedding for every token of a text; got token={token!r} without "
                    f"one in {place}, text={text[:40]!r}; resize the model's embeddings, or drop the row"
                )


def require_tokenizer(params: Params, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError for a tokenizer that cannot be packed or does not tell the answers of the task apart."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"the packed file needs a fast tokenizer; got {type(tokenizer).__name__}; save the base model with one"
        )
    template = params.data.resolved_template
    ends = params.pretrain.num_tokens > 0 or params.pretrain.blockwise.num_epochs > 0 or template.kind == "generation"
    if ends and tokenizer.eos_token_id is None:
        raise ValueError(
            "pre-training and generation need an end-of-text token; the tokenizer's eos_token is None; set it in the "
            "base model's tokenizer_config.json"
        )
    answers = {word: encode_answer(tokenizer, " " + word, ends=False) for word in template.label_words}
    longest = max(map(len, answers.values()), default=0)
    for key in ("teacher", "distill", "bitnet_sft"):
        length = getattr(params, key).max_length
        if length < longest + 2:
            raise ValueError(
                f"{key}.max_length must leave room for a prompt beside the longest label word; got {key}.max_length="
                f"{length}, tokens={longest}; raise it"
            )
    for (word, ids), (other, others) in permutations(answers.items(), 2):
        if others[: len(ids)] == ids:
            raise ValueError(
                "no label word may begin with all tokens of another, which would always be more probable; got "
                f"label_words={word!r} and {other!r}, tokens={ids} and {others}; choose other words in data.template"
            )
