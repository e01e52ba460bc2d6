"""What only a GPU can show of a generator: decoding, a full adversarial update, and bfloat16 against float32.

- `decoding`: milliseconds per token for a batch of sequences, from [`sample`], from the same step recorded as a CUDA
  graph, from `generate` of transformers' Mamba, and, where `mamba_ssm` is installed, from its `generate(cg=True)`.
  All draw from their whole distribution. Recorded and plain step must give the same logits.
- `update`: seconds and peak memory of one step of the adversarial trainer, with roll-outs, for a generator of 10 and
  of 100 million parameters, by sequence length.
- `bfloat16`: loss and gradient of one pass under autocast, against float32.

The last line is JSON. `ratio` is the time of the stock `generate` over that of [`sample`] at the largest batch. With
`--device cpu`, what a GPU alone has is left out: that is to try the script, and says nothing about a GPU.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

from measure import finish, make_parser, median_seconds
from memory import TINY, make_trainer
from midimamba import MidiMambaConfig, MidiMambaForCausalLM
from midimamba.modeling.policy import inference
from midimamba.modeling.sampling import sample

VOCAB = 1000
# Parameters in millions: layers and width.
SHAPES = {"10": (10, 384), "100": (24, 864)}
PROMPT = 1


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of `run` after a first call, which compiles."""
    run()
    synchronize()
    return median_seconds(run, repeats)


class RecordedStep:
    """
    The step of a generator as a CUDA graph: one launch for all of its kernels.

    Args:
        model (`MidiMambaForCausalLM`): on a GPU, in evaluation mode, whose state has a constant size.
        batch (`int`): sequences.
    """

    def __init__(self, model: MidiMambaForCausalLM, batch: int):
        self.tokens = torch.full((batch, 1), 3, device="cuda")
        self.state = model.make_state(batch)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled and memory is reserved before anything is recorded
            for _ in range(3):
                model.next_logits(self.tokens, self.state)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = model.next_logits(self.tokens, self.state)

    def forget(self) -> None:
        """Go back to the state before the first token."""
        for layer in self.state.layers:
            for tensor in layer.tensors:
                tensor.zero_()

    def __call__(self, tokens: Tensor) -> Tensor:
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits

    def sample(self, length: int) -> None:
        """As many tokens as `length` for every sequence."""
        self.forget()
        tokens = self.tokens.clone()
        for _ in range(length):
            tokens = torch.multinomial(self(tokens).softmax(-1), 1)


def check_recorded(model: MidiMambaForCausalLM, step: RecordedStep) -> None:
    """Raise a RuntimeError if the recorded step differs from the plain one over 32 tokens."""
    batch = len(step.tokens)
    state = model.make_state(batch)
    step.forget()
    for tokens in torch.randint(3, VOCAB, (32, batch, 1), device="cuda"):
        torch.testing.assert_close(step(tokens), model.next_logits(tokens, state), atol=1e-4, rtol=1e-4)


def decoding(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds per token, by batch."""
    layers, hidden = args.shape
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": hidden, "num_hidden_layers": layers}
    stock = MambaForCausalLM(MambaConfig(**sizes, pad_token_id=0)).eval()
    ours = MidiMambaForCausalLM(MidiMambaConfig(**sizes)).eval()
    ours.load_state_dict(stock.state_dict())
    for model in (ours, stock):
        nn.Module.to(model, args.device)
    rival = _mamba_ssm(layers, hidden) if args.device == "cuda" else None
    rows = []
    for batch in args.batch:
        prompts = torch.full((batch, PROMPT), 3, device=args.device)
        runs: dict[str, Callable[[], object]] = {
            "ours": partial(sample, ours, prompts, PROMPT + args.tokens),
            "transformers": partial(_generate, stock, prompts, args.tokens),
        }
        with inference(ours):
            if args.device == "cuda":
                step = RecordedStep(ours, batch)
                check_recorded(ours, step)
                runs["ours, recorded"] = partial(step.sample, args.tokens)
            if rival is not None:
                options: dict[str, Any] = {
                    "max_length": PROMPT + args.tokens,
                    "cg": True,
                    "top_k": 0,
                    "temperature": 1.0,
                }
                runs["mamba_ssm"] = partial(rival.generate, prompts, **options)
            ms = {name: round(1e3 * seconds_of(run, args.repeats) / args.tokens, 4) for name, run in runs.items()}
        rows.append({"batch": batch, "ms_per_token": ms})
        print(rows[-1], flush=True)
    return rows


def _generate(model: MambaForCausalLM, prompts: Tensor, tokens: int) -> None:
    """Sample with transformers, with no end before the last token."""
    mask = torch.ones_like(prompts)
    options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "eos_token_id": None, "top_k": 0}
    model.generate(prompts, attention_mask=mask, do_sample=True, **options)


def _mamba_ssm(layers: int, hidden: int) -> Any:
    """A model of mamba_ssm, which brings CUDA kernels and a recorded step; `None` where it is not installed."""
    try:
        from mamba_ssm.models.config_mamba import MambaConfig as TheirConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    except ImportError:
        return None
    config = TheirConfig(d_model=hidden, n_layer=layers, vocab_size=VOCAB, ssm_cfg={"layer": "Mamba1"})
    return MambaLMHeadModel(config, device="cuda").eval()


def update(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds and peak memory of a full adversarial update."""
    rows = []
    for name in args.parameters:
        layers, hidden = SHAPES[name]
        for length in args.length:
            sizes = {"length": length, "batch": 4, "micro_batch": 1, "rollouts": 4, "positions": 8, "vocab": VOCAB}
            sizes |= {"rollout_mb": 4096, "layers": layers, "hidden": hidden, "gradient_checkpointing": 1}
            with tempfile.TemporaryDirectory() as folder:
                make_trainer({**sizes, **TINY}, folder).train()  # loads what the first update of a process loads
                trainer = make_trainer(sizes, folder)
                if args.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                synchronize()
                start = time.perf_counter()
                trainer.train()
                synchronize()
                seconds = time.perf_counter() - start
            peak = torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else None
            rows.append({"million_parameters": int(name), "length": length, "seconds": round(seconds, 3)})
            rows[-1]["peak_mb"] = None if peak is None else round(peak)
            print(rows[-1], flush=True)
            del trainer
    return rows


def bfloat16(args: argparse.Namespace) -> dict[str, float]:
    """How far loss and gradient of a pass under autocast are from those in float32."""
    torch.manual_seed(0)
    layers, hidden = args.shape
    model = MidiMambaForCausalLM(
        MidiMambaConfig(vocab_size=VOCAB, hidden_size=hidden, num_hidden_layers=layers)
    ).train()
    nn.Module.to(model, args.device)
    ids = torch.randint(3, VOCAB, (4, args.tokens), device=args.device)

    def learned(enabled: bool) -> tuple[float, Tensor]:
        model.zero_grad()
        with torch.autocast(args.device, torch.bfloat16, enabled=enabled):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return float(loss.detach()), torch.cat(gradients).double()

    (loss, gradient), (exact_loss, exact) = learned(True), learned(False)
    return {
        "loss_difference": abs(loss - exact_loss) / exact_loss,
        "gradient_cosine": float(torch.nn.functional.cosine_similarity(gradient, exact, dim=0)),
    }


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, "gpu.py")
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the script (default: %(default)s)")
    add("--shape", type=int, nargs=2, default=list(SHAPES["10"]), help="layers and width (default: %(default)s)")
    add("--batch", type=int, nargs="+", default=[1, 64, 512], help="sequences at once (default: %(default)s)")
    add("--tokens", type=int, default=256, help="that are sampled (default: %(default)s)")
    add("--parameters", nargs="+", choices=SHAPES, default=list(SHAPES), help="millions (default: %(default)s)")
    add("--length", type=int, nargs="+", default=[1024, 4096], help="tokens of an update (default: %(default)s)")
    add("--repeats", type=int, default=3, help="timed runs (default: %(default)s)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: this benchmark needs a CUDA GPU; try it with --device cpu")
    return args


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    rows = decoding(args)
    last = rows[-1]["ms_per_token"]
    finish(
        {
            "benchmark": "gpu",
            "compared": "generate of transformers' Mamba, at the largest batch",
            "ratio": round(last["transformers"] / last["ours"], 2),
            "decoding": rows,
            "update": update(args),
            "bfloat16": bfloat16(args),
            "sizes": {"layers": args.shape[0], "hidden": args.shape[1], "vocab": VOCAB, "tokens": args.tokens},
        },
        args.out,
    )


if __name__ == "__main__":
    main()
