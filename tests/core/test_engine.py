"""The engine against transformers' own models in fp32, with their linear layers made ternary by the reference below."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from bitdistill_core.data import encode_prompt
from bitdistill_core.engine.kernels import available_kernels
from bitdistill_core.engine.model import Engine
from bitdistill_core.engine.sampling import Sampling, choose_token
from bitdistill_core.engine.tokenizer import EngineTokenizer, until_stop
from tests.core.architectures import ARCHITECTURES, BOS, EOS, VOCAB_SIZE
from tests.core.reference_students import (
    ReferenceBitLinear,
    prompt_without_ties,
    random_prompt,
    reference_logits,
    relative_error,
    tokenizer_json,
    write_reference,
)

TOLERANCE = 1e-5  # of the largest logit: fp32, in another order of summation
PROMPT = random_prompt(0)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, nn.Module]:
    path = tmp_path_factory.mktemp("qwen3") / "model.bitdistill"
    model = write_reference(path, "qwen3")
    return Engine.load(path, num_threads=1), model


@pytest.mark.parametrize("subln", ["output", "all"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_greedy_tokens_equal_transformers(tmp_path: Path, name: str, subln: str) -> None:
    model = write_reference(tmp_path / "m", name, subln)
    engine = Engine.load(tmp_path / "m", num_threads=1)
    prompt = prompt_without_ties(model)
    assert relative_error(engine.logits(prompt), reference_logits(model, prompt)) < TOLERANCE
    expected = list(prompt)
    for _ in range(32):
        expected.append(int(reference_logits(model, expected)[-1].argmax()))
    assert list(engine.generate_ids(prompt, 32)) == expected[len(prompt) :]


def test_without_subln_the_logits_equal_transformers(tmp_path: Path) -> None:
    model = write_reference(tmp_path / "m", "qwen3", "none")
    prompt = prompt_without_ties(model)
    assert relative_error(Engine.load(tmp_path / "m").logits(prompt), reference_logits(model, prompt)) < TOLERANCE


@pytest.mark.parametrize("granularity", ["tensor", "row", "block"])
@pytest.mark.parametrize("grid", ["ternary", "binary"])
@pytest.mark.parametrize("name", ["qwen3", "llama_bias_llama3_rope", "gemma3"])
def test_every_grid_and_granularity_equals_transformers(tmp_path: Path, name: str, grid: str, granularity: str) -> None:
    subln = "all" if name == "llama_bias_llama3_rope" else "output"
    model = write_reference(tmp_path / "m", name, subln, grid=grid, granularity=granularity)
    prompt = prompt_without_ties(model)
    expected = reference_logits(model, prompt)
    for kernel in available_kernels():
        engine = Engine.load(tmp_path / "m", num_threads=1, kernel=kernel)
        assert relative_error(engine.logits(prompt), expected) < TOLERANCE
    short = Engine.load(tmp_path / "m", num_threads=1)  # few tokens go another way than many
    np.testing.assert_array_equal(short.logits(prompt[:2]), short.logits(prompt)[:2])
    np.testing.assert_array_equal(Engine.load(tmp_path / "m", num_threads=3).logits(prompt), short.logits(prompt))


@pytest.mark.parametrize("name", ["qwen3", "mistral_sliding", "gemma3"])
def test_token_by_token_with_the_cache_equals_all_at_once(tmp_path: Path, name: str) -> None:
    prompt = prompt_without_ties(write_reference(tmp_path / "m", name))
    engine = Engine.load(tmp_path / "m", num_threads=1)
    decoder = engine._decoder
    cache = decoder.new_cache(len(prompt))
    rows = [decoder.logits(decoder.forward([np.array([token], np.int32)], [0], cache=cache)) for token in prompt]
    np.testing.assert_array_equal(np.concatenate(rows), engine.logits(prompt))


@pytest.mark.parametrize("kernel", available_kernels())
def test_the_number_of_threads_does_not_change_a_bit(tmp_path: Path, kernel: str) -> None:
    model = write_reference(tmp_path / "m", "llama")
    prompt = prompt_without_ties(model)
    expected = Engine.load(tmp_path / "m", num_threads=1, kernel=kernel).logits(prompt)
    assert relative_error(expected, reference_logits(model, prompt)) < TOLERANCE
    for num_threads in (2, 3, 7):
        engine = Engine.load(tmp_path / "m", num_threads=num_threads, kernel=kernel)
        for _ in range(5):
            np.testing.assert_array_equal(engine.logits(prompt), expected)


def test_score_is_the_log_probability_of_the_labels_tokens_among_the_labels(qwen3: tuple[Engine, nn.Module]) -> None:
    engine, model = qwen3
    prompts, labels = ["good film", "a"], [" yes", " no", "?"]
    scores = engine.score(prompts, labels)
    expected = np.empty((2, 3))
    for row, prompt in enumerate(prompts):
        for column, label in enumerate(labels):
            context = [BOS, *engine.tokenizer.encode(prompt)]
            continuation = engine.tokenizer.encode(label)
            log_probabilities = torch.tensor(reference_logits(model, context + continuation)).log_softmax(-1)
            positions = range(len(context) - 1, len(context) + len(continuation) - 1)
            expected[row, column] = float(log_probabilities[list(positions), continuation].sum())
    expected -= np.logaddexp.reduce(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)


def test_score_does_not_depend_on_the_other_prompts(qwen3: tuple[Engine, nn.Module]) -> None:
    engine, _ = qwen3
    together = engine.score(["one", "two", "one"], ["ab", "c"])
    np.testing.assert_array_equal(together[0], together[2])
    np.testing.assert_array_equal(together[1:2], engine.score(["two"], ["ab", "c"]))


def test_score_ids_reports_whether_greedy_decoding_gives_the_continuation(qwen3: tuple[Engine, nn.Module]) -> None:
    engine, _ = qwen3
    greedy = list(engine.generate_ids(PROMPT, 4))
    other = [*greedy[:3], (greedy[3] + 1) % 256]
    (first, is_greedy), (second, other_is_greedy), (third, _) = engine.score_ids(
        [(PROMPT, greedy), (PROMPT, other), (PROMPT[:5], greedy)]
    )
    assert (is_greedy, other_is_greedy) == (True, False)
    assert second < first < 0
    assert third != first


def test_sampling_repeats_with_its_seed_and_is_greedy_in_the_limits(qwen3: tuple[Engine, nn.Module]) -> None:
    engine, _ = qwen3
    greedy = list(engine.generate_ids(PROMPT, 12))
    assert list(engine.generate_ids(PROMPT, 12, temperature=1.0, top_k=1)) == greedy
    assert list(engine.generate_ids(PROMPT, 12, temperature=1.0, top_p=1e-9)) == greedy
    assert list(engine.generate_ids(PROMPT, 12, temperature=1e-320)) == greedy
    hot = list(engine.generate_ids(PROMPT, 12, temperature=50.0, seed=3))
    assert hot == list(engine.generate_ids(PROMPT, 12, temperature=50.0, seed=3)) != greedy
    assert hot != list(engine.generate_ids(PROMPT, 12, temperature=50.0, seed=4))


def test_sampled_frequencies_are_the_softmax_of_the_kept_tokens() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25]))
    generator = np.random.default_rng(0)
    tokens = np.argsort(-logits)
    kept = [choose_token(tokens, logits[tokens], Sampling(1.0, top_k=3), generator) for _ in range(20000)]
    np.testing.assert_allclose(np.bincount(kept, minlength=4) / 20000, np.array([0, 0.5, 0.15, 0.25]) / 0.9, atol=0.02)
    kept = [choose_token(tokens, logits[tokens], Sampling(1.0, top_p=0.7), generator) for _ in range(20000)]
    np.testing.assert_allclose(np.bincount(kept, minlength=4) / 20000, np.array([0, 0.5, 0, 0.25]) / 0.75, atol=0.02)


def test_generation_ends_before_the_end_of_text_token(tmp_path: Path) -> None:
    write_reference(tmp_path / "m", "qwen3", with_eos=True)
    engine = Engine.load(tmp_path / "m")
    assert engine.config.eos_token_ids == [EOS]
    greedy = list(engine.generate_ids(PROMPT, 8))
    ends_at = next(token for i, token in enumerate(greedy) if i > 1 and token not in greedy[:i])
    engine.config.eos_token_ids[:] = [ends_at]
    assert list(engine.generate_ids(PROMPT, 8)) == greedy[: greedy.index(ends_at)]


def test_streamed_pieces_add_up_to_the_decoded_text(qwen3: tuple[Engine, nn.Module]) -> None:
    engine, _ = qwen3
    prompt = "caf\u00e9 "
    ids = engine.tokenizer.encode(prompt, add_special_tokens=True)
    new_ids = list(engine.generate_ids(ids, 30, temperature=5.0, seed=1))
    assert ids[0] == BOS
    pieces = list(engine.generate(prompt, 30, temperature=5.0, seed=1))
    assert "".join(pieces) == engine.tokenizer.decode(ids + new_ids)[len(prompt) :]


def test_a_prompt_beyond_the_window_may_lose_its_beginning(qwen3: tuple[Engine, nn.Module]) -> None:
    engine, _ = qwen3
    window = engine.config.max_position_embeddings
    prompt, labels = "".join(chr(97 + i % 26) for i in range(2 * window)), [" yes", "?"]
    end = prompt[len(prompt) - (window - 4) :]  # beside the mark and three fed tokens of the longest label
    np.testing.assert_array_equal(engine.score([prompt], labels, truncate=True), engine.score([end], labels))
    np.testing.assert_array_equal(engine.score(["ab"], labels, truncate=True), engine.score(["ab"], labels))
    # a mark, 4 tokens of which three are fed, and of the rest one more from the beginning than from the end
    num_last = (window - 4) // 2
    ends = prompt[: window - 4 - num_last] + prompt[-num_last:]
    assert list(engine.generate(prompt, 4, truncate=True)) == list(engine.generate(ends, 4))
    with pytest.raises(ValueError, match="must fit max_position_embeddings"):
        engine.score([prompt], labels)
    with pytest.raises(ValueError, match="a prompt needs room beside its answer; got room=1 tokens, of which 1"):
        engine.generate(prompt, window, truncate=True)


def test_characters_of_several_tokens_are_streamed_whole() -> None:
    tokenizer = EngineTokenizer(tokenizer_json())
    text = "na\u00efve \U0001f600 \u4e2d\u6587"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    assert list(tokenizer.stream(tokenizer.encode("x"), ids)) == list(text)
    assert "".join(tokenizer.stream([], ids[:-1])) == text[:-1] + "\ufffd"


@pytest.mark.parametrize("text", ["世界和平ab", "é日本a", "日日日", "👩\u200d🚀a", "a 世 ab", "жд"])
def test_characters_of_byte_tokens_are_streamed_whole(text: str) -> None:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\u2581": 256, "a": 257, "b": 258, "x": 259}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Replace(" ", "\u2581")
    replace = decoders.Replace("\u2581", " ")
    raw.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = EngineTokenizer(raw.to_str().encode())
    ids = tokenizer.encode(text)
    for prompt in ("x", "", "世界", "a世a世"):
        assert list(tokenizer.stream(tokenizer.encode(prompt), ids)) == list(text)


def test_only_marks_that_the_tokenizer_puts_behind_a_text_are_dropped(qwen3: tuple[Engine, nn.Module]) -> None:
    engine, _ = qwen3
    end = EOS
    plain = engine.prompt_ids("ab")
    assert engine.prompt_ids("ab<eos>") == [*plain, end]
    raw = Tokenizer.from_str(tokenizer_json().decode())
    marks = [("<bos>", BOS), ("<eos>", end)]
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=marks)
    appending = EngineTokenizer(raw.to_str().encode())
    assert (appending.num_leading, appending.num_trailing) == (1, 1)
    for tokenizer, mark in ((tokenizer_json(), []), (raw.to_str().encode(), [end])):
        fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_buffer(tokenizer), eos_token="<eos>")
        assert fast("ab")["input_ids"] == [*plain, *mark]
        assert encode_prompt(fast, "ab") == plain
        assert encode_prompt(fast, "ab<eos>") == [*plain, end]


def test_generation_stops_before_a_stop_string_spread_over_pieces() -> None:
    assert list(until_stop(["ab", "c\n", "\nde"], ["\n\n"])) == ["ab", "c"]
    assert "".join(until_stop(["a\n", "b"], ["\n\n"])) == "a\nb"
    assert "".join(until_stop(["a\n"], ["\n\n"])) == "a\n"
    assert "".join(until_stop(["xENDy", "STOP"], ["STOP", "END"])) == "x"
    assert list(until_stop(["END"], ["END"])) == []


def test_info_counts_what_is_in_the_file(qwen3: tuple[Engine, nn.Module]) -> None:
    engine, model = qwen3
    info = engine.info()
    references = [module for module in model.modules() if isinstance(module, ReferenceBitLinear)]
    assert info["num_ternary_parameters"] == sum(module.w_ternary.numel() for module in references)
    dense = sum(parameter.numel() for parameter in model.parameters())
    assert info["num_parameters"] == info["num_ternary_parameters"] + dense
    groups = -(-48 // 32)  # of 32 columns; 260 rows are 17 panels
    assert info["bytes"]["embedding"] == 17 * groups * 320 + VOCAB_SIZE * (groups * 12 + 4 * 4) + 2 * 4 * 48
    assert info["bytes"]["lm_head"] == 0
    assert sum(info["bytes"].values()) < info["file_bytes"]
    assert (info["model_type"], info["num_layers"], info["num_threads"]) == ("qwen3", 3, 1)
    assert info["kernel"] == available_kernels()[0]


def test_clear_errors_for_input_the_engine_cannot_run(qwen3: tuple[Engine, nn.Module]) -> None:
    engine, _ = qwen3
    with pytest.raises(ValueError, match="the ids must be one list of at least one token id"):
        engine.logits([])
    with pytest.raises(ValueError, match="the prompt must be one list of at least one token id"):
        engine.score_ids([([], [1])])
    with pytest.raises(ValueError, match="the continuation must be one list of at least one token id"):
        engine.score(["prompt"], [""])
    with pytest.raises(ValueError, match="num_prompts=0"):
        engine.score([], ["a"])
    with pytest.raises(ValueError, match="num_labels=0"):
        engine.score(["a"], [])
    with pytest.raises(ValueError, match="got an empty batch"):
        engine.score_ids([])
    with pytest.raises(ValueError, match="from 0 to vocab_size - 1 = 259; got token_id=260"):
        engine.logits([1, 260])
    with pytest.raises(ValueError, match="got token_id=-1"):
        engine.logits([-1])
    with pytest.raises(ValueError, match="must hold integers; got dtype=float64"):
        engine.logits([0.5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="must fit max_position_embeddings=96; got num_tokens=97"):
        engine.logits([1] * 97)
    with pytest.raises(ValueError, match="prompt and new tokens must fit max_position_embeddings=96"):
        engine.generate("x" * 90, 7)
    with pytest.raises(ValueError, match="prompt and continuation must fit"):
        engine.score(["x" * 94], ["abc"])
    with pytest.raises(ValueError, match="max_new_tokens of at least 1; got max_new_tokens=0"):
        engine.generate_ids([1], 0)
    with pytest.raises(ValueError, match="got temperature=-1"):
        engine.generate_ids([1], 1, temperature=-1)
    with pytest.raises(ValueError, match="stop must be a list of strings"):
        engine.generate("x", 1, stop="END")
    with pytest.raises(ValueError, match="num_threads=-2"):
        Engine.load(engine.model.path, num_threads=-2)
    with pytest.raises(ValueError, match="to 1024; got num_threads=100000"):
        Engine.load(engine.model.path, num_threads=100000)
    with pytest.raises(ValueError, match="prompts must be a list of strings; got one string, 'abc'"):
        engine.score("abc", ["d"])
    with pytest.raises(ValueError, match=r"a text must be valid Unicode; got 'a.udcff'"):
        engine.score(["a\udcff"], ["d"])
    with pytest.raises(ValueError, match="kv_dtype must be one of float32, float16; got kv_dtype=int3"):
        Engine.load(engine.model.path, kv_dtype="int3")
    with pytest.raises(ValueError, match="num_texts=0 pooling=last"):
        engine.embed([])
    with pytest.raises(ValueError, match="got kernel=abacus"):
        Engine.load(engine.model.path, kernel="abacus")
