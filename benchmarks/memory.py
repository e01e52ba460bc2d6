"""Peak memory of one full adversarial update against sequence length, roll-outs, positions and micro-batch.

An update is a step of the `AdversarialTrainer`: discriminator steps, sampling, roll-outs, and the generator's step.
`naive` keeps the graph through sampling: it reads the whole sequence again for every token, and does a REINFORCE step
on the reward of whole sequences. In its favour, it draws no roll-outs and trains no discriminator. It is tried at
growing lengths until it needs more than `--limit-gb`.

Every update runs in a separate process, after a tiny update that loads the libraries. The measure is how far memory
grows beyond the weights of the networks: gradients, both optimizers and everything else. It is resident memory on a
CPU, and allocated memory on a GPU. The first value of each list is the base, from which one size is changed at a time.
The last line is JSON: `ratio` is the memory of `naive` over ours at the longest sequence that both survive.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from torch import Tensor, nn

from measure import add_model_size, finish, make_parser
from midimamba import MidiDiscriminator, MidiDiscriminatorConfig, MidiMambaConfig, MidiMambaForCausalLM
from midimamba.modeling.sampling import draw
from midimamba.training.adversarial_config import AdversarialConfig
from midimamba.training.adversarial_trainer import AdversarialTrainer
from midimamba.training.credit import leave_one_out_advantages
from midimamba.training.generator_update import reinforce_loss

MB = 2**20
SIDES = ("ours", "naive")
FIXED = ("batch", "rollout_mb", "layers", "hidden", "vocab", "gradient_checkpointing")
# Algorithm 1 with a baseline and likelihood, since the other stabilisers have their own cost.
ALGORITHM_ALONE: dict[str, Any] = {
    **{"d_warmup_steps": 1, "d_steps": 1, "d_epochs": 1, "replay_fraction": 0.0, "r1_weight": 0.0, "ppo_epochs": 1},
    **{"ppo_clip": None, "kl_coef": 0.0, "entropy_coef": 0.0, "ema_decay": 0.0, "max_nll_drift": None},
    **{"max_self_bleu_increase": None, "eval_strategy": "no", "eval_on_start": False, "save_strategy": "no"},
}
TINY = {"length": 8, "rollouts": 1, "positions": 2, "micro_batch": 2, "batch": 2, "hidden": 32, "layers": 1}


def make_networks(sizes: dict[str, int]) -> tuple[MidiMambaForCausalLM, MidiDiscriminator]:
    config = MidiMambaConfig(vocab_size=sizes["vocab"], hidden_size=sizes["hidden"], num_hidden_layers=sizes["layers"])
    generator = MidiMambaForCausalLM(config)
    discriminator = MidiDiscriminator(MidiDiscriminatorConfig(vocab_size=sizes["vocab"]))
    for network in (generator, discriminator):
        # `PreTrainedModel.to` does the same, but its decorator loses its type.
        nn.Module.to(network, "cuda" if torch.cuda.is_available() else "cpu")
    return generator, discriminator


def make_trainer(sizes: dict[str, int], folder: str) -> AdversarialTrainer:
    args = AdversarialConfig(
        output_dir=folder,
        sequence_length=sizes["length"],
        per_device_train_batch_size=sizes["batch"],
        micro_batch_size=sizes["micro_batch"],
        num_rollouts=sizes["rollouts"],
        rollout_positions=sizes["positions"],
        rollout_memory_mb=sizes["rollout_mb"],
        gradient_checkpointing=bool(sizes["gradient_checkpointing"]),
        max_steps=1,
        **ALGORITHM_ALONE,
        disable_tqdm=True,
    )
    blocks = Dataset.from_dict({"input_ids": torch.randint(3, sizes["vocab"], (32, sizes["length"])).tolist()})
    return AdversarialTrainer(*make_networks(sizes), args, blocks, blocks)


class NaiveUpdate:
    """REINFORCE with the graph kept from the first sampled token to the last."""

    def __init__(self, sizes: dict[str, int]):
        self.length, self.batch = sizes["length"], sizes["batch"]
        self.generator, self.discriminator = make_networks(sizes)
        self.optimizer = torch.optim.AdamW(self.generator.parameters())

    def train(self) -> None:
        self.generator.train()
        sequences = torch.full((self.batch, 1), 3, device=self.generator.device)
        chosen: list[Tensor] = []
        while sequences.shape[1] < self.length:
            logits = self.generator(sequences, use_cache=False, logits_to_keep=1).logits[:, -1]
            tokens = draw(logits.detach())[:, None]
            chosen.append(logits.log_softmax(-1).gather(-1, tokens))
            sequences = torch.cat([sequences, tokens], dim=1)
        with torch.no_grad():
            rewards = self.discriminator(sequences).logits.sigmoid()
        advantages = leave_one_out_advantages(rewards).expand(-1, len(chosen))
        reinforce_loss(torch.cat(chosen, dim=1), advantages).backward()
        self.optimizer.step()


def resident(name: str) -> int:
    """A line of the kernel's account of this process, in bytes. Its peak is that of this process alone;
    that of getrusage starts at the peak of the parent."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


def measure_here(which: str, sizes: dict[str, int], limit_gb: float) -> int:
    """The number of bytes by which an update makes this process grow."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        updates = [
            make_trainer(each, folder) if which == "ours" else NaiveUpdate(each) for each in ({**sizes, **TINY}, sizes)
        ]
        updates.pop(0).train()
        if torch.cuda.is_available():
            share = limit_gb * 2**30 / torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, share))
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            updates[0].train()
            return torch.cuda.max_memory_allocated() - before
        before = resident("VmRSS")
        updates[0].train()
        return resident("VmHWM") - before


def measure(which: str, sizes: dict[str, int], limit_gb: float) -> float | None:
    """The same in a separate process, in MB; `None` if it needed more memory than the limit.

    Raises:
        RuntimeError: if the process failed for another reason.
    """
    command = [sys.executable, __file__, "--one", which, json.dumps(sizes), "--limit-gb", str(limit_gb)]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdout=output, stderr=errors)
        while child.poll() is None:
            if psutil.Process(child.pid).memory_info().rss > limit_gb * 2**30:
                child.kill()
                child.wait()
                return None
            time.sleep(0.02)
        output.seek(0)
        errors.seek(0)
        message = errors.read()
        if "torch.OutOfMemoryError" in message:
            return None
        if child.returncode != 0:
            raise RuntimeError(f"{which} with {sizes} failed:\n{message}")
        return int(output.read().split()[-1]) / MB


def plan(args: argparse.Namespace) -> list[dict[str, int]]:
    """The base, then one size changed at a time."""
    lists = {name: getattr(args, name) for name in ("length", "rollouts", "positions", "micro_batch")}
    base = {name: values[0] for name, values in lists.items()}
    base |= {name: getattr(args, name) for name in FIXED}
    return [base, *({**base, name: value} for name, values in lists.items() for value in values[1:])]


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "memory.py --length 64 128 --rollouts 4 16")
    lists = parser.add_argument_group("lists of sizes; the first of each is the base")
    lists.add_argument(
        "--length", type=int, nargs="+", default=[64, 32, 128], help="tokens per sequence, T (default: %(default)s)"
    )
    lists.add_argument(
        "--rollouts", type=int, nargs="+", default=[4, 16], help="roll-outs per position, N (default: %(default)s)"
    )
    lists.add_argument(
        "--positions", type=int, nargs="+", default=[4, 16], help="positions per sequence, K (default: %(default)s)"
    )
    lists.add_argument(
        "--micro-batch", type=int, nargs="+", default=[4, 16], help="sequences per pass (default: %(default)s)"
    )
    lists.add_argument(
        "--naive-length",
        type=int,
        nargs="*",
        default=[16, 32, 64, 128],
        help="lengths for `naive`, increasing (default: %(default)s)",
    )
    parser.add_argument("--batch", type=int, default=16, help="sequences per update (default: %(default)s)")
    parser.add_argument("--rollout-mb", type=int, default=128, help="MB for roll-outs (default: %(default)s)")
    add_model_size(parser)
    parser.set_defaults(layers=10, hidden=384)
    parser.add_argument(
        "--gradient-checkpointing", type=int, default=0, choices=[0, 1], help="1: our update uses it (default: 0)"
    )
    parser.add_argument(
        "--repeats", type=int, default=1, help="processes per size; their median counts (default: %(default)s)"
    )
    parser.add_argument(
        "--limit-gb", type=float, default=4.0, help="a process that needs more is ended (default: %(default)s)"
    )
    parser.add_argument("--one", nargs=2, metavar=("WHICH", "SIZES"), help="measure in this process (internal)")
    return parser.parse_args()


def main() -> None:
    args = read_arguments()
    if args.one:
        print(measure_here(args.one[0], json.loads(args.one[1]), args.limit_gb))
        return
    sizes = plan(args)
    rows: list[dict[str, Any]] = []
    print(f"{'':8}{'T':>7}{'N':>5}{'K':>6}{'micro':>7}{'MB':>9}{'s':>7}")
    for which, each in [("ours", each) for each in sizes] + [
        ("naive", {**sizes[0], "length": length}) for length in args.naive_length
    ]:
        start = time.perf_counter()
        # Resident memory differs by a few percent from one process to the next.
        peaks = [measure(which, each, args.limit_gb) for _ in range(args.repeats)]
        known = [value for value in peaks if value is not None]
        peak = statistics.median(known) if len(known) == len(peaks) else None
        row = {"which": which, **{name: each[name] for name in ("length", "rollouts", "positions", "micro_batch")}}
        rows.append({**row, "peak_mb": None if peak is None else round(peak)})
        shown = "died" if peak is None else f"{peak:.0f}"
        numbers = f"{each['length']:7}{each['rollouts']:5}{each['positions']:6}{each['micro_batch']:7}"
        print(f"{which:8}{numbers}{shown:>9}{time.perf_counter() - start:7.1f}", flush=True)
        if which == "naive" and peak is None:
            break
    ours, naive = (
        {row["length"]: row["peak_mb"] for row in reversed(rows) if row["which"] == which} for which in SIDES
    )
    shared = max((length for length, peak in naive.items() if peak and ours.get(length)), default=None)
    finish(
        {
            "benchmark": "memory",
            "compared": "an update that keeps the graph through sampling, without roll-outs",
            "ratio": None if shared is None else round(naive[shared] / ours[shared], 2),
            "ratio_at_length": shared,
            "naive_died_at": next((length for length, peak in naive.items() if peak is None), None),
            "limit_gb": args.limit_gb,
            "repeats": args.repeats,
            "rows": rows,
            "sizes": {name: sizes[0][name] for name in FIXED},
            "generator_parameters": make_networks(sizes[0])[0].num_parameters(),
        },
        args.out,
    )


if __name__ == "__main__":
    main()
