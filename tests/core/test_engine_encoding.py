"""Files of base 3: streamed or expanded, the same logits as their 2-bit twins, bit for bit."""

import os
from pathlib import Path

import numpy as np
import pytest

from bitdistill_core.engine.kernels import available_kernels, streams_base3
from bitdistill_core.engine.memory import PAGEMAP
from bitdistill_core.engine.model import Engine
from bitdistill_core.packing import read_packed, write_student
from tests.core.packed_files import BASE3_BLOCK, BASE3_GROUPS, TOKENIZER, join, reseal, split, student_arguments

PROMPT = [1, 5, 2, 0, 3, 3, 1]


@pytest.fixture(scope="module", params=["tensor", "row", "block"])
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("twins")
    arguments = student_arguments(granularity=request.param, block_size=BASE3_BLOCK, **BASE3_GROUPS)
    for encoding in ("2bit", "base3"):
        write_student(folder / encoding, **arguments | {"encoding": encoding, "tokenizer_json": TOKENIZER})
    return folder / "2bit", folder / "base3"


@pytest.mark.parametrize("kernel", available_kernels())
def test_a_base_three_file_runs_to_the_logits_of_its_twin(twins: tuple[Path, Path], kernel: str) -> None:
    two_bit, base3 = (Engine.load(path, num_threads=1, kernel=kernel) for path in twins)
    for tokens in (1, 2, 3, len(PROMPT)):
        np.testing.assert_array_equal(base3.logits(PROMPT[:tokens]), two_bit.logits(PROMPT[:tokens]))
    generated = [list(engine.generate_ids(PROMPT, 8, ignore_eos=True)) for engine in (two_bit, base3)]
    assert generated[0] == generated[1]
    assert len(generated[0]) == 8


@pytest.mark.parametrize("kernel", available_kernels())
def test_codes_are_those_of_the_file_or_the_panels_of_the_twin(twins: tuple[Path, Path], kernel: str) -> None:
    two_bit, base3 = (Engine.load(path, num_threads=1, kernel=kernel) for path in twins)
    mapped = read_packed(twins[1])
    names = [name for name in two_bit.model.tensors if name.endswith(".w_packed")]
    assert names
    for name in names:
        codes = name if not streams_base3(kernel) else name.replace("w_packed", "w_base3")
        array = base3._decoder.arrays[codes]
        expected = mapped if streams_base3(kernel) else two_bit.model
        np.testing.assert_array_equal(array, expected.tensors[codes])
        assert array.ctypes.data % 64 == 0
        assert array.flags.writeable  # in memory of its own, not in the map
        assert not mapped.tensors[name.replace("w_packed", "w_base3")].flags.writeable


def test_a_head_that_is_read_at_once_generates_the_same(twins: tuple[Path, Path]) -> None:
    later, at_once = (Engine.load(twins[1], num_threads=1, read_head=read_head) for read_head in (False, True))
    head = f"{later.config.head}.scan"
    assert at_once.model.tensors[head].flags.writeable
    assert not later.model.tensors[head].flags.writeable
    generated = [list(engine.generate_ids(PROMPT, 8, ignore_eos=True)) for engine in (later, at_once)]
    assert generated[0] == generated[1]
    copies = [later._decoder.arrays[head], at_once.model.tensors[head]]
    np.testing.assert_array_equal(copies[0], copies[1])


def test_a_file_truncated_before_the_first_token_is_one_error(twins: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(twins[1].read_bytes())
    engine = Engine.load(path, num_threads=2)
    hidden = engine._decoder.forward([np.array(PROMPT, np.int32)], [0])
    os.truncate(path, engine.model.offsets[f"{engine.config.head}.scan"])
    with pytest.raises(ValueError, match="was overwritten while it was in use; load it again"):
        engine._decoder.logits(hidden)


def test_another_model_copied_over_a_loaded_one_gives_no_answer(twins: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(twins[1].read_bytes())
    engine, before = Engine.load(path, num_threads=1), path.stat()
    expected = engine.logits(PROMPT)
    path.write_bytes(twins[1].read_bytes())  # in place
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    for use in (lambda: engine.logits(PROMPT), lambda: engine.score(["a"], ["b"]), lambda: engine.embed(["a"])):
        with pytest.raises(ValueError, match="was overwritten while it was in use; load it again"):
            use()
    engine = Engine.load(path, num_threads=1)
    other = tmp_path / "new"
    other.write_bytes(twins[0].read_bytes())
    other.replace(path)
    np.testing.assert_array_equal(engine.logits(PROMPT), expected)


def test_info_shows_the_encoding_and_the_bytes_of_the_file(twins: tuple[Path, Path]) -> None:
    two_bit, base3 = (Engine.load(path, num_threads=1, kernel="scalar") for path in twins)
    assert (two_bit.info()["encoding"], base3.info()["encoding"]) == ("2bit", "base3")
    ternary = [engine.info()["bytes"]["ternary_weights"] for engine in (two_bit, base3)]
    assert 320 / 384 <= ternary[1] / ternary[0] < 0.9
    assert base3.info()["num_parameters"] == two_bit.info()["num_parameters"]
    if PAGEMAP.exists():
        base3.logits(PROMPT)
        assert 0 < base3.resident()["ternary_weights"] <= sum(ternary)


@pytest.mark.parametrize("kernel", available_kernels())
@pytest.mark.parametrize("place", [0, -1])  # in a group; in a line beside the groups
def test_what_is_no_code_behind_right_checksums_is_refused(
    twins: tuple[Path, Path], tmp_path: Path, kernel: str, place: int
) -> None:
    header, data = split(twins[1].read_bytes())
    name = "model.layers.0.mlp.down_proj.w_base3"
    begin, end = header[name]["data_offsets"]
    if place == 0:
        data[begin] = 0x0F  # a magnitude of 15
    else:
        data[end - 1] = 0xFF
    reseal(header, data)
    (tmp_path / "m").write_bytes(join(header, data))
    with pytest.raises(ValueError, match=rf"path=.* is corrupted: tensor={name} holds codes that are no ternary"):
        Engine.load(tmp_path / "m", kernel=kernel)
