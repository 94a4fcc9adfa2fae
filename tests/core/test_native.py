"""The native kernels against an integer matmul in NumPy: exactly equal, never close."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from bitdistill_core.engine import kernels
from bitdistill_core.panels import pack_base3, pack_ternary

ROWS = (1, 15, 16, 17, 33)
COLUMNS = (1, 4, 15, 16, 17, 100, 4096)
TOKENS = (1, 2, 3, 4, 5, 9)
EVERY_KERNEL = kernels.available_kernels()


def exact_sums(x: np.ndarray, w_ternary: np.ndarray) -> np.ndarray:
    return x.astype(np.int64) @ w_ternary.astype(np.int64).T


def random_case(n: int, k: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng([n, k, tokens])
    x = generator.integers(-128, 128, (tokens, k)).astype(np.int8)
    return x, generator.integers(-1, 2, (n, k)).astype(np.int8)


@pytest.mark.parametrize("kernel", EVERY_KERNEL)
@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("k", COLUMNS)
def test_every_kernel_equals_an_integer_matmul(kernel: str, n: int, k: int) -> None:
    for tokens in TOKENS:
        x, w_ternary = random_case(n, k, tokens)
        sums = kernels.ternary_matmul(x, pack_ternary(w_ternary), n, kernel=kernel)
        assert sums.dtype == np.int32
        np.testing.assert_array_equal(sums, exact_sums(x, w_ternary))


@pytest.mark.parametrize("kernel", EVERY_KERNEL)
@pytest.mark.parametrize("k", [255, 256, 257, 272, 4096, 8192])
@pytest.mark.parametrize("activation", [-128, 127])
@pytest.mark.parametrize("weight", [-1, 0, 1])
@pytest.mark.parametrize("tokens", [5, 17])
def test_extreme_activations_and_weights_do_not_overflow(
    kernel: str, k: int, activation: int, weight: int, tokens: int
) -> None:
    x = np.full((tokens, k), activation, np.int8)
    w_ternary = np.full((17, k), weight, np.int8)
    sums = kernels.ternary_matmul(x, pack_ternary(w_ternary), 17, kernel=kernel)
    np.testing.assert_array_equal(sums, np.full((tokens, 17), activation * weight * k))


@pytest.mark.parametrize("kernel", EVERY_KERNEL)
@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
def test_the_number_of_threads_does_not_change_the_sums(kernel: str, num_threads: int) -> None:
    x, w_ternary = random_case(83, 100, 9)
    for _ in range(20):
        sums = kernels.ternary_matmul(x, pack_ternary(w_ternary), 83, kernel=kernel, num_threads=num_threads)
        np.testing.assert_array_equal(sums, exact_sums(x, w_ternary))


@pytest.mark.parametrize("kernel", EVERY_KERNEL)
def test_more_tokens_than_one_block(kernel: str) -> None:
    x, w_ternary = random_case(33, 48, 131)
    sums = kernels.ternary_matmul(x, pack_ternary(w_ternary), 33, kernel=kernel, num_threads=2)
    np.testing.assert_array_equal(sums, exact_sums(x, w_ternary))


@pytest.mark.parametrize("kernel", EVERY_KERNEL)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_more_rows_than_are_named_at_once(kernel: str, num_threads: int) -> None:
    x, w_ternary = random_case(1100, 3072, 20)
    sums = kernels.ternary_matmul(x, pack_ternary(w_ternary), 1100, kernel=kernel, num_threads=num_threads)
    np.testing.assert_array_equal(sums, exact_sums(x, w_ternary))


def linear_case(n: int, k: int, tokens: int, scale_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, codes and scales whose products and sums are exact in float32: x_scale is 1, weight scales are powers of 2."""
    generator = np.random.default_rng([n, k, tokens, *scale_shape])
    x = generator.integers(-127, 128, (tokens, k)).astype(np.float32)
    x[:, 0] = 127
    w_ternary = generator.choice([-1, 0, 1], (n, k)).astype(np.int8)
    return x, w_ternary, 2.0 ** generator.integers(-3, 4, scale_shape).astype(np.float32)


def linear_output(x: np.ndarray, w_ternary: np.ndarray, weight_scale: np.ndarray) -> np.ndarray:
    n, k = w_ternary.shape
    scale = np.full((n, 1), weight_scale) if weight_scale.ndim == 0 else weight_scale.reshape(n, -1)
    return x.astype(np.float64) @ (w_ternary * np.repeat(scale, k // scale.shape[1], axis=1)).T.astype(np.float64)


@pytest.mark.parametrize("kernel", EVERY_KERNEL)
@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize(("k", "blocks"), [(100, 0), (100, 1), (32, 2), (48, 3), (4096, 8), (1040, 65)])
def test_a_linear_layer_equals_numpy_for_every_granularity(kernel: str, n: int, k: int, blocks: int) -> None:
    for tokens in (1, 2, 3, 4, 9, 13):
        for shape in ((n, blocks),) if blocks else ((), (n,)):
            x, w_ternary, weight_scale = linear_case(n, k, tokens, shape)
            packed, expected = pack_ternary(w_ternary), linear_output(x, w_ternary, weight_scale)
            for num_threads in (1, 3):
                out = kernels.ternary_linear(x, packed, weight_scale, n, kernel=kernel, num_threads=num_threads)
                np.testing.assert_array_equal(out, expected)


STREAMS_BASE3 = [kernel for kernel in EVERY_KERNEL if kernels.streams_base3(kernel)]


@pytest.mark.parametrize("kernel", STREAMS_BASE3)
@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("k", [80, 95, 96, 100, 191, 192, 1000, 4096])
def test_base_three_is_multiplied_as_its_twin(kernel: str, n: int, k: int) -> None:
    for tokens in TOKENS:
        x, w_ternary = random_case(n, k, tokens)
        w_base3 = pack_base3(pack_ternary(w_ternary))
        for num_threads in (1, 3):
            sums = kernels.ternary_matmul(x, w_base3, n, kernel=kernel, num_threads=num_threads)
            np.testing.assert_array_equal(sums, exact_sums(x, w_ternary))


@pytest.mark.parametrize("kernel", STREAMS_BASE3)
@pytest.mark.parametrize(("k", "blocks"), [(100, 0), (1000, 1), (192, 2), (336, 3), (4096, 8), (480, 30)])
def test_a_linear_layer_of_base_three_equals_numpy(kernel: str, k: int, blocks: int) -> None:
    for tokens in (1, 3, 4, 9):
        x, w_ternary, weight_scale = linear_case(33, k, tokens, (33, blocks) if blocks else ())
        w_base3 = pack_base3(pack_ternary(w_ternary), max(blocks, 1))
        out = kernels.ternary_linear(x, w_base3, weight_scale, 33, kernel=kernel, num_threads=2)
        np.testing.assert_array_equal(out, linear_output(x, w_ternary, weight_scale))


def test_a_kernel_that_does_not_stream_base_three_says_so() -> None:
    w_base3 = pack_base3(pack_ternary(np.ones((16, 96), np.int8)))
    for kernel in set(EVERY_KERNEL) - set(STREAMS_BASE3):
        with pytest.raises(ValueError, match=f"kernel={kernel} does not stream base 3; expand it"):
            kernels.ternary_matmul(np.ones((1, 96), np.int8), w_base3, 16, kernel=kernel)


@pytest.mark.parametrize("kernel", EVERY_KERNEL)
@pytest.mark.parametrize("blocks", [1, 3, 30])
def test_a_token_gets_the_same_bits_alone_and_beside_others(kernel: str, blocks: int) -> None:
    generator = np.random.default_rng(blocks)
    x = generator.standard_normal((40, 480)).astype(np.float32)
    packed = pack_ternary(generator.integers(-1, 2, (50, 480)).astype(np.int8))
    weight_scale = generator.random((50, blocks)).astype(np.float32)
    alone = [kernels.ternary_linear(x[t : t + 1], packed, weight_scale, 50, kernel=kernel) for t in range(40)]
    for tokens in (2, 3, 4, 7, 40):
        together = kernels.ternary_linear(x[:tokens], packed, weight_scale, 50, kernel=kernel, num_threads=2)
        np.testing.assert_array_equal(together, np.concatenate(alone[:tokens]))


def test_rejects_scales_that_are_not_a_tensor_rows_or_blocks_of_whole_lines() -> None:
    x, packed = np.ones((1, 48), np.float32), pack_ternary(np.ones((5, 48), np.int8))
    for shape in ((4,), (5, 2), (5, 0), (5, 6), (1, 5, 3)):
        with pytest.raises(ValueError, match=r"\(5, G\) with K / G a multiple of 16; got dtype=float32 shape="):
            kernels.ternary_linear(x, packed, np.ones(shape, np.float32), 5)
    with pytest.raises(ValueError, match="got dtype=float64"):
        kernels.ternary_linear(x, packed, np.ones(()), 5)


@pytest.mark.parametrize("kernel", EVERY_KERNEL)
def test_weights_need_no_alignment(kernel: str) -> None:
    x, w_ternary = random_case(17, 40, 3)
    packed = pack_ternary(w_ternary)
    odd_address = np.empty(packed.size + 1, np.uint8)[1:].reshape(packed.shape)
    odd_address[:] = packed
    np.testing.assert_array_equal(kernels.ternary_matmul(x, odd_address, 17, kernel=kernel), exact_sums(x, w_ternary))


def test_concurrent_calls_from_several_python_threads_are_exact() -> None:
    cases = [random_case(50 + i, 64, 3) for i in range(16)]

    def wrong(case: tuple[np.ndarray, np.ndarray]) -> int:
        x, w_ternary = case
        packed, expected = pack_ternary(w_ternary), exact_sums(x, w_ternary)
        n = len(w_ternary)
        return sum((kernels.ternary_matmul(x, packed, n, num_threads=2) != expected).any() for _ in range(20))

    with ThreadPoolExecutor(4) as executor:
        assert list(executor.map(wrong, cases)) == [0] * len(cases)


def test_a_team_ends_whatever_its_threads_are_at() -> None:
    # Of more threads than cores, some come to a step only when the team is about to be taken down.
    script = (
        "import numpy as np\n"
        "from bitdistill_core.engine import kernels\n"
        "from bitdistill_core.panels import pack_ternary\n"
        "x, packed = np.ones((1, 16), np.int8), pack_ternary(np.ones((64, 16), np.int8))\n"
        "for _ in range(10_000):\n"
        "    kernels.ternary_matmul(x, packed, 64, num_threads=8)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_forked_child_starts_threads_of_its_own() -> None:
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    x, w_ternary = random_case(64, 64, 2)
    packed, expected = pack_ternary(w_ternary), exact_sums(x, w_ternary)
    kernels.ternary_matmul(x, packed, 64, num_threads=2)
    child = os.fork()
    if child == 0:
        equal = np.array_equal(kernels.ternary_matmul(x, packed, 64, num_threads=2), expected)
        os._exit(0 if equal else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_no_tokens_give_no_rows() -> None:
    w_ternary = np.ones((3, 16), np.int8)
    assert kernels.ternary_matmul(np.empty((0, 16), np.int8), pack_ternary(w_ternary), 3).shape == (0, 3)


def test_scalar_is_always_available_and_the_active_kernel_is_the_first() -> None:
    assert "scalar" in kernels.available_kernels()
    assert kernels.active_kernel() == kernels.available_kernels()[0]


def test_zero_threads_means_every_core_and_negative_is_an_error() -> None:
    assert kernels.resolve_num_threads(0) >= 1
    assert kernels.resolve_num_threads(3) == 3
    with pytest.raises(ValueError, match=r"num_threads must be from 0 \(every core\) to 1024; got num_threads=-1"):
        kernels.resolve_num_threads(-1)


def test_rejects_arguments_the_kernel_would_misread() -> None:
    x, w_ternary = random_case(17, 32, 2)
    packed = pack_ternary(w_ternary)
    with pytest.raises(ValueError, match="x must be a NumPy array of dtype int8 with 2 dimensions; got dtype=float64"):
        kernels.ternary_matmul(x.astype(float), packed, 17)
    with pytest.raises(ValueError, match="w_packed must be a NumPy array of dtype uint8 with 3 dimensions"):
        kernels.ternary_matmul(x, packed.reshape(-1), 17)
    with pytest.raises(ValueError, match=r"n=17 k=32 in num_blocks=1 have shape=\(2, 128\); got shape=\(4, 64\)"):
        kernels.ternary_matmul(x, packed.reshape(-1, 64), 17)
    with pytest.raises(ValueError, match="x must be C-contiguous"):
        kernels.ternary_matmul(np.asfortranarray(x), packed, 17)
    with pytest.raises(ValueError, match=r"codes of n=17 k=16 .* have shape=\(2, 1, 64\); got shape=\(2, 2, 64\)"):
        kernels.ternary_matmul(np.ascontiguousarray(x[:, :16]), packed, 17)
    with pytest.raises(ValueError, match="codes of n=16 k=32"):
        kernels.ternary_matmul(x, packed, 16)
    with pytest.raises(ValueError, match=r"got shape=\(2, 2, 32\)"):
        kernels.ternary_matmul(x, np.zeros((2, 2, 32), np.uint8), 17)
    with pytest.raises(ValueError, match=r"kernel must be one of .*scalar.* on this processor; got kernel=neon9"):
        kernels.ternary_matmul(x, packed, 17, kernel="neon9")
    for num_blocks in (-1, 0, 3):
        with pytest.raises(ValueError, match=rf"a multiple of 16 weights; got k=32 num_blocks={num_blocks}"):
            kernels.is_sound(packed, 17, 32, num_blocks)
    with pytest.raises(ValueError, match="w_base3 must be a NumPy array of dtype uint8 with 2 dimensions"):
        kernels.expand_base3(packed, 17, 32)
    with pytest.raises(ValueError, match="exact for K from 1 to"):
        kernels.ternary_matmul(np.zeros((1, 2**22 + 16), np.int8), np.zeros((1, 2**18 + 1, 64), np.uint8), 1)
