from numpy import int8, int32, uint8
from numpy.typing import NDArray

MAX_K: int

def available_kernels() -> list[str]: ...
def ternary_matmul(
    x: NDArray[int8], w_packed: NDArray[uint8], out: NDArray[int32], kernel: str, num_threads: int
) -> None: ...
