"""The scan in plain torch against the obvious loop, in values and in all gradients; what it refuses; its choice."""

import os
import signal
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from midimamba.cli import main
from midimamba.modeling import scan_backends
from midimamba.modeling import selective_scan as selective_scan_module
from midimamba.modeling.scan_backends import scan_mamba_ssm
from midimamba.modeling.scan_chunked import CHUNK
from midimamba.modeling.scan_numba import WIDTH
from midimamba.modeling.selective_scan import (
    available_backends,
    choose_backend,
    selective_scan,
    selective_scan_reference,
    selective_step_,
)
from scan_support import assert_equals_reference, make_inputs, run

# Rows with resets at the first step, in succession and on both sides of a chunk's border; elsewhere; and nowhere.
RESETS = ((0, 3, 4, 5, CHUNK - 1, CHUNK), (1, CHUNK + 1, 70), ())
plain_torch = pytest.mark.parametrize("backend", ["chunked", "reference"])
on_processor = pytest.mark.parametrize("backend", ["chunked", "numba"])
every_backend = pytest.mark.parametrize("backend", ["chunked", "numba", "reference"])


@pytest.fixture(autouse=True)
def no_choice_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIDIMAMBA_SCAN", raising=False)


def make_reset(batch: int, time: int) -> Tensor:
    return torch.tensor([[t in times for t in range(time)] for times in RESETS[:batch]])


@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("time", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 77])
@on_processor
def test_equals_the_reference_in_values_and_gradients(
    backend: str, time: int, batch: int, with_state: bool, with_reset: bool
) -> None:
    inputs = make_inputs(batch, time, 5, 3)
    reset = make_reset(batch, time) if with_reset else None
    assert_equals_reference(backend, inputs if with_state else inputs[:5], reset)


@pytest.mark.parametrize("channels", [WIDTH - 1, WIDTH, 2 * WIDTH + 3])
def test_blocks_of_channels_fit_together(channels: int) -> None:
    assert_equals_reference("numba", make_inputs(2, 9, channels, 2), make_reset(2, 9))


def test_threads_change_no_bit() -> None:
    inputs = make_inputs(3, 40, WIDTH + 5, 2)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            output, state, gradients = run("numba", inputs, make_reset(3, 40))
            results.append([output, state, *gradients])
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


@on_processor
def test_a_nan_stays_one(backend: str) -> None:
    """Or a guard against divergence would see nothing."""
    inputs = make_inputs(1, 9, 3, 2)
    with torch.no_grad():
        inputs[0][0, 4, 1] = torch.nan
    output, state, gradients = run(backend, inputs)
    assert output[0, 4:, 1].isnan().all()
    assert output[0, :, [0, 2]].isfinite().all()
    assert state[0, :, 1].isnan().all()
    assert all(gradient.isnan().any() for gradient in gradients)


@on_processor
def test_a_state_that_decays_to_nothing_or_not_at_all(backend: str) -> None:
    inputs = make_inputs(1, 5, 3, 2)
    with torch.no_grad():
        inputs[1][0, 1], inputs[1][0, 3] = 1e4, 0
    output, state, gradients = run(backend, inputs)
    expected_output, expected_state, _ = run("reference", inputs)
    torch.testing.assert_close(output, expected_output)
    torch.testing.assert_close(state, expected_state)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_forked_process_has_threads_of_its_own() -> None:
    inputs = make_inputs(2, 5, WIDTH + 1, 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        selective_scan(*inputs, backend="numba")
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # a pool without its threads would wait for ever
            selective_scan(*inputs, backend="numba")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(threads)


@plain_torch
def test_gradients_equal_finite_differences(backend: str) -> None:
    def scan(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(*inputs, backend=backend)

    inputs = make_inputs(2, CHUNK + 3, 2, 2, torch.float64)
    assert torch.autograd.gradcheck(scan, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(scan, (*inputs, make_reset(2, CHUNK + 3)), fast_mode=True)


@on_processor
def test_gradient_of_the_final_state_alone(backend: str) -> None:
    dtype = torch.float64 if backend == "chunked" else torch.float32
    assert_equals_reference(backend, make_inputs(2, 40, 3, 2, dtype), final_only=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_backend
def test_the_state_is_float32_when_the_inputs_are_not(backend: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(2, 60, 4, 3, dtype)
    output, state, gradients = run(backend, inputs)
    wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
    wide_output, wide_state, wide_gradients = run("reference", wide)
    assert (output.dtype, state.dtype) == (dtype, torch.float32)
    assert {gradient.dtype for gradient in gradients} == {dtype}
    # What is rounded is rounded once, at the end.
    torch.testing.assert_close(state, wide_state)
    for ours, theirs in zip((output, *gradients), (wide_output, *wide_gradients), strict=True):
        torch.testing.assert_close(ours.float(), theirs, atol=1e-4, rtol=torch.finfo(dtype).eps)


@plain_torch
def test_a_wider_input_widens_the_state(backend: str) -> None:
    x, *others = make_inputs(2, 9, 4, 3, torch.float64)
    output, state = selective_scan(x.float(), *others, backend=backend)
    assert (output.dtype, state.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(state, selective_scan_reference(x.float().double(), *others)[1])


@on_processor
def test_autocast_changes_nothing_neither_forward_nor_backward(backend: str) -> None:
    inputs = make_inputs(2, 40, 4, 3)
    output, state, gradients = run(backend, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast_output, cast_state, cast_gradients = run(backend, inputs)
    for ours, theirs in zip((cast_output, cast_state, *cast_gradients), (output, state, *gradients), strict=True):
        assert torch.equal(ours, theirs)


def test_a_split_sequence_equals_the_whole_when_the_state_is_handed_on() -> None:
    x, dt, A, B, C, state = make_inputs(2, 50, 4, 3, torch.float64)
    whole, final = selective_scan(x, dt, A, B, C, state)
    parts = []
    for part in (slice(0, 7), slice(7, 8), slice(8, 50)):
        output, state = selective_scan(x[:, part], dt[:, part], A, B[:, part], C[:, part], state)
        parts.append(output)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("begin", [1, CHUNK - 1, CHUNK, CHUNK + 1, 49])
@plain_torch
def test_a_reset_sequence_equals_two_sequences(backend: str, begin: int) -> None:
    x, dt, A, B, C, state = make_inputs(2, 50, 4, 3, torch.float64)
    reset = torch.zeros(2, 50, dtype=torch.bool)
    reset[:, begin] = True
    output, final = selective_scan(x, dt, A, B, C, state, reset, backend)
    head, _ = selective_scan(x[:, :begin], dt[:, :begin], A, B[:, :begin], C[:, :begin], state)
    tail, last = selective_scan(x[:, begin:], dt[:, begin:], A, B[:, begin:], C[:, begin:])
    torch.testing.assert_close(output, torch.cat([head, tail], 1))
    torch.testing.assert_close(final, last)


@every_backend
def test_a_reset_at_the_first_step_drops_the_initial_state(backend: str) -> None:
    *inputs, state = make_inputs(2, 5, 4, 3)
    reset = torch.tensor([[True] + 4 * [False], 5 * [False]])
    output, _ = selective_scan(*inputs, state, reset, backend)
    assert torch.equal(output[0], selective_scan(*inputs, backend=backend)[0][0])
    (gradient,) = torch.autograd.grad(output.sum(), state)
    assert (gradient[0] == 0).all()
    assert (gradient[1] != 0).all()


def test_a_step_equals_a_scan_of_one_and_updates_the_state_in_place() -> None:
    x, dt, A, B, C, state = (tensor.detach() for tensor in make_inputs(3, 1, 4, 3))
    output, final = selective_scan(x, dt, A, B, C, state)
    stepped = selective_step_(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0])
    torch.testing.assert_close(stepped, output[:, 0])
    torch.testing.assert_close(state, final)


@every_backend
def test_the_initial_state_is_left_as_it_is(backend: str) -> None:
    *inputs, state = make_inputs(2, 40, 4, 3)
    before = state.detach().clone()
    selective_scan(*inputs, state, backend=backend)
    assert torch.equal(state, before)


@pytest.mark.parametrize("loss", [lambda output: output.square().sum(), lambda output: output.sum()])
@on_processor
def test_a_second_derivative_is_refused_unless_by_the_reference(
    backend: str, loss: Callable[[Tensor], Tensor]
) -> None:
    inputs = make_inputs(1, 3, 2, 2)
    (gradient,) = torch.autograd.grad(loss(selective_scan(*inputs, backend=backend)[0]), inputs[1], create_graph=True)
    with pytest.raises(RuntimeError, match=r'no second derivative.*backend="reference"'):
        gradient.sum().backward()
    output, _ = selective_scan(*inputs, backend="reference")
    (expected,) = torch.autograd.grad(loss(output), inputs[1], create_graph=True)
    torch.testing.assert_close(gradient, expected)
    expected.sum().backward()
    assert inputs[1].grad is not None
    assert inputs[1].grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_kept_for_backward_is_inputs_plus_one_state_a_chunk(dtype: torch.dtype) -> None:
    batch, time, channels, state = 2, 8 * CHUNK, 16, 8
    inputs = make_inputs(batch, time, channels, state, dtype)
    inputs[5] = inputs[5].detach().float().requires_grad_()
    kept = []

    def count(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        selective_scan(*inputs, backend="chunked")
    inputs_without_state = sum(tensor.nbytes for tensor in inputs[:5])
    assert sum(kept) == inputs_without_state + (time // CHUNK) * batch * state * channels * 4


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (2, 5), r"x has shape \(2, 5\), expected \(batch, time, channels\)"),
        ("x", (2, 0, 4), r"x has shape \(2, 0, 4\)"),
        ("dt", (2, 5, 1), r"dt has shape \(2, 5, 1\), expected \(2, 5, 4\)"),
        ("A", (4,), r"A has shape \(4,\), expected \(4, state\)"),
        ("A", (3, 4), r"A has shape \(3, 4\), expected \(4, 4\)"),
        ("B", (1, 5, 3), r"B has shape \(1, 5, 3\), expected \(2, 5, 3\)"),
        ("C", (2, 5, 1), r"C has shape \(2, 5, 1\), expected \(2, 5, 3\)"),
        ("initial_state", (2, 4, 3), r"initial_state has shape \(2, 4, 3\), expected \(2, 3, 4\)"),
        ("reset", (2, 1), r"reset has shape \(2, 1\), expected \(2, 5\)"),
    ],
)
def test_a_wrong_shape_is_named(name: str, shape: tuple[int, ...], message: str) -> None:
    arguments = dict(zip(("x", "dt", "A", "B", "C", "initial_state"), make_inputs(2, 5, 4, 3), strict=True))
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**arguments, name: torch.zeros(shape)})


def test_a_reset_that_is_not_boolean_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reset has type torch\.int64"):
        selective_scan(*make_inputs(2, 5, 4, 3), torch.zeros(2, 5, dtype=torch.int64))


def test_a_state_on_another_device_is_refused() -> None:
    *inputs, state = make_inputs(2, 5, 4, 3)
    with pytest.raises(ValueError, match=r"initial_state is on meta and x on cpu: .*initial_state\.to\(x\.device\)"):
        selective_scan(*inputs, state.to("meta"))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages that can be imported, to be filled by the test."""
    names: set[str] = set()
    monkeypatch.setattr(scan_backends, "_importable", lambda module: module.partition(".")[0] in names)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return names


def test_the_fastest_backend_that_is_able_is_chosen(installed: set[str]) -> None:
    assert (choose_backend("cpu"), choose_backend("cuda")) == ("chunked", "chunked")
    assert available_backends("cuda") == ["chunked", "reference"]
    installed.add("triton")
    assert (choose_backend("cpu"), choose_backend("cuda")) == ("chunked", "triton")
    installed.add("numba")
    assert (choose_backend("cpu"), choose_backend("cuda"), choose_backend("mps")) == ("numba", "triton", "chunked")
    assert choose_backend("cpu", dtype=torch.float64) == "chunked"
    assert choose_backend("cuda", state_size=65) == "chunked"
    installed.add("mamba_ssm")
    assert (choose_backend("cpu"), choose_backend("cuda")) == ("numba", "mamba_ssm")
    assert available_backends("cuda") == ["mamba_ssm", "triton", "chunked", "reference"]
    assert available_backends("cpu") == ["numba", "chunked", "reference"]
    # What mamba_ssm cannot do goes elsewhere.
    assert choose_backend("cuda", has_initial_state=True) == "triton"
    assert choose_backend("cuda", has_reset=True) == "triton"
    assert choose_backend("cuda", dtype=torch.float64) == "triton"


def test_the_argument_goes_before_the_environment(installed: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIDIMAMBA_SCAN", "reference")
    assert (choose_backend("cpu"), choose_backend("cuda", "chunked")) == ("reference", "chunked")
    monkeypatch.setenv("MIDIMAMBA_SCAN", "")
    assert choose_backend("cpu") == "chunked"


def test_the_environment_chooses_what_the_scan_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(1, 3, 2, 2)
    for name, graph in (("reference", "Stack"), ("chunked", "_ChunkedScan"), ("numba", "_NumbaScan")):
        monkeypatch.setenv("MIDIMAMBA_SCAN", name)
        assert graph in selective_scan(*inputs)[0].grad_fn.name()


def test_the_choice_is_told_what_the_call_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def choose(*arguments: object, **options: object) -> str:
        asked.append((*arguments, options))
        return "reference"

    monkeypatch.setattr(selective_scan_module, "choose_backend", choose)
    inputs = make_inputs(2, 5, 4, 3)
    selective_scan(*inputs[:5])
    selective_scan(*inputs[:5], inputs[5].double(), torch.zeros(2, 5, dtype=torch.bool), "triton")
    selective_scan(*(tensor.double() for tensor in inputs[:5]))
    common = {"dtype": torch.float32, "state_size": 3, "has_initial_state": False, "has_reset": False}
    cpu = torch.device("cpu")
    assert asked[0] == (cpu, None, common)
    assert asked[1] == (cpu, "triton", {**common, "has_initial_state": True, "has_reset": True})
    assert asked[2] == (cpu, None, {**common, "dtype": torch.float64})


def test_an_unknown_backend_is_refused_with_the_names_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"backend='fast' .*chunked, mamba_ssm, numba, reference, triton"):
        choose_backend("cpu", "fast")
    with pytest.raises(ValueError, match="backend=''"):
        choose_backend("cpu", "")
    monkeypatch.setenv("MIDIMAMBA_SCAN", "fast")
    with pytest.raises(ValueError, match=r"MIDIMAMBA_SCAN='fast' .*chunked, mamba_ssm, numba, reference, triton"):
        selective_scan(*make_inputs(1, 3, 2, 2))


@pytest.mark.parametrize(
    ("device", "backend", "options", "message"),
    [
        ("cpu", "triton", {}, "tensors on CUDA and these are on cpu. Choose chunked or reference"),
        ("cpu", "mamba_ssm", {}, "tensors on CUDA and these are on cpu. Choose chunked or reference"),
        ("cuda", "triton", {"state_size": 65}, "at most 64 .* here there are 65. Choose mamba_ssm or chunked"),
        ("cuda", "mamba_ssm", {"has_initial_state": True}, "no initial state. Choose triton or chunked"),
        ("cuda", "mamba_ssm", {"has_reset": True}, "no reset. Choose triton or chunked"),
        ("cuda", "mamba_ssm", {"dtype": torch.float64}, "no float64. Choose triton or chunked"),
        ("cuda", "numba", {}, "tensors on the processor and these are on cuda. Choose mamba_ssm or triton or chunked"),
        ("cpu", "numba", {"dtype": torch.float64}, "its state is float32, and here it is float64. Choose chunked"),
        ("cuda", "mamba_ssm", {"state_size": 257}, "at most 256 .* here there are 257. Choose chunked or reference"),
    ],
)
def test_a_backend_asked_for_says_why_it_cannot(
    installed: set[str], device: str, backend: str, options: dict[str, Any], message: str
) -> None:
    installed.update({"triton", "mamba_ssm", "numba"} if backend == "numba" else {"triton", "mamba_ssm"})
    with pytest.raises(ValueError, match=message):
        choose_backend(device, backend, **options)


@pytest.mark.parametrize(
    ("backend", "install"), [("triton", "triton"), ("mamba_ssm", "mamba-ssm"), ("numba", "numba")]
)
def test_a_backend_that_is_not_installed_says_how_to_install_it(
    installed: set[str], backend: str, install: str
) -> None:
    with pytest.raises(ValueError, match=f"pip install {install}"):
        choose_backend("cpu" if backend == "numba" else "cuda", backend)


def test_a_package_that_is_there_but_does_not_load_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_backends, "_importable", scan_backends._importable.__wrapped__)
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it raises ImportError
    assert "triton" not in available_backends("cuda")
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace())
    assert "triton" in available_backends("cuda")


@pytest.fixture
def fake_mamba_ssm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public interface of `selective_scan_fn`: time last, one type, the state `(batch, channels, state)`."""

    def selective_scan_fn(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, return_last_state: bool = False
    ) -> tuple[Tensor, Tensor]:
        assert {tensor.dtype for tensor in (u, delta, A, B, C)} == {torch.float32}
        assert all(tensor.is_contiguous() for tensor in (u, delta, B, C))
        output, state = selective_scan_reference(u.mT, delta.mT, A, B.mT, C.mT)
        assert return_last_state
        return output.transpose(1, 2), state.transpose(1, 2)

    module = SimpleNamespace(selective_scan_fn=selective_scan_fn)
    monkeypatch.setitem(sys.modules, "mamba_ssm", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", module)


def test_mamba_ssm_is_called_in_its_own_layout(fake_mamba_ssm: None) -> None:
    x, *others, _ = make_inputs(2, 9, 4, 3)
    inputs = [x.detach().bfloat16().requires_grad_(), *others]
    output, state = scan_mamba_ssm(*inputs)
    expected, expected_state = selective_scan_reference(*inputs)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(state, expected_state)
    ours, theirs = (torch.autograd.grad(result.float().square().sum(), inputs) for result in (output, expected))
    for gradient, expected_gradient in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)
    # Its state has no gradient, and does not pretend to have one.
    with pytest.raises(RuntimeError, match="no gradient through the final state"):
        state.sum().backward()


def test_info_names_the_backend_and_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(sys, "argv", ["midimamba", "info"])
    monkeypatch.setenv("MIDIMAMBA_SCAN", "reference")
    main()
    assert f"scan: reference (of {', '.join(available_backends(kind))})" in capsys.readouterr().out
    monkeypatch.setenv("MIDIMAMBA_SCAN", "fast")
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "MIDIMAMBA_SCAN='fast'" in capsys.readouterr().err
