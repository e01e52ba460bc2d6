"""Does a model that fills gaps use what comes after them, and what does learning it cost continuation?

Generators of one size are trained with the same number of steps, without rearranged pieces and with a share of them.
Four bars of every held-out piece are then valued in nats per note in four ways, by the same notes:

- `both_sides`: the wanted bars given what comes before and after, as `midimamba infill` asks for them;
- `before`: asked for in the same way, but nothing after them is shown;
- `after`: asked for in the same way, but nothing before them is shown;
- `continued`: as the continuation of what comes before.

`continuation` is the likelihood of whole pieces, which is what a generator without infilling is trained for. What is
sampled is compared with the true bars (`alike`): fillings, continuations of what comes before, and copies of the bar
before. The last line is JSON: `ratio` is `continued` over `both_sides` with the largest share; `cost_percent` is how
much worse `continuation` becomes. Intervals are over pieces, those of the first seed.
"""

import argparse
import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gap_likeness import LIKENESSES, Gap, compare, draw
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from measure import finish, make_parser
from midimamba import MidiMambaForCausalLM, MidiProcessor
from midimamba.command_options import DrawingOptions
from midimamba.corpus.augmentation import Augmentation, EpochBlocks
from midimamba.corpus.load import load_corpus
from midimamba.corpus.packing import BlockCollator
from midimamba.evaluation.estimates import mean_estimate, ratio_estimate
from midimamba.evaluation.features import Piece
from midimamba.evaluation.rendering import import_demo, save_figure
from midimamba.evaluation.report_music import likelihood
from midimamba.modeling.policy import inference
from midimamba.tokenization.infilling import CONTEXT_BARS, Span
from midimamba.training.plan import LAGS, TRANSPOSE
from midimamba.training.pretrain import PretrainArguments, new_config
from midimamba.training.scripts import load_blocks
from repetition_runs import Learner
from resumable import Row, complete, mean_and_deviation

WANTED = 4  # bars
WAYS = ("both_sides", "before", "after", "continued")
DRAWING = DrawingOptions(num=4, temperature=0.7, top_p=1.0)
EXAMPLES = 3  # in the picture


@dataclass(frozen=True)
class Training:
    """
    What all runs have in common.

    Args:
        data (`str`): a corpus made with `--infill`.
        size (`str`): of every generator.
        steps, length, batch_size (`int`): steps of training, tokens per block, and blocks per step.
        learning_rate (`float`): the highest of a cycle that ends near 0.
        pieces (`int`): at most this many held-out pieces are valued.
        split (`str`): that they are from.
    """

    data: str
    size: str = "tiny"
    steps: int = 3000
    length: int = 512
    batch_size: int = 8
    learning_rate: float = 3e-3
    pieces: int = 100
    split: str = "test"


def run(arm: str, seed: int, training: Training) -> Row:
    """Train a generator with the share that is the name of its arm, and value held-out music."""
    share = float(arm)
    blocks, _, processor = load_blocks(
        training.data, training.length, Augmentation(transpose=TRANSPOSE), seed, infill_share=share
    )
    assert isinstance(blocks, EpochBlocks)  # keys change
    model = _trained(blocks, processor, training, seed)
    rows = load_corpus(training.data)[0][training.split]
    collator = BlockCollator.for_processor(processor)
    row: Row = {"arm": arm, "seed": seed, "settings": asdict(training)}
    row["continuation"] = likelihood(model, rows, collator)["held_out_nll_per_note"]
    if share:
        valued = [_value_piece(model, processor, ids) for ids in rows["input_ids"][: training.pieces]]
        row["spans"] = [one for one in valued if one is not None]
        row |= _sampled(model, processor, rows["input_ids"][: training.pieces])
    return row


def _sampled(model: MidiMambaForCausalLM, processor: MidiProcessor, pieces: Sequence[Sequence[int]]) -> Row:
    """How alike sampled and true bars are, piece by piece, and a few examples."""
    row: Row = {"alike": [], "examples": []}
    for ids in pieces:
        gap = _gap(processor, ids)
        if gap is None:
            continue
        score = processor.decode(ids)
        compared = compare(model, processor, score, gap, DRAWING)
        if compared is None:
            continue
        row["alike"].append(compared.likeness)
        if len(row["examples"]) < EXAMPLES:
            start, end = (float(Piece(score).starts[bar]) for bar in gap)
            row["examples"].append({"rolls": compared.rolls, "start": start, "end": end})
    return row


def _gap(processor: MidiProcessor, ids: Sequence[int]) -> Gap | None:
    """The middle bars of a piece; `None` if it is too short or they are silent."""
    arranger = processor.arranger
    piece = arranger.take_apart(arranger.expand(ids))
    first = (piece.num_bars - WANTED) // 2
    gap = Gap(first, first + WANTED)
    return gap if first >= 1 and ((piece.bar >= gap.first) & (piece.bar < gap.last)).any() else None


def _trained(blocks: EpochBlocks, processor: MidiProcessor, training: Training, seed: int) -> MidiMambaForCausalLM:
    set_seed(seed)
    arguments = PretrainArguments(training.data, size=training.size, lookback_bars=list(LAGS))
    model = MidiMambaForCausalLM(new_config(arguments, processor))
    learner, collator = Learner(model, training.learning_rate, training.steps), BlockCollator.for_processor(processor)
    order, epoch = list[int](), 0
    for _ in range(training.steps):
        if len(order) < training.batch_size:
            blocks.set_epoch(epoch)
            order, epoch = torch.randperm(len(blocks)).tolist(), epoch + 1
        learner.learn(collator([blocks[order.pop()] for _ in range(training.batch_size)]))
    return model


def _value_piece(model: MidiMambaForCausalLM, processor: MidiProcessor, ids: Sequence[int]) -> dict[str, float] | None:
    """Nats of the middle bars of a piece in each of [`WAYS`], and their notes; `None` if the piece is too short."""
    gap = _gap(processor, ids)
    if gap is None:
        return None
    arranger, (first, last) = processor.arranger, gap
    piece = arranger.take_apart(arranger.expand(ids))
    wanted = (piece.bar >= first) & (piece.bar < last)
    span = Span(first, last, wanted, np.unique(piece.program).tolist(), beside=False)
    bos = [processor.bos_token_id]
    arranged = {
        "both_sides": arranger.arrange(piece, span),
        "before": arranger.arrange(piece, span, after=0),
        "after": arranger.arrange(piece, span, before=0),
        "continued": arranger.continued(piece, first, last, CONTEXT_BARS),
    }
    nats = {way: _nats(model, bos + prompt, music) for way, (prompt, music) in arranged.items()}
    return {**nats, "notes": int(wanted.sum())}


def _nats(model: MidiMambaForCausalLM, prompt: list[int], music: list[int]) -> float:
    """The negative log-likelihood of music that follows a prompt."""
    ids = torch.tensor([prompt + music])
    with inference(model):
        logits = model(input_ids=ids[:, :-1]).logits[0, len(prompt) - 1 :]
    return float(torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum"))


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The runs of one share."""
    found: dict[str, Any] = {"continuation": mean_and_deviation([row["continuation"] for row in rows])}
    for way in WAYS if "spans" in rows[0] else ():
        values = [sum(s[way] for s in row["spans"]) / sum(s["notes"] for s in row["spans"]) for row in rows]
        found[way] = mean_and_deviation(values)
    if "spans" in rows[0]:
        spans = rows[0]["spans"]
        gain = ratio_estimate([s["continued"] - s["both_sides"] for s in spans], [s["notes"] for s in spans])
        found["gain_per_note"] = {name: round(value, 4) for name, value in asdict(gain).items()}
        found["pieces"] = len(spans)
        found["alike"] = _alike(rows[0]["alike"])
    return found


def _alike(pieces: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Means over pieces, and what fillings have more than continuations and copies."""
    found: dict[str, Any] = {}
    for name in LIKENESSES:
        values = {way: np.array([piece[way][name] for piece in pieces]) for way in ("filled", "continued", "copied")}
        found[name] = {way: round(float(np.nanmean(each)), 4) for way, each in values.items()}
        for other in ("continued", "copied"):
            more = asdict(mean_estimate(values["filled"] - values[other]))
            found[name][f"filled_minus_{other}"] = {bound: round(value, 4) for bound, value in more.items()}
    return found


def plot(examples: Sequence[dict[str, Any]], path: Path) -> None:
    """Piano rolls of a few fillings, beside the true bars and continuations."""
    figure = import_demo("matplotlib.figure").Figure(figsize=(12, 2.2 * len(examples)), dpi=100, layout="constrained")
    draw(examples, figure.subplots(len(examples), 3, sharex="row", sharey="row", squeeze=False))
    save_figure(figure, path)


def parse() -> argparse.Namespace:
    own = Training("")
    parser = make_parser(__doc__, "infilling.py --data data --rows infilling.jsonl")
    add = parser.add_argument
    add("--data", required=True, help="corpus made by `midimamba tokenize --infill`")
    add("--shares", nargs="+", type=float, default=[0.0, 0.3], help="of rearranged pieces (default: 0 0.3)")
    add("--seeds", type=int, default=3, help="runs per share (default: %(default)s)")
    add("--size", default=own.size, help="size of every generator (default: %(default)s)")
    add("--steps", type=int, default=own.steps, help="training steps (default: %(default)s)")
    add("--length", type=int, default=own.length, help="tokens per block (default: %(default)s)")
    add("--batch-size", type=int, default=own.batch_size, help="blocks per step (default: %(default)s)")
    add("--learning-rate", type=float, default=own.learning_rate, help="the highest (default: %(default)s)")
    add("--pieces", type=int, default=own.pieces, help="held-out pieces that are valued (default: %(default)s)")
    add("--split", choices=("validation", "test"), default=own.split, help="that they are from (default: %(default)s)")
    add("--workers", type=int, default=2, help="runs at once (default: %(default)s)")
    add("--rows", type=Path, required=True, help="file with one line per run, from which a second start continues")
    add("--plot", type=Path, help="draw a few fillings into this file")
    return parser.parse_args()


def described(row: Row) -> str:
    return f"{row['arm']} {row['seed']} {row['continuation']:.4f} nats per note"


def main() -> None:
    args = parse()
    disable_progress_bar()
    names = ("data", "size", "steps", "length", "batch_size", "learning_rate", "pieces", "split")
    training = Training(**{name: getattr(args, name) for name in names})
    arms = [f"{share:g}" for share in sorted({0.0, *args.shares})]
    jobs = [(arm, seed) for seed in range(args.seeds) for arm in arms]
    make = functools.partial(run, training=training)
    done = complete(jobs, make, asdict(training), args.rows, args.workers, described)
    results = {arm: summary([done[arm, seed] for seed in range(args.seeds)]) for arm in arms}
    plain, ours = results[arms[0]], results[arms[-1]]
    filled = "both_sides" in ours
    finish(
        {
            "benchmark": "infilling",
            "compared": "NLL per note of four held-out bars: as a continuation, over given both sides; one generator",
            "ratio": round(ours["continued"][0] / ours["both_sides"][0], 4) if filled else None,
            "cost_percent": round(100 * (ours["continuation"][0] / plain["continuation"][0] - 1), 3),
            "shares": results,
            "settings": asdict(training),
        },
        args.out,
    )
    if args.plot and filled:
        plot(done[arms[-1], 0]["examples"], args.plot)


if __name__ == "__main__":
    main()
