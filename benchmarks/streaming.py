"""Streaming: how soon the first note is there, that a token costs the same later on, and that memory stays flat.

An untrained generator streams REMI under the grammar, on one core. The last line is JSON: `ratio` is the time of
`generate_scores` for a piece of 16 bars over the time from the call of `stream` to its first note, medians over seeds;
`late_over_early` is the time per token around position 8,000 over that around position 80, medians over tokens, the
two in turn; `memory_growth` is the largest resident memory after a warm-up over that at its end, in music without end
by a small generator that looks back.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
from tqdm import tqdm

from measure import add_model_size, finish, make_parser
from midimamba import MidiMambaConfig, MidiMambaForCausalLM, MidiProcessor, Note, stream
from midimamba.command_options import SamplingOptions
from midimamba.generation import generate_scores
from midimamba.tokenization.tokenizer import build_tokenizer, time_ids
from midimamba.training.plan import LAGS

BARS, VOICES = 16, 6
EARLY = 80
PREFERENCE = 5.0


class Clocked:
    """A stream that notes when its model has read each token, and how many of these open a bar."""

    def __init__(self, model: MidiMambaForCausalLM, start: Callable[[], Iterator[Note]], bars: list[int]):
        self.model, self._bars = model, set(bars)
        self.times: list[float] = []
        self.tokens = self.bars = 0
        self.notes = start()

    def run(self, tokens: int = 0, bars: int = 0) -> None:
        """Take notes until there are as many tokens and bars in all."""
        hook = self.model.register_forward_hook(self._count, with_kwargs=True)
        while self.tokens < tokens or self.bars < bars:
            next(self.notes)
        hook.remove()

    def _count(self, model: Any, inputs: Any, more: dict[str, Any], output: Any) -> None:
        self.times.append(time.perf_counter())
        self.tokens += 1
        self.bars += int(more["input_ids"][0, -1]) in self._bars

    def take_seconds(self) -> list[float]:
        """Of each token since this was last asked for."""
        seconds = [after - before for before, after in zip(self.times, self.times[1:], strict=False)]
        self.times = []
        return seconds


def make_model(processor: MidiProcessor, layers: int, hidden: int, lags: tuple[int, ...] = ()) -> MidiMambaForCausalLM:
    bars, positions = time_ids(processor.midi_tokenizer)
    return MidiMambaForCausalLM(
        MidiMambaConfig(
            vocab_size=len(processor.midi_tokenizer),
            hidden_size=hidden,
            num_hidden_layers=layers,
            lookback_bars=lags,
            bar_token_ids=bars,
            position_token_ids=positions,
        )
    ).eval()


def first_notes(model: MidiMambaForCausalLM, processor: MidiProcessor, seeds: int) -> dict[str, list[float]]:
    """Seconds to the first note, of the clock and of the processor, and for a whole piece; by seed, once warm."""
    times: dict[str, list[float]] = {"first note": [], "processor": [], "whole piece": []}
    for seed in range(seeds + 1):
        options = SamplingOptions(num=1, bars=BARS, seed=seed)
        start, used = time.perf_counter(), time.process_time()
        next(stream(model, processor, options=options))
        times["first note"].append(time.perf_counter() - start)
        times["processor"].append(time.process_time() - used)
        start = time.perf_counter()
        generate_scores(model, processor, options)
        times["whole piece"].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in times.items()}


def late_over_early(
    model: MidiMambaForCausalLM, processor: MidiProcessor, late: int, steps: int, rounds: int
) -> tuple[float, dict[str, float]]:
    """The ratio, and milliseconds per token."""
    bars = time_ids(processor.midi_tokenizer)[0]
    options = SamplingOptions(num=1, bars=late, max_new_tokens=late + 2 * steps * rounds, seed=1)

    def start() -> Iterator[Note]:
        return stream(model, processor, options=options)

    old = Clocked(model, start, bars)
    old.run(late)
    old.take_seconds()
    times: dict[str, list[float]] = {"early": [], "late": []}
    for _ in tqdm(range(rounds), desc="late and early", leave=False, disable=None):
        new = Clocked(model, start, bars)
        new.run(EARLY + steps // 2)
        times["early"] += new.take_seconds()[EARLY - steps // 2 :]
        old.run(old.tokens + steps)
        times["late"] += old.take_seconds()
    median = {name: statistics.median(values) for name, values in times.items()}
    return median["late"] / median["early"], {name: 1e3 * value for name, value in median.items()}


def memory(processor: MidiProcessor, layers: int, hidden: int, bars: int, warm_up: int) -> dict[str, Any]:
    """Resident memory in MiB while music without end goes on for some bars. They are short: the model prefers bars."""
    model = make_model(processor, layers, hidden, LAGS)
    bonus = torch.zeros(model.config.vocab_size)
    bonus[list(model.config.bar_token_ids)] = PREFERENCE
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bonus)
    process = psutil.Process()
    music = Clocked(model, lambda: stream(model, processor, endless=True), time_ids(processor.midi_tokenizer)[0])
    sizes = {}
    start = time.perf_counter()
    for reached in tqdm(range(warm_up, bars + 1, max(1, (bars - warm_up) // 20)), desc="music", leave=False):
        while music.bars < reached:
            music.run(bars=min(reached, music.bars + 100))
            music.take_seconds()
        sizes[reached] = round(process.memory_info().rss / 2**20, 2)
    return {
        "growth": max(sizes.values()) / sizes[warm_up],
        "mib_at_bar": sizes,
        "tokens": music.tokens,
        "seconds": round(time.perf_counter() - start, 1),
        "layers": layers,
        "hidden": hidden,
        "lookback_bars": list(LAGS),
    }


def main() -> None:
    parser = make_parser(__doc__, "streaming.py --bars 1000")
    parser.add_argument("--seeds", type=int, default=20, help="streams that are timed (default: %(default)s)")
    parser.add_argument("--late", type=int, default=8000, help="position to compare (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="tokens per turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="turns (default: %(default)s)")
    parser.add_argument("--bars", type=int, default=10_000, help="bars without end (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=500, help="bars before memory counts (default: %(default)s)")
    parser.add_argument("--small", type=int, nargs=2, default=[2, 64], help="layers and hidden size for the memory")
    add_model_size(parser)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    processor = MidiProcessor(build_tokenizer("REMI"), programs=[0], voices=VOICES)
    model = make_model(processor, args.layers, args.hidden)
    times = first_notes(model, processor, args.seeds)
    first, used, whole = (statistics.median(values) for values in times.values())
    ratio, per_token = late_over_early(model, processor, args.late, args.steps, args.rounds)
    layers, hidden = args.small
    flat = memory(processor, layers, hidden, args.bars, args.warm_up)
    finish(
        {
            "benchmark": "streaming",
            "compared": f"a piece of {BARS} bars by generate_scores over the first note of a stream",
            "ratio": round(whole / first, 1),
            "first_note_ms": {
                "median": round(1e3 * first, 1),
                "least": round(1e3 * min(times["first note"]), 1),
                "most": round(1e3 * max(times["first note"]), 1),
                "median of processor time": round(1e3 * used, 1),
            },
            "late_over_early": round(ratio, 4),
            "ms_per_token": {name: round(value, 3) for name, value in per_token.items()},
            "memory_growth": round(flat.pop("growth"), 4),
            "memory": flat,
            "sizes": {
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "layers": args.layers,
                "hidden": args.hidden,
                "vocab": processor.vocab_size,
            },
        },
        args.out,
    )


if __name__ == "__main__":
    main()
