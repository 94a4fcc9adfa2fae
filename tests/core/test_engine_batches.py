"""Batches, shared beginnings, the output head and the cache: every way to compute a token gives the same bits."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bitdistill_core.engine import batching
from bitdistill_core.engine.batching import batches, shared_prefix
from bitdistill_core.engine.kernels import available_kernels
from bitdistill_core.engine.model import Engine
from bitdistill_core.packing import Int8Rows, write_student
from bitdistill_core.panels import unpack_int8_rows
from tests.core.packed_files import join, reseal, split, student_arguments
from tests.core.reference_students import reference_logits, relative_error, write_reference


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["qwen3", "qwen3 block", "gemma3", "gemma3 row"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, nn.Module]:
    path = tmp_path_factory.mktemp("model") / "model.bitdistill"
    name, _, granularity = request.param.partition(" ")
    model = write_reference(path, name, granularity=granularity or "tensor")
    return Engine.load(path, num_threads=2), model


def random_sequences(seed: int, lengths: list[int], prefix: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    beginning = generator.integers(0, 256, prefix).tolist()
    return [beginning + generator.integers(0, 256, length).tolist() for length in lengths]


@pytest.mark.parametrize("prefix", [0, 1, 5, 16, 17, 40])
def test_a_sequence_gets_the_same_bits_alone_and_in_any_batch(pair: tuple[Engine, nn.Module], prefix: int) -> None:
    engine, _ = pair
    sequences = random_sequences(prefix, [1, 2, 3, 4, 7, 16, 17, 31, 50, 5, 1, 12, 33], prefix)
    labels = [3, 250, 17]
    alone = np.concatenate([engine.score_tokens([sequence], labels) for sequence in sequences])
    np.testing.assert_array_equal(engine.score_tokens(sequences, labels), alone)
    order = np.random.default_rng(1).permutation(len(sequences))
    np.testing.assert_array_equal(engine.score_tokens([sequences[i] for i in order], labels), alone[order])
    whole = np.stack([engine.logits(sequence)[-1] for sequence in sequences])
    np.testing.assert_array_equal(alone, whole[:, labels])


def test_continuations_of_one_prompt_do_not_see_each_other(
    pair: tuple[Engine, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model = pair
    prompts = random_sequences(0, [9, 20, 3], prefix=6)
    answers = random_sequences(1, [1, 4, 2, 4])
    pairs = [(prompt, answer) for prompt in prompts for answer in answers]
    scores = engine.score_ids(pairs)
    assert scores == [engine.score_ids([single])[0] for single in pairs]
    assert scores[::-1] == engine.score_ids(pairs[::-1])
    for slots in (1, 30, 60):  # so that one, or two to six, are computed at once
        monkeypatch.setattr("bitdistill_core.engine.model.BRANCH_SLOTS", slots)
        assert scores == engine.score_ids(pairs)
    for (prompt, answer), (log_probability, _) in zip(pairs, scores, strict=True):
        rows = torch.tensor(reference_logits(model, prompt + answer)).log_softmax(-1)[len(prompt) - 1 : -1]
        expected = float(rows[torch.arange(len(answer)), answer].sum())
        assert log_probability == pytest.approx(expected, rel=0.02)  # INT8 rounding ties


def test_batches_hold_every_sequence_once_and_share_its_beginning() -> None:
    sequences = [np.array(ids, np.int32) for ids in random_sequences(3, [10] * 20, prefix=30)]
    seen: list[int] = []
    for batch, indices in batches(sequences, [()] * len(sequences)):
        seen.extend(indices)
        assert batch.parents[0] == -1
        assert set(batch.parents[1:]) == {0}
        assert len(batch.segments[0]) >= 30
        for segment, index in zip(batch.segments[1:], indices, strict=True):
            np.testing.assert_array_equal(np.concatenate((batch.segments[0], segment)), sequences[index])
        ends = np.cumsum([len(segment) for segment in batch.segments]) - 1
        assert batch.outputs == ends[1:].tolist()
        assert sum(len(sequences[index]) for index in indices) <= batching.BATCH_TOKENS
    assert seen == list(range(20))


def test_a_shared_beginning_leaves_a_token_of_every_sequence() -> None:
    def prefix(*sequences: list[int]) -> int:
        return shared_prefix([np.array(sequence, np.int32) for sequence in sequences])

    assert prefix([1, 2, 3]) == 0
    assert prefix([1, 2, 3], [1, 2, 3]) == 2
    assert prefix([1, 2, 3], [1, 2]) == 1
    assert prefix([1, 2, 3], [4, 2, 3]) == 0
    assert prefix([1, 2, 3, 4], [1, 2, 5, 4], [1, 2, 3, 4, 5]) == 2


@pytest.mark.parametrize("count", [1, 2, 5, 40, 256, 257, 260, 1000])
def test_the_largest_logits_are_those_of_the_whole_head(pair: tuple[Engine, nn.Module], count: int) -> None:
    engine, _ = pair
    decoder = engine._decoder
    for sequence in random_sequences(7, [1, 12, 30]):
        hidden = decoder.forward([np.array(sequence, np.int32)], [len(sequence) - 1])
        logits = decoder.logits(hidden)[0]
        order = np.argsort(-logits, kind="stable")[:count]
        assert decoder.top(hidden, count) == [(int(token), float(logits[token])) for token in order]


def head_of(path: Path, rows: np.ndarray, scale: np.ndarray, *columns: np.ndarray) -> Engine:
    """An engine whose output head has these rows; `columns`: their scales and mean."""
    arguments = student_arguments(vocab_size=len(rows), hidden_size=rows.shape[1], num_attention_heads=2, head_dim=32)
    arguments["embeddings"] = {"model.embed_tokens": Int8Rows(rows, scale.astype(np.float32), *columns)}
    arguments["tokenizer_json"] = b'{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]}}'
    write_student(path, **arguments)
    return Engine.load(path, num_threads=2)


@pytest.mark.parametrize("kind", ["gaussian", "peaked", "equal", "hard", "shifted"])
def test_bounds_of_the_head_never_lose_the_largest(tmp_path: Path, kind: str) -> None:
    generator = np.random.default_rng(5)
    rows = np.clip(np.rint(generator.standard_normal((5003, 64)) * 38), -127, 127).astype(np.int8)
    scale = 0.01 * (0.5 + generator.random(5003))
    if kind == "equal":
        rows[:], scale[:] = rows[0], 0.01  # every logit is the same: the lowest token wins
    if kind == "hard":  # rows that differ in the lower three bits only
        rows = ((rows[:1].astype(np.int16) & ~7) + generator.integers(0, 8, rows.shape) - 4).clip(-127, 127)
        rows, scale = rows.astype(np.int8), np.full(5003, 0.01)
    column_scale, mean = np.ones(64, np.float32), np.zeros(64, np.float32)
    if kind == "shifted":  # a mean so large that float32 rounds most differences between logits away
        column_scale = np.exp2(generator.integers(-3, 4, 64)).astype(np.float32)
        mean = (1e4 * generator.standard_normal(64)).astype(np.float32)
    engine = head_of(tmp_path / "m", rows, scale, column_scale, mean)
    parts = [engine.model.tensors[f"model.embed_tokens.{part}"] for part in ("scan", "next", "rest")]
    np.testing.assert_array_equal(unpack_int8_rows(*parts, 64), rows)
    num_refined = num_kept = 0
    for _ in range(20):
        hidden = generator.standard_normal((1, 64)).astype(np.float32)
        if kind == "peaked":
            hidden += 0.05 * rows[generator.integers(0, 5003)]
        weight = rows * scale.astype(np.float32).astype(np.float64)[:, None] * column_scale + mean
        expected = weight @ hidden[0].astype(np.float64)
        logits = engine._decoder.logits(hidden)[0]
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
        order = np.argsort(-logits, kind="stable")
        for count in (1, 7):
            assert engine._decoder.top(hidden, count) == [(int(t), float(logits[t])) for t in order[:count]]
        refined, computed = engine._decoder.top_statistics(hidden, 1)
        if kind == "peaked":
            assert refined < 50
            assert computed < 10
        num_refined, num_kept = num_refined + refined, num_kept + computed - 2  # the threads' first guesses
        assert engine._decoder.row_logits(hidden, [17, 0])[0].tolist() == logits[[17, 0]].tolist()
    if kind == "gaussian":
        assert 0 < num_kept < 0.5 * num_refined


@pytest.mark.parametrize(("part", "lowest"), [("scan_error", 8), ("next_error", 4)])
def test_a_row_that_gains_all_that_a_bound_allows_is_found(tmp_path: Path, part: str, lowest: int) -> None:
    # Row 30 has nothing but lower bits, all along x: what it gains by them is the bound itself. Thirty rows look larger
    # by their upper bits, and are a little smaller.
    sign = np.tile([1, -1], 32)
    rows = np.zeros((60, 64), np.int8)
    rows[30] = np.where(sign > 0, lowest - 1, 0)
    gained = (lowest - 1) * 32
    for row in range(30):
        rows[row, np.roll(np.arange(64), row)[: gained // 8 - 1]] = 8
    rows[:30] *= sign.astype(np.int8)
    engine = head_of(tmp_path / "m", rows, np.full(60, 0.01))
    hidden = sign[None].astype(np.float32)
    logits = engine._decoder.logits(hidden)[0]
    assert engine._decoder.top(hidden, 1) == [(30, float(logits[30]))]
    header, data = split((tmp_path / "m").read_bytes())
    begin, end = header[f"model.embed_tokens.{part}"]["data_offsets"]
    data[begin:end] = (np.frombuffer(data[begin:end], np.float32) * np.float32(0.9)).tobytes()
    reseal(header, data)
    (tmp_path / "smaller").write_bytes(join(header, data))
    assert Engine.load(tmp_path / "smaller")._decoder.top(hidden, 1)[0][0] < 30  # a bound that is too small loses it


def test_a_row_that_the_first_scan_leaves_out_is_found(tmp_path: Path) -> None:
    # By its upper bits row 0 has 512, and all its lower ones are against x: 288. Row 45 has 384, and little that its
    # upper bits leave open: it cannot reach what row 0 promises.
    sign = np.tile([1, -1], 32)
    rows = np.zeros((60, 64), np.int8)
    rows[0] = np.where(sign > 0, 8, -1)
    rows[45] = np.where(sign > 0, np.where(np.arange(64) < 32, 11, 3), -5)
    engine = head_of(tmp_path / "m", rows, np.ones(60))
    logits = engine._decoder.logits(sign[None].astype(np.float32))[0]
    assert logits[[0, 45]].tolist() == [288, 384]
    assert engine._decoder.top(sign[None].astype(np.float32), 1) == [(45, 384.0)]


def test_half_precision_keys_and_values_stay_close(tmp_path: Path) -> None:
    model = write_reference(tmp_path / "m", "qwen3")
    engine = Engine.load(tmp_path / "m", num_threads=1)
    prompt = random_sequences(2, [40])[0]
    rows = {}
    for kv_dtype in ("float32", "float16"):
        cache = engine._decoder.new_cache(64, kv_dtype)
        hidden = engine._decoder.forward([np.array(prompt, np.int32)], range(40), cache=cache)
        rows[kv_dtype] = engine._decoder.logits(hidden)
        assert cache.num_bytes == 64 * 3 * 2 * 16 * 2 * (2 if kv_dtype == "float16" else 4)
    np.testing.assert_array_equal(rows["float32"], engine.logits(prompt))
    assert 0 < relative_error(rows["float16"], reference_logits(model, prompt)) < 0.05


@pytest.mark.parametrize("kernel", available_kernels())
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_a_prompt_of_many_chunks_is_that_of_small_parts(
    tmp_path: Path, name: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_reference(tmp_path / "m", name, window=2048)
    engine = Engine.load(tmp_path / "m", num_threads=2, kernel=kernel)
    prompt = random_sequences(3, [1500])[0]
    expected = engine.logits(prompt, last=True)
    cache = engine._decoder.new_cache(1500)
    for begin in range(0, 1500, 50):
        hidden = engine._decoder.forward([np.array(prompt[begin : begin + 50], np.int32)], [49], cache=cache)
    np.testing.assert_array_equal(engine._decoder.logits(hidden), expected)
    assert relative_error(expected[0], reference_logits(model, prompt)[-1]) < 0.05
    tokens = list(engine.generate_ids(prompt, 4, ignore_eos=True))
    monkeypatch.setattr("bitdistill_core.engine.model.PREFILL_TOKENS", 7)
    assert list(engine.generate_ids(prompt, 4, ignore_eos=True)) == tokens


def test_generation_uses_the_keys_and_values_it_was_loaded_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_reference(tmp_path / "m", "qwen3")
    engine = Engine.load(tmp_path / "m", num_threads=1, kv_dtype="float16")
    prompt, decoder = random_sequences(2, [40])[0], engine._decoder
    cache = decoder.new_cache(64, "float16")
    at_once = decoder.logits(decoder.forward([np.array(prompt, np.int32)], range(40), cache=cache))
    cache = decoder.new_cache(64, "float16")
    rows = [decoder.logits(decoder.forward([np.array([token], np.int32)], [0], cache=cache)) for token in prompt]
    np.testing.assert_array_equal(np.concatenate(rows), at_once)
    expected = []
    for _ in range(8):
        expected.append(int(rows[-1][0].argmax()))
        rows.append(decoder.logits(decoder.forward([np.array(expected[-1:], np.int32)], [0], cache=cache)))
    made: list[str] = []
    new_cache = type(decoder).new_cache
    monkeypatch.setattr(
        type(decoder), "new_cache", lambda self, length, dtype: made.append(dtype) or new_cache(self, length, dtype)
    )
    assert list(engine.generate_ids(prompt, 8, ignore_eos=True)) == expected
    assert made == ["float16"]


def test_a_prompt_in_parts_equals_it_at_once(pair: tuple[Engine, nn.Module]) -> None:
    engine, _ = pair
    prompt = random_sequences(4, [90])[0]
    expected = engine.logits(prompt)
    for parts in ([1, 89], [16, 16, 58], [3, 4, 83], [50, 39, 1]):
        cache = engine._decoder.new_cache(90)
        rows, begin = [], 0
        for length in parts:
            tokens = np.array(prompt[begin : begin + length], np.int32)
            rows.append(engine._decoder.logits(engine._decoder.forward([tokens], range(length), cache=cache)))
            begin += length
        np.testing.assert_array_equal(np.concatenate(rows), expected)


def test_one_engine_serves_several_threads(pair: tuple[Engine, nn.Module]) -> None:
    engine, _ = pair
    sequences = random_sequences(9, [5, 30, 61, 17])
    expected = [engine.logits(sequence) for sequence in sequences]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(10):
            if not np.array_equal(engine.logits(sequences[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(sequences))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_embeddings_are_the_final_hidden_states(pair: tuple[Engine, nn.Module]) -> None:
    engine, model = pair
    texts = ["one", "a longer text"]
    last, mean = engine.embed(texts), engine.embed(texts, pooling="mean")
    for row, text in enumerate(texts):
        ids = engine.tokenizer.encode(text, add_special_tokens=True)
        with torch.no_grad():
            hidden = model.get_decoder()(torch.tensor([ids])).last_hidden_state[0].numpy()
        assert relative_error(last[row], hidden[-1]) < 0.05
        assert relative_error(mean[row], hidden.mean(axis=0)) < 0.05


@pytest.mark.parametrize("count", [1, 300])
def test_a_logit_that_overflows_is_refused(tmp_path: Path, count: int) -> None:
    engine = head_of(tmp_path / "m", np.full((400, 64), 127, np.int8), np.ones(400))
    hidden = np.full((1, 64), 3e36, np.float32)
    with pytest.raises(ValueError, match=r"NaN or infinit"):
        engine._decoder.top(hidden, count)
