"""Sampling tokens: ours against `generate` of transformers' Mamba and of a Llama with as many parameters.

The last line is JSON; `ratio` is the time of the stock Mamba over ours at the largest batch. All three draw from their
whole distribution at temperature 1. Before anything is timed, our class must choose the same tokens as the stock class
with the same weights: greedily, and with `generate` at the same seed. `late_over_early` is our time per token around
position 8,000 over that around position 80.

Every measurement runs in a separate process, as it does for a user of `generate`. The stock Mamba allocates new states
at every token, and the cost depends on what the process allocated before: in a process that had run other models, it
ran at anything from half the speed to the full speed of a new process.
"""

import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from measure import add_model_size, finish, make_parser
from midimamba import MidiMambaConfig, MidiMambaForCausalLM, RecurrentCache
from midimamba.modeling.policy import inference
from midimamba.modeling.sampling import draw, sample

Model = MidiMambaForCausalLM | MambaForCausalLM | LlamaForCausalLM

EARLY, LATE, WINDOW = 80, 8_000, 64


def make_models(vocab: int, layers: int, hidden: int) -> dict[str, Model]:
    """Ours and the stock Mamba with the same weights, and a Llama with as many parameters."""
    sizes: dict[str, Any] = {"vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers}
    theirs = MambaForCausalLM(MambaConfig(**sizes, initializer_range=0.02, pad_token_id=0)).eval()
    ours = MidiMambaForCausalLM(MidiMambaConfig(**sizes)).eval()
    ours.load_state_dict(theirs.state_dict())
    count = sum(parameter.numel() for parameter in theirs.backbone.layers.parameters()) / layers
    mlp = round((count - 4 * hidden**2 - 2 * hidden) / (3 * hidden))
    llama = LlamaConfig(
        **sizes,
        intermediate_size=mlp,
        num_attention_heads=hidden // 64,
        tie_word_embeddings=True,
        max_position_embeddings=16_384,
        pad_token_id=0,
    )
    return {"ours": ours, "mamba": theirs, "llama": LlamaForCausalLM(llama).eval()}


def generate(model: Model, prompts: torch.Tensor, length: int, **options: Any) -> torch.Tensor:
    """Call `generate` for sequences of exactly `length` tokens."""
    new = length - prompts.shape[1]
    mask = torch.ones_like(prompts)
    ids = model.generate(
        prompts, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, eos_token_id=None, top_k=0, **options
    )
    assert isinstance(ids, torch.Tensor)
    return ids


def check_same_tokens(models: dict[str, Model], prompts: torch.Tensor) -> None:
    for options in ({"do_sample": False}, {"do_sample": True}):
        chosen = []
        for name in ("ours", "mamba"):
            torch.manual_seed(0)
            chosen.append(generate(models[name], prompts, 64, **options))
        if not torch.equal(*chosen):
            raise RuntimeError(f"ours and the stock Mamba choose different tokens with {options}")


def seconds(name: str, sizes: tuple[int, int, int], batch: int, length: int) -> float:
    """The time of one run of one model, after a short run to warm up."""
    torch.manual_seed(0)
    model = make_models(*sizes)[name]
    prompts = torch.randint(3, sizes[0], (batch, 1))

    def run(tokens: int) -> None:
        if isinstance(model, MidiMambaForCausalLM):
            sample(model, prompts, tokens)
        else:
            generate(model, prompts, tokens, do_sample=True)

    run(8)
    start = time.perf_counter()
    run(length)
    return time.perf_counter() - start


def in_new_process(*arguments: Any) -> float:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(seconds, *arguments).result()


def late_over_early(model: MidiMambaForCausalLM, batch: int) -> float:
    """The time per token around position 8,000 over that around position 80: medians of two windows."""
    times: list[float] = []
    with inference(model):
        cache = RecurrentCache.for_model(model, batch)
        tokens = torch.ones(batch, 1, dtype=torch.long)
        for _ in range(LATE + WINDOW):
            start = time.perf_counter()
            tokens = draw(model.next_logits(tokens, cache))[:, None]
            times.append(time.perf_counter() - start)
    early, late = (statistics.median(times[at - WINDOW : at + WINDOW]) for at in (EARLY, LATE))
    return late / early


def main() -> None:
    parser = make_parser(__doc__, "sampling.py --repeats 3")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64], help="sequences (default: %(default)s)")
    parser.add_argument("--length", type=int, nargs="+", default=[512], help="tokens (default: %(default)s)")
    add_model_size(parser)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each model, in turn (default: %(default)s)")
    args = parser.parse_args()

    torch.manual_seed(0)
    sizes = (args.vocab, args.layers, args.hidden)
    models = make_models(*sizes)
    ours = models["ours"]
    assert isinstance(ours, MidiMambaForCausalLM)
    check_same_tokens(models, torch.randint(3, args.vocab, (4, 5)))
    rows = []
    for length in args.length:
        for batch in args.batch:
            times: dict[str, list[float]] = {name: [] for name in models}
            for _ in range(args.repeats):
                for name in models:
                    times[name].append(in_new_process(name, sizes, batch, length))
            median = {name: statistics.median(values) for name, values in times.items()}
            rows.append(
                {
                    "batch": batch,
                    "length": length,
                    "ms_per_step": {name: round(1e3 * value / length, 3) for name, value in median.items()},
                    "ms_per_step_each": {
                        name: [round(1e3 * value / length, 3) for value in values] for name, values in times.items()
                    },
                    "ratio_mamba": round(median["mamba"] / median["ours"], 2),
                    "ratio_llama": round(median["llama"] / median["ours"], 2),
                }
            )
            print(rows[-1], flush=True)
    finish(
        {
            "benchmark": "sampling",
            "compared": "generate of transformers' Mamba, and of a Llama",
            "ratio": rows[-1]["ratio_mamba"],
            "late_over_early": round(late_over_early(ours, 16), 3),
            "rows": rows,
            "sizes": {"layers": args.layers, "hidden": args.hidden, "vocab": args.vocab},
        },
        args.out,
    )


if __name__ == "__main__":
    main()
