"""Forward and backward pass of the selective scan on CUDA: every backend against the memory roofline.

On one NVIDIA H100, the Triton kernels are exact (their relative difference from `chunked` is 5e-7 at 512 steps) and 20
times faster than `chunked`. But they are 10 to 245 times slower than the memory roofline, because they are sequential
in time: with 64, 16 and 1 sequences of 512, 2,048 and 32,768 steps, a pass takes 3.7, 6.6 and 94 ms. Their block sizes
are not tuned.

The last line is JSON. `seconds` is the time of one forward and backward pass. `roofline_seconds` is the time that it
takes to move the bytes that any backend has to move, at the bandwidth that a copy reaches on the same GPU: both passes
read the five inputs, the output is written, its gradient is read, and the five gradients are written. `of_roofline` is
`seconds` over `roofline_seconds`, of which 1 is the best possible value. `ratio` is the roofline over the fastest
backend. The output and the gradients of every backend are compared with those of `chunked` before anything is timed.
"""

import functools
import sys

import torch
from torch import Tensor

from measure import finish, make_parser, median_seconds
from midimamba.modeling.selective_scan import available_backends, selective_scan


def make_inputs(batch: int, time: int, channels: int, state: int, dtype: torch.dtype) -> list[Tensor]:
    """`x`, `dt`, `A`, `B` and `C`; `A` stays in float32, as it does in a model."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda")

    inputs = [
        normal(batch, time, channels),
        torch.rand(batch, time, channels, device="cuda") * 0.1 + 0.001,
        normal(batch, time, state),
        normal(batch, time, state),
    ]
    x, dt, B, C = (tensor.to(dtype).requires_grad_() for tensor in inputs)
    A = -torch.arange(1, state + 1, device="cuda").float().repeat(channels, 1)
    return [x, dt, A.requires_grad_(), B, C]


def forward_backward(backend: str, inputs: list[Tensor], grad_output: Tensor) -> list[Tensor]:
    """Run one pass and return the output and the gradients."""
    output, _ = selective_scan(*inputs, backend=backend)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad_output)]


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, relative to the largest element of each tensor."""
    return max(
        float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in zip(ours, theirs, strict=True)
    )


def copy_bandwidth(repeats: int) -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize()
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), repeats)


def main() -> None:
    parser = make_parser(__doc__, "scan_gpu.py --seq-len 2048")
    parser.add_argument("--seq-len", type=int, default=2048, help="steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="sequences (default: %(default)s)")
    parser.add_argument("--channels", type=int, default=1024, help="channels (default: %(default)s)")
    parser.add_argument("--state", type=int, default=16, help="state size per channel (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of the inputs (default: %(default)s)",
    )
    parser.add_argument("--repeats", type=int, default=20, help="timed passes (default: %(default)s)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this benchmark needs a CUDA GPU; run benchmarks/scan.py, which does not")

    torch.manual_seed(0)
    inputs = make_inputs(args.batch, args.seq_len, args.channels, args.state, getattr(torch, args.dtype))
    x = inputs[0]
    grad_output = torch.randn_like(x)
    moved = 3 * sum(tensor.nbytes for tensor in inputs) + 2 * x.nbytes
    bandwidth = copy_bandwidth(args.repeats)
    roofline = moved / bandwidth
    print(f"copy: {bandwidth / 1e9:.0f} GB/s; roofline of the scan: {roofline * 1e3:.3f} ms", flush=True)

    expected = forward_backward("chunked", inputs, grad_output)
    results = {}
    for backend in available_backends("cuda"):
        if backend == "reference":
            continue
        difference = largest_difference(forward_backward(backend, inputs, grad_output), expected)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run = functools.partial(forward_backward, backend, inputs, grad_output)
        seconds = median_seconds(run, args.repeats)
        results[backend] = {
            "seconds": round(seconds, 6),
            "of_roofline": round(seconds / roofline, 1),
            "extra_memory_mb": round((torch.cuda.max_memory_allocated() - before) / 1e6),
            "relative_difference": difference,
        }
        print(f"{backend}: {seconds * 1e3:.3f} ms, {seconds / roofline:.1f} times the roofline", flush=True)
    finish(
        {
            "benchmark": "scan_gpu",
            "compared": "the memory roofline and the fastest backend",
            "ratio": round(roofline / min(result["seconds"] for result in results.values()), 3),
            "backends": results,
            "roofline_seconds": round(roofline, 6),
            "copy_gb_per_second": round(bandwidth / 1e9),
            "sizes": {name: getattr(args, name) for name in ("batch", "seq_len", "channels", "state", "dtype")},
        },
        args.out,
    )


if __name__ == "__main__":
    main()
