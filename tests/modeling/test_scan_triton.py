"""The Triton kernels against the reference: compiled where there is a GPU, else in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install triton, and its kernels are tested")

from midimamba.modeling.scan_triton import BLOCK_C, CHUNK, scan_triton
from midimamba.modeling.selective_scan import available_backends, selective_scan
from scan_support import assert_equals_reference, make_inputs, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# In both sequences, all of: the first step, the last of a chunk, the first of the next, the last of all, none.
POSITIONS = [(0,), (CHUNK - 1,), (CHUNK,), (CHUNK + 2,), (0, 1, CHUNK - 1, CHUNK), ()]


def inputs_on_device(
    batch: int, time: int, channels: int, state: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    return [tensor.detach().to(DEVICE).requires_grad_() for tensor in make_inputs(batch, time, channels, state, dtype)]


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("time", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_equals_the_reference_at_every_length(time: int, with_state: bool) -> None:
    inputs = inputs_on_device(2, time, 5, 3)
    assert_equals_reference("triton", inputs if with_state else inputs[:5])


@pytest.mark.parametrize(
    ("channels", "state"), [(1, 1), (3, 2), (BLOCK_C - 1, 5), (BLOCK_C, 16), (2 * BLOCK_C + 1, 7), (4, 64)]
)
def test_equals_the_reference_at_every_width(channels: int, state: int) -> None:
    assert_equals_reference("triton", inputs_on_device(3, 5, channels, state))


@pytest.mark.parametrize("positions", POSITIONS)
def test_equals_the_reference_with_resets(positions: tuple[int, ...]) -> None:
    reset = torch.zeros(2, CHUNK + 3, dtype=torch.bool, device=DEVICE)
    reset[0, list(positions)] = True  # the second sequence goes on
    assert_equals_reference("triton", inputs_on_device(2, CHUNK + 3, 5, 3), reset)


def test_gradient_of_the_final_state_alone() -> None:
    assert_equals_reference("triton", inputs_on_device(2, CHUNK + 3, 5, 3), final_only=True)


def test_gradients_equal_finite_differences() -> None:
    def scan(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(*inputs, backend="triton")

    inputs = inputs_on_device(1, 3, 2, 2, torch.float64)
    reset = torch.tensor([[False, False, True]], device=DEVICE)
    assert torch.autograd.gradcheck(scan, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(scan, (*inputs, reset), fast_mode=True)


def test_float64_is_computed_in_float64() -> None:
    inputs = inputs_on_device(2, CHUNK + 3, 5, 3, torch.float64)
    for ours, theirs in zip(run("triton", inputs)[:2], run("reference", inputs)[:2], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_state_is_float32_when_the_inputs_are_not(dtype: torch.dtype) -> None:
    inputs = inputs_on_device(2, CHUNK + 1, 5, 3, dtype)
    output, state, gradients = run("triton", inputs)
    assert (output.dtype, state.dtype) == (dtype, torch.float32)
    assert {gradient.dtype for gradient in gradients} == {dtype}
    # The state is exact; twice the rounding of a type, because the interpreter rounds towards zero.
    assert_equals_reference("triton", inputs, rounding=2 * torch.finfo(dtype).eps)


def test_inputs_need_not_be_contiguous() -> None:
    inputs = [tensor.detach() for tensor in inputs_on_device(2, 5, 4, 3)]
    strided = [tensor.mT.contiguous().mT for tensor in inputs]
    assert not any(tensor.is_contiguous() for tensor in strided)
    for ours, theirs in zip(
        selective_scan(*strided, backend="triton"), selective_scan(*inputs, backend="triton"), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_gradients_are_the_same_every_time() -> None:
    # Programs share out sequences and channels, so only those must be several.
    inputs = inputs_on_device(2, 3, 2 * BLOCK_C + 1, 3)
    for first, second in zip(run("triton", inputs)[2], run("triton", inputs)[2], strict=True):
        assert torch.equal(first, second)


def test_a_second_derivative_is_refused() -> None:
    inputs = inputs_on_device(1, 3, 2, 2)
    (gradient,) = torch.autograd.grad(selective_scan(*inputs, backend="triton")[0].sum(), inputs[1], create_graph=True)
    with pytest.raises(RuntimeError, match=r'no second derivative.*backend="reference"'):
        gradient.sum().backward()


def test_is_available_here() -> None:
    assert "triton" in available_backends(DEVICE)
    assert scan_triton.__module__ in sys.modules


@pytest.mark.slow
def test_both_kernels_compile_for_a_gpu() -> None:
    """The interpreter knows neither types nor layouts: compile to PTX, which takes no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == 8 * ["compiled"]


COMPILE = """
import itertools
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from midimamba.modeling.scan_triton import BLOCK_C, CHUNK, _backward_kernel, _forward_kernel

STATES = ("initial", "starts", "final", "scratch", "grad_final", "grad_A", "grad_B", "grad_C", "grad_initial")

for kernel, inputs, reset in itertools.product((_forward_kernel, _backward_kernel), ("fp32", "bf16"), (False, True)):
    constants = {"CHUNK": CHUNK, "BLOCK_N": 16, "BLOCK_C": BLOCK_C}
    signature = {name: "*fp32" if name in STATES else f"*{inputs}" for name in kernel.arg_names}
    signature |= {name: "i32" for name in ("time", "channels", "states")}
    if reset:
        signature["reset"] = "*u8"
    else:
        constants["reset"] = None
    signature |= {name: "constexpr" for name in constants}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    binary = compile(ASTSource(fn=kernel, signature=signature, constexprs=places), target=GPUTarget("cuda", 80, 32))
    if ".visible .entry" in binary.asm["ptx"]:
        print("compiled")
"""
