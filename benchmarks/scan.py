"""Forward and backward pass of a Mamba language model: transformers' pure-torch path against ours.

The last line is JSON; `ratio` is their time over ours. Both models hold the same weights, and the loss and the
gradients of both are compared before anything is timed.
"""

import torch
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

from measure import add_model_size, finish, make_parser, median_seconds
from midimamba import MidiMambaConfig, MidiMambaForCausalLM
from midimamba.modeling.stock_names import plain_name


def forward_backward(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Run one training pass and return the loss."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return float(loss.detach())


def largest_gradient_difference(theirs: PreTrainedModel, ours: PreTrainedModel) -> float:
    """The largest difference, relative to the largest gradient of each parameter."""
    named = theirs.named_parameters()
    expected = {plain_name(name): parameter.grad for name, parameter in named if parameter.grad is not None}
    found = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None}
    return max(
        float((gradient - expected[name]).abs().max() / (expected[name].abs().max() + 1e-12))
        for name, gradient in found.items()
    )


def main() -> None:
    parser = make_parser(__doc__, "scan.py --seq-len 512")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a sequence (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="sequences (default: %(default)s)")
    add_model_size(parser)
    parser.add_argument("--repeats", type=int, default=7, help="timed passes of ours (default: %(default)s)")
    parser.add_argument("--their-repeats", type=int, default=1, help="timed passes of theirs (default: %(default)s)")
    parser.add_argument("--mambapy", action="store_true", help="compare with use_mambapy=True instead")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    args = parser.parse_args()

    torch.manual_seed(0)
    sizes = {"vocab_size": args.vocab, "hidden_size": args.hidden, "num_hidden_layers": args.layers}
    theirs = MambaForCausalLM(MambaConfig(**sizes, use_mambapy=args.mambapy, initializer_range=0.02)).train()
    ours = MidiMambaForCausalLM(MidiMambaConfig(**sizes)).train()
    ours.load_state_dict(theirs.state_dict())
    theirs, ours = theirs.to(args.device), ours.to(args.device)

    short = torch.randint(0, args.vocab, (args.batch, min(64, args.seq_len)), device=args.device)
    loss_difference = abs(forward_backward(theirs, short) - forward_backward(ours, short))
    gradient_difference = largest_gradient_difference(theirs, ours)

    ids = torch.randint(0, args.vocab, (args.batch, args.seq_len), device=args.device)
    forward_backward(ours, ids)
    our_seconds = median_seconds(lambda: forward_backward(ours, ids), args.repeats)
    print(f"ours: {our_seconds:.3f} s, median of {args.repeats}", flush=True)
    name = "transformers with mambapy" if args.mambapy else "transformers' pure-torch path"
    print(f"{name}: running, {args.their_repeats} pass(es) …", flush=True)
    their_seconds = median_seconds(lambda: forward_backward(theirs, ids), args.their_repeats)
    print(f"{name}: {their_seconds:.3f} s")
    finish(
        {
            "benchmark": "scan",
            "compared": name,
            "ratio": round(their_seconds / our_seconds, 1),
            "their_seconds": round(their_seconds, 4),
            "our_seconds": round(our_seconds, 4),
            "our_tokens_per_second": round(args.batch * args.seq_len / our_seconds),
            "loss_difference": loss_difference,
            "relative_gradient_difference": gradient_difference,
            "device": args.device,
            "sizes": {"seq_len": args.seq_len, "batch": args.batch, **sizes},
        },
        args.out,
    )


if __name__ == "__main__":
    main()
