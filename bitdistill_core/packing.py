"""Ternary codes <-> bytes, and the packed model file `model.bitdistill`. NumPy only.

Not for quantising: codes and scales come in ready-made (bitdistill_core.quantize), and not for running them: engine/.

Panel layout of `w_packed`, uint8 of shape (ceil(N / 16), ceil(K / 16), 64), for codes w_ternary + 1 in {0, 1, 2}:

    A panel is 16 rows. It is stored as one 64-byte line for every 16 columns k, so one thread reads one stream.

    line of panel P, step S = rows n = 16 P + r, r = 0..15, columns k = 16 S + 4 p + j, p = 0..3, j = 0..3

    byte     0     1     2     3  |  4 ...  7 | ... | 28 .. 31 | 32 .. 35 | ... | 60 .. 63
    row r    0     0     0     0  |  1 ...  1 | ... |  7 ..  7 |  8 ..  8 | ... | 15 .. 15
    j        0     1     2     3  |  0 ...  3 | ... |  0 ..  3 |  0 ..  3 | ... |  0 ..  3

    bits     7 6 | 5 4 | 3 2 | 1 0        of each byte: one code a plane
    plane p   3  |  2  |  1  |  0

    So bytes 0..31 shifted right by 2p and masked with 3 are 8 rows x 4 columns: what one AVX2 multiply takes
    together with the dword x[16 S + 4 p .. + 3] in every lane. Byte 4 r + j of the line is
        code(k = j) + 4 code(k = 4 + j) + 16 code(k = 8 + j) + 64 code(k = 12 + j)   of row r, k counted from 16 S.
    Rows and columns beyond N and K have code 1 (weight 0): a line of padding is 64 times 0x55.

The file is a safetensors file: 8 bytes header length (little endian), the JSON header, then the tensors without
gaps. The header is padded with spaces and `w_packed` tensors come first, so every line starts on a 64-byte address
of a memory map. Metadata: format, format_version, config (JSON of engine.config.EngineConfig), config_sha256,
checksums (JSON, tensor name to the SHA-256 of its bytes), created_by. Tensors, by Hugging Face's module names:

    <linear>.w_packed uint8, <linear>.weight_scale fp32 (), [<linear>.bias fp32 (N,)],
    [<linear>.input_norm.weight fp32 (K,)]
    <embedding>.w_int8 int8 (V, D)   <embedding>.row_scale fp32 (V,)      lm_head too, unless it is tied
    <norm>.weight fp32        tokenizer.json, task.json uint8: their bytes (task.json: null, or the prompt and labels)
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitdistill_core.engine.config import EngineConfig, linear_layers, norm_layers

FORMAT = "bitdistill"
FORMAT_VERSION = "1"
TOKENIZER, TASK = BLOBS = ("tokenizer.json", "task.json")
PANEL_ROWS, LINE_K, LINE_BYTES = 16, 16, 64
MAX_HEADER_BYTES = 100 * 1024 * 1024  # the limit of the safetensors format

_DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "F32": np.dtype("<f4")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TernaryLinear:
    """One linear layer to write: weight ~ weight_scale * w_ternary, N out by K in."""

    w_ternary: NDArray[np.int8]  # (N, K) in {-1, 0, 1}
    weight_scale: float
    bias: NDArray[np.float32] | None = None  # (N,)
    input_norm: NDArray[np.float32] | None = None  # (K,), the SubLN gain


@dataclass(frozen=True)
class Int8Rows:
    """An embedding or output head to write: row v ~ row_scale[v] * w_int8[v], row_scale = absmax / 127."""

    w_int8: NDArray[np.int8]  # (V, D)
    row_scale: NDArray[np.float32]  # (V,)


@dataclass(frozen=True)
class PackedModel:
    """A packed file, memory-mapped: the tensors are read-only views of the map."""

    path: Path
    config: EngineConfig
    tensors: dict[str, np.ndarray]
    created_by: str

    @property
    def task(self) -> dict[str, Any] | None:
        """What the model was trained for: name, kind, prompt, label_words."""
        task: dict[str, Any] | None = json.loads(self.tensors[TASK].tobytes())
        return task


def packed_shape(n: int, k: int) -> tuple[int, int, int]:
    """Shape of `w_packed` for N = n rows of K = k columns."""
    return -(-n // PANEL_ROWS), -(-k // LINE_K), LINE_BYTES


def pack_ternary(w_ternary: NDArray[np.int8]) -> NDArray[np.uint8]:
    """`w_packed` of (N, K) codes in {-1, 0, 1}, in the panel layout of this module's docstring."""
    if w_ternary.ndim != 2 or 0 in w_ternary.shape:
        raise ValueError(f"packing needs a matrix (N, K) that is not empty; got shape={w_ternary.shape}")
    if w_ternary.dtype != np.int8 or w_ternary.min() < -1 or w_ternary.max() > 1:
        raise ValueError(
            f"packing needs int8 codes -1, 0 and 1; got dtype={w_ternary.dtype} min={w_ternary.min()} "
            f"max={w_ternary.max()}; quantise with quantize_weight first"
        )
    n, k = w_ternary.shape
    panels, lines, _ = packed_shape(n, k)
    codes = np.ones((panels * PANEL_ROWS, lines * LINE_K), np.uint8)
    codes[:n, :k] = w_ternary + 1
    by_plane = codes.reshape(panels, PANEL_ROWS, lines, 4, 4).transpose(3, 0, 2, 1, 4)  # plane, panel, line, row, j
    packed = by_plane[0] | by_plane[1] << 2 | by_plane[2] << 4 | by_plane[3] << 6
    return packed.reshape(panels, lines, LINE_BYTES)


def unpack_ternary(w_packed: NDArray[np.uint8], n: int, k: int) -> NDArray[np.int8]:
    """The (N, K) codes in {-1, 0, 1} that `pack_ternary` packed."""
    if w_packed.shape != packed_shape(n, k):
        raise ValueError(f"w_packed of n={n} k={k} has shape {packed_shape(n, k)}; got shape={w_packed.shape}")
    panels, lines, _ = w_packed.shape
    line_rows = w_packed.reshape(panels, lines, PANEL_ROWS, 4)
    planes = np.stack([line_rows >> 2 * plane & 3 for plane in range(4)], axis=3)  # panel, line, row, plane, j
    codes = planes.transpose(0, 2, 1, 3, 4).reshape(panels * PANEL_ROWS, lines * LINE_K)[:n, :k]
    if (codes == 3).any():
        raise ValueError("w_packed holds code 3, which is no ternary weight; the bytes are corrupted; pack it again")
    return codes.astype(np.int8) - 1


def write_student(
    path: Path,
    *,
    config: dict[str, Any],
    linears: Mapping[str, TernaryLinear],
    embeddings: Mapping[str, Int8Rows],
    norms: Mapping[str, NDArray[np.float32]],
    tokenizer_json: bytes,
    task: Mapping[str, Any] | None = None,
    created_by: str,
) -> None:
    """Writes the packed file at `path`, or leaves what was there: a crash never shows half a file.

    Args:
        config: what `engine_config` returned.
        linears: by module name, `model.layers.0.self_attn.q_proj`.
        embeddings: `model.embed_tokens`, and `lm_head` unless it is tied.
        norms: weights by module name, `model.norm`, without SubLN (that is `TernaryLinear.input_norm`).
        task: what the model was trained for: name, kind, prompt, label_words.
        created_by: who wrote it, with version: `bitdistill 0.1.0`.
    Raises:
        ValueError: a tensor missing, unexpected, of another shape than `config` says, or with NaN or infinity.
    """
    engine = EngineConfig.from_dict(config)
    shapes = {name: (layer.n, layer.k) for name, layer in linear_layers(engine).items()}
    tensors: dict[str, np.ndarray] = {}
    for name, linear in linears.items():
        tensors[f"{name}.w_packed"] = _packed(name, linear.w_ternary, shapes.get(name))
        tensors[f"{name}.weight_scale"] = _float32(linear.weight_scale)
        if linear.bias is not None:
            tensors[f"{name}.bias"] = _float32(linear.bias)
        if linear.input_norm is not None:
            tensors[f"{name}.input_norm.weight"] = _float32(linear.input_norm)
    for name, weight in norms.items():
        tensors[f"{name}.weight"] = _float32(weight)
    for name, rows in embeddings.items():
        tensors[f"{name}.row_scale"] = _float32(rows.row_scale)
    for name, rows in embeddings.items():
        tensors[f"{name}.w_int8"] = np.ascontiguousarray(rows.w_int8)
    tensors[TOKENIZER] = np.frombuffer(tokenizer_json, np.uint8)
    tensors[TASK] = np.frombuffer(json.dumps(task).encode(), np.uint8)
    _check_tensors("the model", engine, tensors)
    for name, tensor in tensors.items():
        if tensor.dtype == np.float32 and not np.isfinite(tensor).all():
            raise ValueError(f"a packed model holds finite numbers only; got NaN or infinity in tensor={name}")
    write_packed(path, config=config, tensors=tensors, created_by=created_by)


def write_packed(path: Path, *, config: dict[str, Any], tensors: Mapping[str, np.ndarray], created_by: str) -> None:
    """Writes checked `tensors` with checksums, atomically: a temporary file beside `path`, fsync, then a rename."""
    order = sorted(tensors, key=lambda name: (not name.endswith(".w_packed"), tensors[name].dtype != np.float32))
    config_json = json.dumps(config, sort_keys=True)
    checksums = {name: hashlib.sha256(tensors[name].data).hexdigest() for name in order}
    header: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "config": config_json,
            "config_sha256": hashlib.sha256(config_json.encode()).hexdigest(),
            "checksums": json.dumps(checksums),
            "created_by": created_by,
        }
    }
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header_json = json.dumps(header).encode()
    header_json += b" " * (-(8 + len(header_json)) % LINE_BYTES)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(len(header_json).to_bytes(8, "little") + header_json)
            for name in order:
                file.write(tensors[name].data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def read_packed(path: Path) -> PackedModel:
    """The packed model at `path`, memory-mapped, after every check: version, size, config, shapes, checksums.

    Raises:
        ValueError: not a packed model, another format version, truncated, corrupted, or not what its config says.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"a packed model is a file written by the pack stage; none found at path={path}")
    header, metadata, data_begin = _read_header(path)
    if metadata["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"this engine reads format_version={FORMAT_VERSION}; got format_version={metadata['format_version']} in "
            f"path={path}; pack the model again with this version"
        )
    checksums = _check_header(path, header, metadata)
    expected_size = data_begin + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    size = path.stat().st_size
    if size != expected_size:
        fault = "is truncated" if size < expected_size else "has bytes after its end"
        raise ValueError(f"path={path} {fault}: expected_bytes={expected_size} got bytes={size}; copy or pack it again")
    config = EngineConfig.from_dict(json.loads(metadata["config"]))
    tensors = _map_tensors(path, header, data_begin)
    _check_tensors(f"path={path}", config, tensors)
    for name, tensor in tensors.items():
        if hashlib.sha256(tensor.data).hexdigest() != checksums.get(name):
            raise ValueError(f"path={path} is corrupted: the checksum of tensor={name} differs; copy or pack it again")
    return PackedModel(path, config, tensors, metadata["created_by"])


def _packed(name: str, w_ternary: NDArray[np.int8], shape: tuple[int, int] | None) -> NDArray[np.uint8]:
    if shape is not None and w_ternary.shape != shape:  # padding would hide it
        raise ValueError(f"linear={name} does not fit its config: needs shape={shape}; got shape={w_ternary.shape}")
    try:
        return pack_ternary(w_ternary)
    except ValueError as error:
        raise ValueError(f"{error} (in linear={name})") from None


def _float32(values: Any) -> NDArray[np.float32]:
    array = np.asarray(values, np.float32)
    return array if array.flags.c_contiguous else array.copy()


def _expected_tensors(config: EngineConfig) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Name to dtype and shape of every tensor of a packed file but the tokenizer."""
    uint8, int8, float32 = _DTYPES["U8"], _DTYPES["I8"], _DTYPES["F32"]
    expected: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    for name, linear in linear_layers(config).items():
        expected[f"{name}.w_packed"] = uint8, packed_shape(linear.n, linear.k)
        expected[f"{name}.weight_scale"] = float32, ()
        if linear.has_bias:
            expected[f"{name}.bias"] = float32, (linear.n,)
        if linear.has_input_norm:
            expected[f"{name}.input_norm.weight"] = float32, (linear.k,)
    for name, size in norm_layers(config).items():
        expected[f"{name}.weight"] = float32, (size,)
    for name in ("model.embed_tokens",) if config.tie_word_embeddings else ("model.embed_tokens", "lm_head"):
        expected[f"{name}.w_int8"] = int8, (config.vocab_size, config.hidden_size)
        expected[f"{name}.row_scale"] = float32, (config.vocab_size,)
    return expected


def _check_tensors(source: str, config: EngineConfig, tensors: Mapping[str, np.ndarray]) -> None:
    expected = _expected_tensors(config)
    missing = [name for name in (*expected, *BLOBS) if name not in tensors]
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} tensors that its config calls for; first missing tensor={missing[0]}"
        )
    unexpected = [name for name in tensors if name not in expected and name not in BLOBS]
    if unexpected:
        raise ValueError(
            f"{source} has {len(unexpected)} tensors unknown to its config; first unexpected tensor={unexpected[0]}"
        )
    for name, (dtype, shape) in expected.items():
        tensor = tensors[name]
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(
                f"{source} does not fit its config: tensor={name} needs dtype={dtype} shape={shape}; "
                f"got dtype={tensor.dtype} shape={tensor.shape}"
            )


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """Tensor entries, metadata, and the offset of the first tensor byte."""
    not_ours = f"path={path} is not a packed bitdistill model; make one with the pack stage"
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = file.read(1)
        if start != b"{" or length > MAX_HEADER_BYTES:
            raise ValueError(not_ours)
        header_json = start + file.read(length - 1)
    if len(header_json) < length:
        raise ValueError(f"path={path} is truncated inside its header; copy or pack it again")
    try:
        header = json.loads(header_json)
        metadata = header.pop("__metadata__", {})
    except (ValueError, AttributeError):
        raise ValueError(f"path={path} has an unreadable header; {not_ours}") from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT or "format_version" not in metadata:
        raise ValueError(not_ours)
    return header, metadata, 8 + length


def _check_header(path: Path, header: dict[str, Any], metadata: dict[str, str]) -> dict[str, str]:
    """The checksums by tensor name, once every entry is known to be well-formed."""
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            is_sound = begin >= 0 and min(shape, default=0) >= 0 and end - begin == dtype.itemsize * math.prod(shape)
        except (KeyError, TypeError, ValueError):
            is_sound = False
        if not is_sound:
            raise ValueError(f"path={path} is corrupted: the entry of tensor={name} is {entry}; copy or pack it again")
    try:
        config_sha256, checksums = metadata["config_sha256"], json.loads(metadata["checksums"])
        metadata["created_by"], checksums.items()
        config_is_sound = hashlib.sha256(metadata["config"].encode()).hexdigest() == config_sha256
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"path={path} is corrupted: its metadata cannot be read; copy or pack it again") from None
    if not config_is_sound:
        raise ValueError(f"path={path} is corrupted: the checksum of its config differs; copy or pack it again")
    return checksums


def _map_tensors(path: Path, header: dict[str, Any], data_begin: int) -> dict[str, np.ndarray]:
    data = np.memmap(path, np.uint8, mode="r")[data_begin:]
    return {
        name: np.ndarray(tuple(entry["shape"]), _DTYPES[entry["dtype"]], data[slice(*entry["data_offsets"])].data)
        for name, entry in header.items()
    }


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
