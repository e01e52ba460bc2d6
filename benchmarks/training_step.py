"""Forward and backward pass of the five layouts, and of transformers' Llama and Mamba-2, by sequence length.

All models have about the same number of active parameters, and every pass has the same number of tokens. The last line
is JSON: `rows` has tokens per second, and `ratio` is our `mamba` over the Llama at the longest length.
"""

import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM, PreTrainedModel

from measure import finish, make_parser
from midimamba import MidiMambaConfig, MidiMambaForCausalLM

LAYOUTS = ("mamba", "mamba-mlp", "moe-mamba", "transformer", "transformer-moe")


def count_parameters(model: PreTrainedModel) -> int:
    """The number of parameters without embeddings."""
    embeddings = {id(model.get_input_embeddings().weight)}
    return sum(p.numel() for p in model.parameters() if id(p) not in embeddings)


def make_rivals(reference: PreTrainedModel, vocab: int) -> dict[str, PreTrainedModel]:
    """A Llama with the layers and the width of our `mamba`, and a Mamba-2 with the same number of parameters."""
    config, budget = reference.config, count_parameters(reference)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    mlp = round((budget / layers - 4 * hidden**2 - 2 * hidden) / (3 * hidden))
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers, "tie_word_embeddings": True}
    llama = LlamaConfig(
        **sizes,
        intermediate_size=mlp,
        num_attention_heads=hidden // 64,
        max_position_embeddings=16_384,
        pad_token_id=0,
    )
    heads = 2 * hidden // 64
    mamba2 = Mamba2Config(
        **sizes, num_heads=heads, head_dim=64, state_size=64, n_groups=1, chunk_size=64, pad_token_id=0
    )
    return {"stock llama": LlamaForCausalLM(llama), "stock mamba2": Mamba2ForCausalLM(mamba2)}


def step_seconds(model: PreTrainedModel, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return time.perf_counter() - start


def main() -> None:
    parser = make_parser(__doc__, "training_step.py --repeats 5")
    parser.add_argument(
        "--length", type=int, nargs="+", default=[128, 512, 1024, 2048, 4096, 8192], help="(default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=int, default=4096, help="per pass, at least one sequence (default: %(default)s)"
    )
    parser.add_argument("--size", default="small", help="named size (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=1000, help="vocabulary (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed passes of each model, in turn (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", help="only these models")
    args = parser.parse_args()

    torch.manual_seed(0)
    models: dict[str, PreTrainedModel] = {
        layout: MidiMambaForCausalLM(MidiMambaConfig.of_size(args.size, layout=layout, vocab_size=args.vocab))
        for layout in LAYOUTS
    }
    models |= make_rivals(models["mamba"], args.vocab)
    models = {name: model.train() for name, model in models.items() if not args.only or name in args.only}
    rows = []
    for length in args.length:
        ids = torch.randint(3, args.vocab, (max(1, args.tokens // length), length))
        times: dict[str, list[float]] = {name: [] for name in models}
        for repeat in range(args.repeats + 1):
            for name, model in models.items():
                seconds = step_seconds(model, ids)
                if repeat:  # the first pass warms up
                    times[name].append(seconds)
        rates = {name: round(ids.numel() / statistics.median(values)) for name, values in times.items()}
        rows.append({"length": length, "batch": len(ids), "tokens_per_second": rates})
        print(rows[-1], flush=True)
    last = rows[-1]["tokens_per_second"]
    finish(
        {
            "benchmark": "training_step",
            "compared": "our mamba and a Llama with as many parameters, at the longest length",
            "ratio": round(last["mamba"] / last["stock llama"], 2)
            if {"mamba", "stock llama"} <= last.keys()
            else None,
            "rows": rows,
            "parameters": {name: count_parameters(model) for name, model in models.items()},
            "sizes": {"size": args.size, "vocab": args.vocab, "tokens": args.tokens},
        },
        args.out,
    )


if __name__ == "__main__":
    main()
