"""Sampling with look-back, against the same Mamba without it: what a token costs, and that it costs the same later on.

Both models sample 16 sequences with the grammar, as `midimamba generate` does. One after the other, each takes a step
around position 80 and a step around position 8,000, so that load falls on all four alike. Times are medians. The last
line is JSON: `ratio` is the time per token without look-back over that with it, around position 80; `late_over_early`
is the time around position 8,000 over that around position 80, by model.
"""

import statistics
import time

import torch
from torch import Tensor
from tqdm import tqdm

from measure import add_model_size, finish, make_parser
from midimamba import MidiMambaConfig, MidiMambaForCausalLM, MidiProcessor
from midimamba.modeling.policy import inference
from midimamba.modeling.sampling import draw
from midimamba.tokenization.grammar import MidiGrammar
from midimamba.tokenization.tokenizer import build_tokenizer, time_ids
from midimamba.training.plan import LAGS


class Sampler:
    """A model that samples with the grammar from where some music ends, one token at a time."""

    def __init__(self, model: MidiMambaForCausalLM, grammar: MidiGrammar, music: Tensor, steps: int):
        self.model, self.grammar, self.time = model, grammar, music.shape[1]
        self.ids = torch.nn.functional.pad(music, (0, steps))
        self.state = model.make_state(len(music), self.time + steps)
        self.seconds: list[float] = []
        with inference(model):
            self.logits = model.next_logits(music, self.state)

    def step(self) -> None:
        start = time.perf_counter()
        with inference(self.model):
            token = draw(self.grammar(self.ids[:, : self.time], self.logits))
            self.ids[:, self.time] = token
            self.time += 1
            self.logits = self.model.next_logits(token[:, None], self.state)
        self.seconds.append(time.perf_counter() - start)


def any_music(processor: MidiProcessor, batch: int, length: int) -> Tensor:
    """Valid music of a length: random ids, as the grammar allows them, and never an end."""
    grammar = processor.grammar(min_bars=length)
    ids = torch.full((batch, 1 + length), processor.bos_token_id)
    level = torch.zeros(batch, len(processor.midi_tokenizer))
    level[:, processor.eos_token_id] = -1e9
    for now in tqdm(range(1, 1 + length), desc="music", leave=False, disable=None):
        ids[:, now] = draw(grammar(ids[:, :now], level))
    return ids[:, :length]


def main() -> None:
    parser = make_parser(__doc__, "look_back.py")
    parser.add_argument("--batch", type=int, default=16, help="sequences (default: %(default)s)")
    parser.add_argument("--early", type=int, default=80, help="first position (default: %(default)s)")
    parser.add_argument("--late", type=int, default=8000, help="second position (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="tokens per median (default: %(default)s)")
    add_model_size(parser)
    args = parser.parse_args()

    torch.manual_seed(0)
    processor = MidiProcessor(build_tokenizer("REMI"))
    bars, positions = time_ids(processor.midi_tokenizer)
    config = {
        "vocab_size": processor.vocab_size,
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "bar_token_ids": bars,
        "position_token_ids": positions,
    }
    music = any_music(processor, args.batch, args.late)
    samplers = {}
    for name, lags in (("plain", []), ("look-back", LAGS)):
        model = MidiMambaForCausalLM(MidiMambaConfig(**config, lookback_bars=lags)).eval()
        for position in (args.early, args.late):
            samplers[name, position] = Sampler(model, processor.grammar(), music[:, :position], args.steps)
    for _ in tqdm(range(args.steps), desc="sampling", leave=False, disable=None):
        for sampler in samplers.values():
            sampler.step()
    median = {key: statistics.median(sampler.seconds) for key, sampler in samplers.items()}
    names = ("plain", "look-back")
    finish(
        {
            "benchmark": "look-back",
            "compared": "sampling with the grammar: a Mamba without look-back over the same with it",
            "ratio": round(median["plain", args.early] / median["look-back", args.early], 4),
            "late_over_early": {name: round(median[name, args.late] / median[name, args.early], 4) for name in names},
            "ms_per_step": {
                f"{name} at {position}": round(1e3 * value, 3) for (name, position), value in median.items()
            },
            "sizes": {
                "batch": args.batch,
                "layers": args.layers,
                "hidden": args.hidden,
                "vocab": processor.vocab_size,
            },
        },
        args.out,
    )


if __name__ == "__main__":
    main()
