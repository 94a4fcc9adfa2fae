"""Files of encoding base3: what they expand to, and the same logits as their 2-bit twins, bit for bit."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from bitdistill_core.engine.kernels import available_kernels
from bitdistill_core.engine.memory import PAGEMAP
from bitdistill_core.engine.model import Engine
from tests.core.test_engine import PROMPT, write_reference
from tests.core.test_packing import join_file, split_file


@pytest.fixture(scope="module", params=["tensor", "row", "block"])
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("twins")
    write_reference(folder / "two_bit", "qwen3", granularity=request.param, encoding="2bit")
    write_reference(folder / "base3", "qwen3", granularity=request.param, encoding="base3")
    return folder / "two_bit", folder / "base3"


@pytest.mark.parametrize("kernel", available_kernels())
def test_a_base_three_file_runs_to_the_logits_of_its_twin(twins: tuple[Path, Path], kernel: str) -> None:
    two_bit, base3 = (Engine.load(path, num_threads=1, kernel=kernel) for path in twins)
    np.testing.assert_array_equal(base3.logits(PROMPT), two_bit.logits(PROMPT))
    assert list(base3.generate_ids(PROMPT, 8)) == list(two_bit.generate_ids(PROMPT, 8))


def test_expanded_panels_are_those_of_the_twin_on_64_byte_addresses(twins: tuple[Path, Path]) -> None:
    two_bit, base3 = (Engine.load(path, num_threads=1) for path in twins)
    names = [name for name in two_bit.model.tensors if name.endswith(".w_packed")]
    assert names
    for name in names:
        expanded = base3._decoder.arrays[name]
        np.testing.assert_array_equal(expanded, two_bit.model.tensors[name])
        assert expanded.ctypes.data % 64 == 0


def test_info_shows_the_encoding_and_the_bytes_of_the_file(twins: tuple[Path, Path]) -> None:
    two_bit, base3 = (Engine.load(path, num_threads=1) for path in twins)
    assert (two_bit.info()["encoding"], base3.info()["encoding"]) == ("2bit", "base3")
    ternary = [engine.info()["bytes"]["ternary_weights"] for engine in (two_bit, base3)]
    assert ternary[1] == pytest.approx(0.8 * ternary[0], rel=0.01)
    assert base3.info()["num_parameters"] == two_bit.info()["num_parameters"]
    if PAGEMAP.exists():
        # All that was expanded; of so small a file the system maps every page beside one that is used.
        assert ternary[0] <= base3.resident()["ternary_weights"] <= sum(ternary)


def test_a_byte_of_243_behind_right_checksums_is_refused(twins: tuple[Path, Path], tmp_path: Path) -> None:
    header, data = split_file(twins[1])
    name = "model.layers.1.mlp.down_proj.w_base3"
    begin, end = header[name]["data_offsets"]
    damaged = bytearray(data)
    damaged[end - 1] = 250
    checksums = json.loads(header["__metadata__"]["checksums"])
    checksums[name] = hashlib.sha256(damaged[begin:end]).hexdigest()
    header["__metadata__"]["checksums"] = json.dumps(checksums)
    join_file(tmp_path / "m", header, bytes(damaged))
    with pytest.raises(
        ValueError, match=rf"path=.* a byte below 243; got byte=250; the bytes are corrupted.*tensor={name}"
    ):
        Engine.load(tmp_path / "m")
