"""What the grammar costs in sampling, with constraints and without: `generate` at batch 1.

The same generator samples the same number of tokens without a grammar and with one, under each set of constraints, in
turn. The last line is JSON: `ratio` is the time with the plain grammar over that without one. `cost_percent` is what
every set adds; `microseconds` is the time of the grammar alone for one token, around position 80 and around 8,000, and
`late_over_early` compares them as parts of a step: the whole time for one token at 8,000 over that at 80. All times
are processor time of one thread, so that other work on the machine counts little.
"""

import statistics
import time
from typing import Any

import torch
from constraints import make_music
from transformers import LogitsProcessorList

from measure import add_model_size, finish, make_parser
from midimamba import MidiMambaConfig, MidiMambaForCausalLM, MidiProcessor
from midimamba.tokenization.tokenizer import build_tokenizer, train_tokenizer

EARLY, LATE, WINDOW = 80, 8_000, 64
SETS: dict[str, dict[str, Any]] = {
    "grammar": {},
    "scale and range": {"scale": "D-dorian", "pitch_range": ["36-84"]},
    "grid": {"grid": "1/16"},
    "polyphony": {"polyphony": 4},
    "all": {"scale": "D-dorian", "pitch_range": ["36-84"], "polyphony": 4, "grid": "1/16", "notes_per_bar": "2-32"},
}


def seconds(
    model: MidiMambaForCausalLM, processor: MidiProcessor, tokens: int, wanted: dict[str, Any] | None
) -> float:
    """The time of `generate` for one token. Without a grammar if `wanted` is None."""
    inputs = processor(None, return_tensors="pt")
    grammar = LogitsProcessorList()
    if wanted is not None:
        grammar.append(processor.grammar(min_bars=tokens, constraints=wanted))
    torch.manual_seed(0)
    start = time.process_time()
    ids = model.generate(
        **inputs, logits_processor=grammar, max_new_tokens=tokens, eos_token_id=None, do_sample=True, top_k=0
    )
    assert isinstance(ids, torch.Tensor)
    return (time.process_time() - start) / (ids.shape[1] - 1)


def own_seconds(processor: MidiProcessor, wanted: dict[str, Any]) -> dict[int, float]:
    """The median time of the grammar alone for one token, around two positions."""
    grammar = processor.grammar(min_bars=LATE, constraints=wanted)
    scores = torch.randn(1, processor.midi_tokenizer.vocab_size)
    ids = torch.ones(1, 1, dtype=torch.long)
    times: list[float] = []
    for _ in range(LATE + WINDOW):
        start = time.process_time()
        judged = grammar(ids, scores)
        times.append(time.process_time() - start)
        ids = torch.cat([ids, torch.multinomial(judged.softmax(dim=1), 1)], dim=1)
    return {at: statistics.median(times[at - WINDOW : at + WINDOW]) for at in (EARLY, LATE)}


def main() -> None:
    parser = make_parser(__doc__, "grammar.py --repeats 3")
    add_model_size(parser)
    parser.add_argument("--tokens", type=int, default=600, help="about 16 bars (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, in turn (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    train_tokenizer(tokenizer, [make_music(seed) for seed in range(8)], args.vocab)
    processor = MidiProcessor(tokenizer, programs=[-1, 0, 40])
    config = MidiMambaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=args.hidden, num_hidden_layers=args.layers, pad_token_id=0
    )
    model = MidiMambaForCausalLM(config).eval()
    plans: dict[str, dict[str, Any] | None] = {"none": None, **SETS}
    times: dict[str, list[float]] = {name: [] for name in plans}
    for _ in range(args.repeats + 1):  # the first one warms up
        for name, wanted in plans.items():
            times[name].append(seconds(model, processor, args.tokens, wanted))
    median = {name: statistics.median(each[1:]) for name, each in times.items()}
    own = {name: own_seconds(processor, wanted) for name, wanted in SETS.items()}
    finish(
        {
            "benchmark": "grammar",
            "compared": "generate at batch 1 with the grammar, and without",
            "ratio": round(median["grammar"] / median["none"], 3),
            "cost_percent": {name: round(100 * (median[name] / median["none"] - 1), 1) for name in SETS},
            "milliseconds": {name: round(1e3 * each, 3) for name, each in median.items()},
            "microseconds": {name: {at: round(1e6 * own[name][at]) for at in own[name]} for name in SETS},
            "late_over_early": {
                name: round((median["none"] + own[name][LATE]) / (median["none"] + own[name][EARLY]), 3)
                for name in SETS
            },
            "sizes": {"layers": args.layers, "hidden": args.hidden, "vocab": tokenizer.vocab_size},
        },
        args.out,
    )


if __name__ == "__main__":
    main()
