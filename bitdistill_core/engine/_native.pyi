from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy import float32, int8, int32, uint8
from numpy.typing import NDArray

MAX_K: int

def available_kernels() -> list[str]: ...
def built_kernels() -> list[tuple[str, str]]: ...
def ternary_matmul(
    x: NDArray[int8], w_packed: NDArray[uint8], out: NDArray[int32], kernel: str, num_threads: int
) -> None: ...
def ternary_linear(
    x: NDArray[float32],
    w_packed: NDArray[uint8],
    weight_scale: NDArray[float32],
    out: NDArray[float32],
    kernel: str,
    num_threads: int,
) -> None: ...
def has_code_3(bytes: NDArray[uint8]) -> bool: ...

class KeyValueCache:
    length: int
    @property
    def capacity(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

class Model:
    def __init__(
        self,
        config: dict[str, Any],
        layers: list[dict[str, Any]],
        final_norm: np.ndarray,
        embedding: dict[str, Any],
        head: dict[str, Any],
        kernel: str,
        num_threads: int,
    ) -> None: ...
    def new_cache(self, capacity: int, half: bool) -> KeyValueCache: ...
    def forward(
        self,
        ids: Sequence[NDArray[int32]],
        parents: Sequence[int],
        outputs: Sequence[int],
        cache: KeyValueCache | None,
    ) -> NDArray[float32]: ...
    def row_logits(self, hidden: NDArray[float32], rows: Sequence[int]) -> NDArray[float32]: ...
    def logits(self, hidden: NDArray[float32]) -> NDArray[float32]: ...
    def top(self, hidden: NDArray[float32], count: int) -> tuple[list[tuple[int, float]], tuple[int, int]]: ...

def measure_multiply_add_ceiling(num_threads: int, seconds: float) -> float: ...
def measure_read_bandwidth(num_threads: int, megabytes: int) -> float: ...
def measure_gemm(kernel: str, n: int, k: int, tokens: int, num_threads: int, repeats: int) -> float: ...
def measure_gemv(kernel: str, n: int, k: int, num_threads: int, repeats: int) -> float: ...
