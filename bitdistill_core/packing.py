"""The packed model file `model.bitdistill`. NumPy only.

Not for quantising: codes and scales come in ready-made (bitdistill_core.quantize), and not for running them: engine/.

The file is a safetensors file: 8 bytes header length (little endian), the JSON header, then the tensors without
gaps. The header is padded with spaces and `w_packed`, `w_base3` and `scan` tensors come first, so every line starts on
a 64-byte address of a memory map; bitdistill_core.panels describes their bytes. Metadata: format, format_version,
config (JSON of engine.config.EngineConfig), config_xxh3 (its checksum), checksums (JSON, tensor name to the checksum of
its bytes), created_by. A checksum is XXH3 of 128 bits, in hexadecimal: against damage, not against forgery.
Tensors, by Hugging Face's module names:

    <linear>.w_packed uint8, or <linear>.w_base3 uint8 in a file of encoding base3
    [<linear>.bias fp32 (N,)], [<linear>.input_norm.weight fp32 (K,)]
    <linear>.weight_scale fp32: (), (N,) one a row, or (N, G) one for each G-th of a row, K / G a multiple of 16 and the
    same in every layer of the file
    <embedding>.scan, .next, .rest uint8, <embedding>.row_scale fp32 (V,), .column_scale and .mean fp32 (D,): row v is
    mean + column_scale * row_scale[v] * w_int8[v]. For the output head's bounds, fp32 (V,):
    <embedding>.row_norm >= |w_int8|, .scan_error >= |(u & 7) - 3.5|, .next_error >= |(u & 3) - 1.5|, u = w_int8 + 128;
    <embedding> is model.embed_tokens, and lm_head unless it is tied
    <norm>.weight fp32        tokenizer.json, task.json uint8: their bytes (task.json: null, or the prompt and labels)
"""

import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128, xxh3_128_hexdigest

from bitdistill_core.disk import sync
from bitdistill_core.engine.config import EngineConfig, linear_layers
from bitdistill_core.engine.tensors import (
    CODES,
    FLOAT32,
    SEARCHED,
    TASK,
    TOKENIZER,
    UINT8,
    Encoding,
    check_numbers,
    check_tensors,
    encoding_of,
)
from bitdistill_core.panels import LINE_BYTES, empty_lines, pack_base3, pack_int8_rows, pack_ternary

FORMAT = "bitdistill"
FORMAT_VERSION = "7"
PACKED_FILE = "model.bitdistill"  # its name in the directory of a stage
STREAMED = (".w_packed", ".w_base3", ".scan")  # names end so
HASH_BLOCK_BYTES, HASH_THREADS = 1 << 16, 2
MAX_HEADER_BYTES = 100 * 1024 * 1024  # the limit of the safetensors format

_DTYPES: dict[str, np.dtype[Any]] = {"U8": UINT8, "F32": FLOAT32}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TernaryLinear:
    """One linear layer to write: weight ~ weight_scale * w_ternary, N out by K in. A binary one has no zeros."""

    w_ternary: NDArray[np.int8]  # (N, K) in {-1, 0, 1}
    weight_scale: NDArray[np.float32]  # (), (N,) or (N, K / block_size)
    bias: NDArray[np.float32] | None = None  # (N,)
    input_norm: NDArray[np.float32] | None = None  # (K,), the SubLN gain


@dataclass(frozen=True)
class Int8Rows:
    """An embedding or output head to write: row v ~ mean + column_scale * row_scale[v] * w_int8[v]."""

    w_int8: NDArray[np.int8]  # (V, D)
    row_scale: NDArray[np.float32]  # (V,)
    column_scale: NDArray[np.float32] | None = None  # (D,); None: ones
    mean: NDArray[np.float32] | None = None  # (D,); None: zeros


@dataclass(frozen=True)
class PackedModel:
    """A packed file, memory-mapped: the tensors are read-only views of the map, but for those that were read."""

    path: Path
    config: EngineConfig
    tensors: dict[str, np.ndarray]
    offsets: dict[str, int]  # of each tensor's first byte in the file
    file: BinaryIO  # open as long as the model is
    created_by: str
    stamp: tuple[int, int]  # the file's size and time of change before it was read

    def require_unchanged(self) -> None:
        """Raises ValueError where the file was written to since: rows of a vocabulary are read from it in use."""
        if _stamp(self.file) != self.stamp:
            raise ValueError(
                f"path={self.path} was overwritten while it was in use; load it again, and replace such a file by "
                "renaming another to its name"
            )

    @property
    def encoding(self) -> Encoding:
        """How the file holds ternary codes."""
        return encoding_of(self.tensors)

    def read(self, name: str, buffer: bytearray | None = None) -> np.ndarray:
        """A tensor's values, read and not mapped: what is used once does not stay in memory.

        They lie in `buffer`, of at least their size, where one is given, until it is used again.
        """
        tensor = self.tensors[name]
        content = memoryview(bytearray(tensor.nbytes) if buffer is None else buffer)[: tensor.nbytes]
        if os.preadv(self.file.fileno(), [content], self.offsets[name]) < tensor.nbytes:
            raise ValueError(f"path={self.path} was truncated while it was read; copy or pack it again")
        return np.frombuffer(content, tensor.dtype).reshape(tensor.shape)

    @property
    def task(self) -> dict[str, Any] | None:
        """What the model was trained for: name, kind, prompt, label_words."""
        task: dict[str, Any] | None = json.loads(self.tensors[TASK].tobytes())
        return task


def write_student(
    path: Path,
    *,
    config: dict[str, Any],
    linears: Mapping[str, TernaryLinear],
    embeddings: Mapping[str, Int8Rows],
    norms: Mapping[str, NDArray[np.float32]],
    tokenizer_json: bytes,
    task: Mapping[str, Any] | None = None,
    encoding: Encoding,
    created_by: str,
) -> None:
    """Writes the packed file at `path`, or leaves what was there: a crash never shows half a file.

    Args:
        config: what `engine_config` returned.
        linears: by module name, `model.layers.0.self_attn.q_proj`.
        embeddings: `model.embed_tokens`, and `lm_head` unless it is tied.
        norms: weights by module name, `model.norm`, without SubLN (that is `TernaryLinear.input_norm`).
        task: what the model was trained for: name, kind, prompt, label_words.
        encoding: of the ternary codes. Both run to the same logits; base3 takes a sixth fewer bytes, and is expanded
            when it is loaded by a kernel that does not stream it.
        created_by: who wrote it, with version: `bitdistill 0.1.0`.
    Raises:
        ValueError: a tensor missing, unexpected, of another shape than `config` says, or with NaN or infinity; blocks
            that are not a multiple of 16 weights.
    """
    engine = EngineConfig.from_dict(config)
    shapes = {name: (layer.n, layer.k) for name, layer in linear_layers(engine).items()}
    tensors: dict[str, np.ndarray] = {}
    for name, linear in linears.items():
        tensors[f"{name}.{CODES[encoding]}"] = _packed(name, linear, shapes.get(name), encoding)
        tensors[f"{name}.weight_scale"] = _float32(linear.weight_scale)
        if linear.bias is not None:
            tensors[f"{name}.bias"] = _float32(linear.bias)
        if linear.input_norm is not None:
            tensors[f"{name}.input_norm.weight"] = _float32(linear.input_norm)
    for name, weight in norms.items():
        tensors[f"{name}.weight"] = _float32(weight)
    for name, rows in embeddings.items():
        for part, codes in zip(("scan", "next", "rest"), pack_int8_rows(rows.w_int8), strict=True):
            tensors[f"{name}.{part}"] = codes
        tensors[f"{name}.row_scale"] = _float32(rows.row_scale)
        size = rows.w_int8.shape[1]
        tensors[f"{name}.column_scale"] = _float32(np.ones(size) if rows.column_scale is None else rows.column_scale)
        tensors[f"{name}.mean"] = _float32(np.zeros(size) if rows.mean is None else rows.mean)
        tensors[f"{name}.row_norm"] = _norms(rows.w_int8, 0xFF, -128.0)
        tensors[f"{name}.scan_error"] = _norms(rows.w_int8, 0x07, -3.5)
        tensors[f"{name}.next_error"] = _norms(rows.w_int8, 0x03, -1.5)
    tensors[TOKENIZER] = np.frombuffer(tokenizer_json, np.uint8)
    tensors[TASK] = np.frombuffer(json.dumps(task).encode(), np.uint8)
    check_tensors("the model", engine, tensors)
    check_numbers("the model", tensors)
    write_packed(path, config=config, tensors=tensors, created_by=created_by)


def write_packed(path: Path, *, config: dict[str, Any], tensors: Mapping[str, np.ndarray], created_by: str) -> None:
    """Writes checked `tensors` with checksums, atomically: a temporary file beside `path`, fsync, then a rename."""
    order = sorted(tensors, key=lambda name: (not name.endswith(STREAMED), tensors[name].dtype != np.float32))
    config_json = json.dumps(config, sort_keys=True)
    checksums = {name: xxh3_128_hexdigest(tensors[name].data) for name in order}
    header: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "config": config_json,
            "config_xxh3": xxh3_128_hexdigest(config_json.encode()),
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
    sync(path.parent)


def read_packed(path: Path, *, read_codes: bool = False, read_head: bool = False) -> PackedModel:
    """The packed model at `path`, memory-mapped, after every check: version, size, config, shapes, checksums.

    Args:
        read_codes: ternary codes are read into memory of their own, in large pages, which are faster than a map's.
        read_head: so is what an output head scans.
    Raises:
        ValueError: not a packed model, another format version, truncated, corrupted, or not what its config says.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"a packed model is a file written by the pack stage; none found at path={path}")
    file = open(path, "rb")  # noqa: SIM115  (the model keeps it)
    try:
        return _read(path, file, read_codes, read_head)
    except BaseException:
        file.close()
        raise


def _read(path: Path, file: BinaryIO, read_codes: bool, read_head: bool) -> PackedModel:
    header, metadata, data_begin = _read_header(path, file)
    if metadata["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"this engine reads format_version={FORMAT_VERSION}; got format_version={metadata['format_version']} in "
            f"path={path}; pack the model again with this version"
        )
    checksums = _check_header(path, header, metadata)
    size, _ = stamp = _stamp(file)
    expected_size = data_begin + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != expected_size:
        fault = "is truncated" if size < expected_size else "has bytes after its end"
        raise ValueError(f"path={path} {fault}: expected_bytes={expected_size} got bytes={size}; copy or pack it again")
    for name, entry in header.items():
        alignment = LINE_BYTES if name.endswith(STREAMED) else _DTYPES[entry["dtype"]].itemsize
        if (data_begin + entry["data_offsets"][0]) % alignment:
            raise ValueError(
                f"path={path} is corrupted: tensor={name} begins at byte={data_begin + entry['data_offsets'][0]}, "
                f"which is no multiple of {alignment}; copy or pack it again"
            )
    config = EngineConfig.from_dict(json.loads(metadata["config"]))
    tensors = _map_tensors(file, header, data_begin)
    check_tensors(f"path={path}", config, tensors)
    offsets = {name: data_begin + entry["data_offsets"][0] for name, entry in header.items()}
    suffixes = tuple(CODES.values()) * read_codes + tuple(f"{config.head}.{part}" for part in SEARCHED) * read_head
    kept = [name for name in tensors if name.endswith(suffixes)]
    tensors |= dict(zip(kept, empty_lines([tensors[name].shape for name in kept]), strict=True))

    def digest_of(name: str) -> str:
        into = tensors[name].data.cast("B") if name in kept else None
        return _digest(file.fileno(), offsets[name], tensors[name].nbytes, into)

    # The bytes are read, not mapped, so that what is never used afterwards does not stay in memory.
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        largest_first = sorted(tensors, key=lambda name: -tensors[name].nbytes)
        digests = pool.map(digest_of, largest_first)
        for name, digest in zip(largest_first, digests, strict=True):
            if digest != checksums.get(name):
                raise ValueError(
                    f"path={path} is corrupted: the checksum of tensor={name} differs; copy or pack it again"
                )
    model = PackedModel(path, config, tensors, offsets, file, metadata["created_by"], stamp)
    # Likewise, one at a time: the norms of a whole vocabulary are not needed to classify.
    for name, tensor in tensors.items():
        if tensor.dtype == np.float32:
            check_numbers(f"path={path}", {name: model.read(name)})
    return model


def _stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _digest(descriptor: int, offset: int, size: int, into: memoryview | None) -> str:
    """The checksum of `size` bytes of a file, which are read into `into`, or into memory that is given back."""
    digest, begin, end = xxh3_128(), offset, offset + size
    block = memoryview(bytearray(0 if into is not None else min(HASH_BLOCK_BYTES, size)))
    while offset < end:
        buffer = block if into is None else into[offset - begin :][:HASH_BLOCK_BYTES]
        length = os.preadv(descriptor, [buffer[: end - offset]], offset)
        if not length:
            break  # truncated meanwhile: the checksum will differ
        digest.update(buffer[:length])
        offset += length
    return digest.hexdigest()


def _norms(w_int8: NDArray[np.int8], mask: int, shift: float) -> NDArray[np.float32]:
    """(V,) |(u & mask) + shift| of each row, u = w_int8 + 128, rounded up: they bound what a row can contribute."""
    norms = np.empty(len(w_int8), np.float32)
    for begin in range(0, len(w_int8), 8192):
        block = ((w_int8[begin : begin + 8192].view(np.uint8) ^ 0x80) & mask).astype(np.float32) + np.float32(shift)
        exact = np.sqrt(np.einsum("vd,vd->v", block, block, dtype=np.float64))
        norms[begin : begin + 8192] = np.nextafter(exact.astype(np.float32), np.float32(np.inf))
    return norms


def _packed(name: str, linear: TernaryLinear, shape: tuple[int, int] | None, encoding: Encoding) -> NDArray[np.uint8]:
    got, scale_shape = linear.w_ternary.shape, np.shape(linear.weight_scale)
    if shape is not None and got != shape:  # padding would hide it
        raise ValueError(f"linear={name} does not fit its config: needs shape={shape}; got shape={got}")
    try:
        w_packed = pack_ternary(linear.w_ternary)
        if encoding == "2bit":
            return w_packed
        return pack_base3(w_packed, scale_shape[1] if len(scale_shape) == 2 else 1)
    except ValueError as error:
        raise ValueError(f"{error} (in linear={name})") from None


def _float32(values: Any) -> NDArray[np.float32]:
    array = np.asarray(values, np.float32)
    return array if array.flags.c_contiguous else array.copy()


def _read_header(path: Path, file: BinaryIO) -> tuple[dict[str, Any], dict[str, str], int]:
    """Tensor entries, metadata, and the offset of the first tensor byte."""
    not_ours = f"path={path} is not a packed bitdistill model; make one with the pack stage"
    length = int.from_bytes(file.read(8), "little")
    start = file.read(1)
    if start != b"{" or not 2 <= length <= MAX_HEADER_BYTES:
        raise ValueError(not_ours)
    header_json = start + file.read(length - 1)
    if len(header_json) < length:
        raise ValueError(f"path={path} is truncated inside its header; copy or pack it again")
    try:
        header = json.loads(header_json)
        metadata = header.pop("__metadata__", {})
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f"path={path} has an unreadable header; {not_ours}") from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT or "format_version" not in metadata:
        raise ValueError(not_ours)
    return header, metadata, 8 + length


def _check_header(path: Path, header: dict[str, Any], metadata: dict[str, str]) -> dict[str, str]:
    """The checksums by tensor name, once every entry is known to be well-formed."""
    for name, entry in header.items():
        if not _is_sound(entry):
            raise ValueError(f"path={path} is corrupted: the entry of tensor={name} is {entry}; copy or pack it again")
    try:
        config_xxh3, checksums = metadata["config_xxh3"], json.loads(metadata["checksums"])
        metadata["created_by"].encode(), checksums.items()
        config_is_sound = xxh3_128_hexdigest(metadata["config"].encode()) == config_xxh3
        json.loads(metadata["config"]).items()
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise ValueError(f"path={path} is corrupted: its metadata cannot be read; copy or pack it again") from None
    if not config_is_sound:
        raise ValueError(f"path={path} is corrupted: the checksum of its config differs; copy or pack it again")
    return checksums


def _is_sound(entry: Any) -> bool:
    """Whether a header's entry names a dtype, a shape and as many bytes as they need."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or entry["dtype"] not in _DTYPES:
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2 or len(shape) > 8:
        return False
    if not all(type(value) is int and 0 <= value < 2**62 for value in (*shape, *offsets)):
        return False
    return offsets[1] - offsets[0] == _DTYPES[entry["dtype"]].itemsize * math.prod(shape)


def _map_tensors(file: BinaryIO, header: dict[str, Any], data_begin: int) -> dict[str, np.ndarray]:
    data = np.memmap(file, np.uint8, mode="r")[data_begin:]
    return {
        name: np.ndarray(tuple(entry["shape"]), _DTYPES[entry["dtype"]], data[slice(*entry["data_offsets"])].data)
        for name, entry in header.items()
    }
