"""The packed file: the round trip, and one clear error for every way a file can be wrong."""

import contextlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from xxhash import xxh3_128_hexdigest

from bitdistill_core import packing
from bitdistill_core.engine.kernels import expand_base3
from bitdistill_core.packing import TernaryLinear, read_packed, write_student
from bitdistill_core.panels import unpack_int8_rows, unpack_ternary
from tests.core.packed_files import BASE3_BLOCK, BASE3_GROUPS, WHOLE_LINES, join, reseal, split, student_arguments


@pytest.fixture
def packed_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.bitdistill"
    write_student(path, **student_arguments())
    return path


def with_metadata(path: Path, **changes: str) -> None:
    header, data = split(path.read_bytes())
    header["__metadata__"].update(changes)
    path.write_bytes(join(header, data))


@pytest.mark.parametrize("granularity", ["tensor", "block"])
def test_a_base_three_file_holds_the_same_codes_in_fewer_bytes(tmp_path: Path, granularity: str) -> None:
    arguments = student_arguments(granularity=granularity, block_size=BASE3_BLOCK, **BASE3_GROUPS)
    for encoding in ("2bit", "base3"):
        write_student(tmp_path / encoding, **arguments | {"encoding": encoding})
    two_bit, base3 = read_packed(tmp_path / "2bit"), read_packed(tmp_path / "base3")
    assert (two_bit.encoding, base3.encoding) == ("2bit", "base3")
    assert not [name for name in base3.tensors if name.endswith(".w_packed")]
    for name, linear in arguments["linears"].items():
        w_packed, w_base3 = two_bit.tensors[f"{name}.w_packed"], base3.tensors[f"{name}.w_base3"]
        n, k = linear.w_ternary.shape
        num_blocks = 1 if granularity == "tensor" else k // BASE3_BLOCK
        groups = num_blocks * (k // num_blocks // 96)
        assert w_packed.nbytes - w_base3.nbytes == n // 16 * groups * (6 * 64 - 320) > 0
        np.testing.assert_array_equal(expand_base3(w_base3, n, k, num_blocks), w_packed)
        assert w_base3.ctypes.data % 64 == 0
    assert base3.tensors["model.embed_tokens.scan"].ctypes.data % 64 == 0


def test_base_three_needs_blocks_of_whole_lines(tmp_path: Path) -> None:
    arguments = student_arguments(granularity="block", block_size=56, encoding="base3", **BASE3_GROUPS)
    with pytest.raises(
        ValueError, match=r"multiple of 16; got num_blocks=4 in 14 .*; choose another block size .*in linear="
    ):
        write_student(tmp_path / "m", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_file_of_both_encodings_is_refused(tmp_path: Path) -> None:
    write_student(tmp_path / "m", **student_arguments())
    header, data = split((tmp_path / "m").read_bytes())
    name = "model.layers.0.mlp.up_proj"
    header[f"{name}.w_base3"] = header.pop(f"{name}.w_packed")
    (tmp_path / "m").write_bytes(join(header, data))
    with pytest.raises(ValueError, match=r"lacks 6 tensors .* first missing tensor=.*q_proj\.w_base3"):
        read_packed(tmp_path / "m")


@pytest.mark.parametrize("granularity", ["row", "block"])
def test_a_file_holds_the_scale_of_every_row_or_block(tmp_path: Path, granularity: str) -> None:
    arguments = student_arguments(granularity=granularity, **WHOLE_LINES)
    write_student(tmp_path / "m", **arguments)
    model = read_packed(tmp_path / "m")
    for name, linear in arguments["linears"].items():
        scale = model.tensors[f"{name}.weight_scale"]
        n, k = linear.w_ternary.shape
        assert scale.shape == ((n,) if granularity == "row" else (n, k // 16))
        np.testing.assert_array_equal(scale, linear.weight_scale)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((32, 6), r"blocks of a multiple of 16; got linear={name} k=48 block_size=8 .*; choose another block size"),
        ((32, 2), r"blocks of a multiple of 16; got linear={name} k=48 block_size=24"),
        ((32, 1), r"one block size; got linear={first} block_size=16 and linear={name} block_size=48"),
        ((32,), r"one block size; got linear={first} block_size=16 and linear={name} block_size=None"),
        ((32, 5), r"tensor={name}\.weight_scale needs .* or \(32, a divisor of 48\); got .* shape=\(32, 5\)"),
        ((32, 0), r"weight_scale needs .* shape=\(32, 0\)"),
        ((48,), r"weight_scale needs .* shape=\(48,\)"),
        ((1, 32, 3), r"weight_scale needs .* shape=\(1, 32, 3\)"),
    ],
)
def test_write_names_the_layer_whose_scales_do_not_fit(tmp_path: Path, shape: tuple[int, ...], message: str) -> None:
    arguments = student_arguments(granularity="block", **WHOLE_LINES)
    first, name = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
    linear = arguments["linears"][name]
    scale = np.ones(shape, np.float32)
    arguments["linears"][name] = TernaryLinear(linear.w_ternary, scale, input_norm=linear.input_norm)
    with pytest.raises(ValueError, match=message.format(first=first, name=name)):
        write_student(tmp_path / "m", **arguments)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("subln", ["none", "output", "all"])
def test_a_file_holds_exactly_what_was_written(tmp_path: Path, tied: bool, subln: str) -> None:
    surgery = {"subln": subln, "sub_norm_eps": 1e-5}
    arguments = student_arguments(tie_word_embeddings=tied, bitdistill=surgery, attention_bias=True)
    write_student(tmp_path / "m", **arguments)
    model = read_packed(tmp_path / "m")
    assert model.created_by == "test 1"
    assert model.config.to_dict() == arguments["config"]
    assert ("lm_head.scan" in model.tensors) == (not tied)
    for name, linear in arguments["linears"].items():
        unpacked = unpack_ternary(model.tensors[f"{name}.w_packed"], *linear.w_ternary.shape)
        np.testing.assert_array_equal(unpacked, linear.w_ternary)
        np.testing.assert_array_equal(model.tensors[f"{name}.weight_scale"], linear.weight_scale)
        assert (f"{name}.input_norm.weight" in model.tensors) == (linear.input_norm is not None)
        assert (f"{name}.bias" in model.tensors) == (linear.bias is not None)
    rows = arguments["embeddings"]["model.embed_tokens"]
    parts = [model.tensors[f"model.embed_tokens.{part}"] for part in ("scan", "next", "rest")]
    np.testing.assert_array_equal(unpack_int8_rows(*parts, rows.w_int8.shape[1]), rows.w_int8)
    for name in ("row_scale", "column_scale", "mean"):
        np.testing.assert_array_equal(model.tensors[f"model.embed_tokens.{name}"], getattr(rows, name))
    codes = rows.w_int8.astype(np.float64)
    row_norm = np.linalg.norm(codes, axis=1)
    errors = {part: np.linalg.norm((codes + 128) % n - (n - 1) / 2, axis=1) for part, n in (("scan", 8), ("next", 4))}
    norms = {"row_norm": row_norm, "scan_error": errors["scan"], "next_error": errors["next"]}
    for name, norm in norms.items():
        stored = model.tensors[f"model.embed_tokens.{name}"].astype(np.float64)
        assert (stored >= norm).all()
        np.testing.assert_allclose(stored, norm, rtol=1e-6)
    assert model.tensors["tokenizer.json"].tobytes() == b"{}"


def test_the_file_is_a_safetensors_file_mapped_read_only_with_aligned_lines(packed_file: Path) -> None:
    model = read_packed(packed_file)
    with safe_open(packed_file, framework="numpy") as file:
        assert file.metadata()["format"] == "bitdistill"
        assert file.metadata()["format_version"] == "7"
        names = list(file.keys())
        assert set(names) == set(model.tensors)
        for name in names:
            np.testing.assert_array_equal(file.get_tensor(name), model.tensors[name])
    for name, tensor in model.tensors.items():
        assert not tensor.flags.writeable
        if name.endswith(".w_packed"):
            assert tensor.ctypes.data % 64 == 0


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    write_student(tmp_path / "a", **student_arguments())
    write_student(tmp_path / "b", **student_arguments())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_failed_write_leaves_the_old_file_and_no_other(packed_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = packed_file.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(packing.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_student(packed_file, **student_arguments(seed=1))
    assert packed_file.read_bytes() == before
    assert [path.name for path in packed_file.parent.iterdir()] == [packed_file.name]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_write_names_the_tensor_with_a_number_that_is_not_finite(tmp_path: Path, value: float) -> None:
    arguments = student_arguments()
    arguments["norms"]["model.norm"][3] = value
    with pytest.raises(ValueError, match=r"got NaN or infinity in tensor=model\.norm\.weight"):
        write_student(tmp_path / "m", **arguments)
    arguments = student_arguments()
    name = "model.layers.0.mlp.up_proj"
    arguments["linears"][name] = TernaryLinear(arguments["linears"][name].w_ternary, np.array(value, np.float32))
    with pytest.raises(ValueError, match=rf"got NaN or infinity in tensor={name}\.weight_scale"):
        write_student(tmp_path / "m", **arguments)
    assert not (tmp_path / "m").exists()


def test_write_names_what_does_not_fit_the_config(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    arguments, one = student_arguments(), np.array(1, np.float32)
    linear = arguments["linears"].pop(name)
    with pytest.raises(ValueError, match=rf"the model lacks 2 tensors .* first missing tensor={name}\.w_packed"):
        write_student(tmp_path / "m", **arguments)
    arguments["linears"][name] = TernaryLinear(linear.w_ternary[:, :-1], one)
    with pytest.raises(ValueError, match=rf"linear={name} .* needs shape=\(20, 24\); got shape=\(20, 23\)"):
        write_student(tmp_path / "m", **arguments)
    arguments["linears"][name] = TernaryLinear(linear.w_ternary * 2, one)
    with pytest.raises(ValueError, match=rf"needs int8 codes -1, 0 and 1.*\(in linear={name}\)"):
        write_student(tmp_path / "m", **arguments)
    arguments["linears"][name] = TernaryLinear(linear.w_ternary, one, bias=np.zeros(20, np.float32))
    with pytest.raises(ValueError, match=rf"1 tensors unknown to its config; first unexpected tensor={name}\.bias"):
        write_student(tmp_path / "m", **arguments)


def test_reads_no_file_and_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none found at path=.*absent"):
        read_packed(tmp_path / "absent")
    with pytest.raises(ValueError, match="none found at path="):
        read_packed(tmp_path)


@pytest.mark.parametrize("content", [b"", b"abc", b"GGUF" + bytes(100), struct.pack("<Q", 2) + b"{}"])
def test_says_when_a_file_is_not_a_packed_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(ValueError, match="is not a packed bitdistill model; make one with the pack stage"):
        read_packed(tmp_path / "m")


def test_another_safetensors_file_is_not_a_packed_model(tmp_path: Path) -> None:
    save_file({"x": np.zeros(3)}, tmp_path / "m", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is not a packed bitdistill model"):
        read_packed(tmp_path / "m")


def test_names_both_versions_when_the_format_version_differs(packed_file: Path) -> None:
    with_metadata(packed_file, format_version="1")
    with pytest.raises(ValueError, match=r"this engine reads format_version=7; got format_version=1"):
        read_packed(packed_file)


@pytest.mark.parametrize("kept", [9, 300, -1, -1000])
def test_says_when_a_file_is_truncated(packed_file: Path, kept: int) -> None:
    packed_file.write_bytes(packed_file.read_bytes()[:kept])
    with pytest.raises(ValueError, match="is truncated"):
        read_packed(packed_file)


def test_says_when_a_file_has_bytes_after_its_end(packed_file: Path) -> None:
    packed_file.write_bytes(packed_file.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="has bytes after its end"):
        read_packed(packed_file)


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up_proj.w_packed", "model.norm.weight", "model.embed_tokens.rest", "tokenizer.json"]
)
def test_names_the_tensor_whose_bytes_are_corrupted(packed_file: Path, name: str) -> None:
    header, data = split(packed_file.read_bytes())
    data[header[name]["data_offsets"][1] - 1] ^= 4
    packed_file.write_bytes(join(header, data))
    with pytest.raises(ValueError, match=rf"is corrupted: the checksum of tensor={name} differs"):
        read_packed(packed_file)


def test_refuses_nan_behind_right_checksums(packed_file: Path) -> None:
    header, data = split(packed_file.read_bytes())
    begin, _ = header["model.norm.weight"]["data_offsets"]
    data[begin : begin + 4] = struct.pack("<f", float("nan"))
    reseal(header, data)
    packed_file.write_bytes(join(header, data))
    with pytest.raises(ValueError, match=r"finite numbers only; got NaN or infinity in tensor=model\.norm\.weight"):
        read_packed(packed_file)


@pytest.mark.parametrize("shift", [1, 2, 4, 32])
def test_refuses_tensors_that_are_not_aligned(packed_file: Path, shift: int) -> None:
    header, data = split(packed_file.read_bytes())
    packed_file.write_bytes(join(header, data))
    read_packed(packed_file)
    packed_file.write_bytes(join(header, data, shift=shift))
    with pytest.raises(ValueError, match=r"is corrupted: tensor=.* begins at byte=\d+, which is no multiple of"):
        read_packed(packed_file)


def test_refuses_a_number_beyond_any_float_in_the_config(packed_file: Path) -> None:
    header, _ = split(packed_file.read_bytes())
    config = json.dumps(json.loads(header["__metadata__"]["config"]) | {"rms_norm_eps": 10**400})
    with_metadata(packed_file, config=config, config_xxh3=xxh3_128_hexdigest(config.encode()))
    with pytest.raises(ValueError, match="rms_norm_eps"):
        read_packed(packed_file)


@pytest.mark.parametrize("scale", [1e37, 1e-37])
def test_refuses_row_scales_with_which_nothing_can_be_bounded(tmp_path: Path, scale: float) -> None:
    arguments = student_arguments()
    rows = arguments["embeddings"]["model.embed_tokens"]
    rows.row_scale[3] = 0.0
    write_student(tmp_path / "m", **arguments)
    rows.row_scale[3] = scale
    with pytest.raises(ValueError, match="row scales of an embedding are 0 or from 1e-30 to 1e30; got "):
        write_student(tmp_path / "m", **arguments)


def test_says_when_the_config_is_corrupted(packed_file: Path) -> None:
    header, _ = split(packed_file.read_bytes())
    config = json.loads(header["__metadata__"]["config"]) | {"rms_norm_eps": 1e-5}
    with_metadata(packed_file, config=json.dumps(config))
    with pytest.raises(ValueError, match="is corrupted: the checksum of its config differs"):
        read_packed(packed_file)


def test_names_the_missing_tensor(packed_file: Path) -> None:
    header, data = split(packed_file.read_bytes())
    del header["model.norm.weight"]
    packed_file.write_bytes(join(header, data))
    with pytest.raises(ValueError, match=r"lacks 1 tensors .* first missing tensor=model\.norm\.weight"):
        read_packed(packed_file)


def test_names_the_tensor_that_does_not_fit_the_config(packed_file: Path) -> None:
    header, data = split(packed_file.read_bytes())
    header["model.norm.weight"]["shape"] = [2, 12]
    packed_file.write_bytes(join(header, data))
    with pytest.raises(ValueError, match=r"tensor=model\.norm\.weight needs .* shape=\(24,\); got .*\(2, 12\)"):
        read_packed(packed_file)
    header["model.norm.weight"]["shape"] = [23]
    packed_file.write_bytes(join(header, data))
    with pytest.raises(ValueError, match=r"is corrupted: the entry of tensor=model\.norm\.weight is .*\[23\]"):
        read_packed(packed_file)


def test_a_damaged_header_is_always_a_clear_error(packed_file: Path) -> None:
    content = packed_file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    model = read_packed(packed_file)
    config, intact = model.config, {name: tensor.tobytes() for name, tensor in model.tensors.items()}
    generator = np.random.default_rng(0)
    for position in generator.integers(0, 8 + length, 600):
        damaged = bytearray(content)
        damaged[position] ^= 1 << generator.integers(8)
        packed_file.write_bytes(damaged)
        # No error only where nothing that matters changed: white space, or the free text of created_by.
        with contextlib.suppress(ValueError):
            read = read_packed(packed_file)
            assert {name: tensor.tobytes() for name, tensor in read.tensors.items()} == intact
            assert read.config == config
