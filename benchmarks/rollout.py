"""Monte-Carlo action values: forked states against prefixes that are encoded again.

Two opponents draw the same completions. `uncached` is what a port of SeqGAN does if it calls the model on the whole
sequence for every new token. `reencoded` has a cache: for every position it encodes the prefix from its first token,
then draws all its completions together, one token at a time. It loses time to many short passes, not to more tokens.

Every completion has its own random numbers, the same for all three. Before anything is timed, the action values of
all three must agree in float64, where rounding changes no token. The reward is a weighted mean of the tokens, so that
only roll-outs are timed. The last line is JSON: `ratio` is the time of `uncached` over ours, at `--positions` evenly
spread positions. `rows` has the times of `reencoded` at these positions, and at all positions unless `--skip-all`.
"""

import time
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor

from measure import add_model_size, finish, make_parser
from midimamba import MidiDiscriminator, MidiDiscriminatorConfig, MidiMambaConfig, MidiMambaForCausalLM, RecurrentCache
from midimamba.modeling.policy import inference
from midimamba.modeling.sampling import NEVER, Sequences, pick
from midimamba.training import rollout
from midimamba.training.action_values import bar_positions, monte_carlo_values
from midimamba.training.rewards import Reward as Rewards

Reward = Callable[[Tensor], Tensor]
TOLERANCE = 1e-4


def forked(model: MidiMambaForCausalLM, reward: Reward, rows: Tensor, positions: list[int], numbers: Tensor) -> Tensor:
    """Ours, with given random numbers `(time, K, batch, N)`."""
    steps = iter(range(positions[0] + 1, rows.shape[1]))
    flat = numbers.flatten(1)
    rewards = Rewards("constant", MidiDiscriminator(MidiDiscriminatorConfig(vocab_size=model.config.vocab_size)))
    rewards.control = reward
    rollouts = rollout.Rollouts(model, numbers.shape[-1], flat.shape[1], NEVER, prompt_length=1)
    times = torch.tensor([positions] * len(rows))

    def draw(logits: Tensor, temperature: float) -> Tensor:
        return pick(logits / temperature, flat[next(steps), : len(logits), None])

    with patch.object(rollout, "draw", draw):  # the only source of chance in a roll-out
        return monte_carlo_values(rollouts, rewards, Sequences(rows, torch.ones_like(rows)), times)[:, :-1]


def spread(length: int, count: int | None) -> list[int]:
    """`count` evenly spread actions of a sequence whose first token is given; `None` for all actions."""
    positions: list[int] = bar_positions(torch.zeros(1, length, dtype=torch.long), [], 1, count)[0].tolist()
    return positions


def complete_again(model: MidiMambaForCausalLM, completions: Tensor, start: int, numbers: Tensor, batch: int) -> None:
    """Complete a prefix of `start` tokens, which is encoded again."""
    cache = RecurrentCache.for_model(model, batch)
    copies = len(completions) // batch
    logits = model.next_logits(completions[::copies, :start], cache).repeat_interleave(copies, 0)
    forks = cache.fork(copies)
    for t in range(start, completions.shape[1]):
        completions[:, t] = pick(logits, numbers[t, :, None])
        if t + 1 < completions.shape[1]:
            logits = model.next_logits(completions[:, t : t + 1], forks)


def complete_uncached(
    model: MidiMambaForCausalLM, completions: Tensor, start: int, numbers: Tensor, batch: int
) -> None:
    """Read all tokens again for every new one."""
    for t in range(start, completions.shape[1]):
        logits = model(input_ids=completions[:, :t], use_cache=False, logits_to_keep=1).logits[:, -1]
        completions[:, t] = pick(logits, numbers[t, :, None])


def one_by_one(complete: Callable[..., None]) -> Callable[..., Tensor]:
    """Action values, one position after the other."""

    def run(
        model: MidiMambaForCausalLM, reward: Reward, rows: Tensor, positions: list[int], numbers: Tensor
    ) -> Tensor:
        values = []
        with inference(model):
            for index, position in enumerate(positions):
                completions = rows.repeat_interleave(numbers.shape[-1], 0)
                complete(model, completions, position + 1, numbers[:, index].flatten(1), len(rows))
                values.append(reward(completions).view(len(rows), -1).mean(1))
        return torch.stack(values, 1)

    return run


SIDES = {"forked": forked, "reencoded": one_by_one(complete_again), "uncached": one_by_one(complete_uncached)}


def compare(
    model: MidiMambaForCausalLM, rows: Tensor, positions: list[int], rollouts: int, sides: list[str]
) -> dict[str, float]:
    """Seconds of each side.

    Raises:
        RuntimeError: in float64, if the action values differ.
    """
    numbers = torch.rand(rows.shape[1], len(positions), len(rows), rollouts, dtype=model.dtype)
    weights = torch.rand(rows.shape[1], dtype=model.dtype) / rows.shape[1]

    def reward(sequences: Tensor) -> Tensor:
        return (sequences / model.config.vocab_size * weights).sum(1)

    seconds, values = {}, []
    for side in sides:
        start = time.perf_counter()
        values.append(SIDES[side](model, reward, rows, positions, numbers))
        seconds[side] = time.perf_counter() - start
        if model.dtype == torch.float64 and not torch.allclose(values[0], values[-1], atol=TOLERANCE, rtol=0):
            raise RuntimeError(f"the action values of {sides[0]} and {side} differ")
    return seconds


def main() -> None:
    parser = make_parser(__doc__, "rollout.py --positions 4")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--rollouts", type=int, default=16, help="completions per action (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default: %(default)s)")
    parser.add_argument(
        "--positions", type=int, default=8, help="actions that `uncached` completes as well (default: %(default)s)"
    )
    parser.add_argument("--skip-all", action="store_true", help="leave out the comparison at all positions")
    add_model_size(parser)
    args = parser.parse_args()

    torch.manual_seed(0)
    config = MidiMambaConfig(vocab_size=args.vocab, hidden_size=args.hidden, num_hidden_layers=args.layers)
    model = MidiMambaForCausalLM(config).eval()
    sequences = torch.randint(3, args.vocab, (args.batch, args.length))
    short = sequences[:, : min(args.length, 32)]
    compare(model.double(), short, spread(short.shape[1], 6), 4, list(SIDES))
    model.float()
    compare(model, short, spread(short.shape[1], 2), 4, list(SIDES))  # warms up

    rows = []
    everywhere = [] if args.skip_all else [(None, ["forked", "reencoded"])]
    for count, sides in [(args.positions, list(SIDES)), *everywhere]:
        positions = spread(args.length, count)
        seconds = compare(model, sequences, positions, args.rollouts, sides)
        ratios = {f"ratio_{side}": round(seconds[side] / seconds["forked"], 2) for side in sides[1:]}
        rounded = {side: round(value, 2) for side, value in seconds.items()}
        rows.append({"positions": len(positions), "seconds": rounded, **ratios})
        print(rows[-1], flush=True)
    finish(
        {
            "benchmark": "rollout",
            "compared": "the whole sequence read again for every new token; rows: every prefix encoded again",
            "ratio": rows[0]["ratio_uncached"],
            "rows": rows,
            "sizes": {
                **{"length": args.length, "rollouts": args.rollouts, "batch": args.batch},
                **{"layers": args.layers, "hidden": args.hidden, "vocab": args.vocab},
            },
        },
        args.out,
    )


if __name__ == "__main__":
    main()
