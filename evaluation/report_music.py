"""The music of a run beside real music: what both are like, and how they look."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset
from symusic.core import ScoreTick
from tqdm.auto import tqdm

from midimamba.corpus.packing import BlockCollator
from midimamba.evaluation.comparison import first_bars
from midimamba.evaluation.features import NUMBERS, Feature, measure_with
from midimamba.evaluation.metrics import piece_nlls
from midimamba.evaluation.rendering import draw_piano_roll
from midimamba.evaluation.report_page import MUSIC
from midimamba.evaluation.samples import decode_all
from midimamba.modeling.judging import Judge, music_of
from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM
from midimamba.modeling.resampling import choose
from midimamba.tokenization.composing import seeded
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.sampling_limits import BEST_OF
from midimamba.tokenization.voices import most_voices

BARS = 16
_SAMPLED_AT_ONCE = 16


def likelihood(model: MidiMambaForCausalLM, rows: Dataset, collator: BlockCollator) -> dict[str, float]:
    """The negative log-likelihood of whole pieces, in nats: `held_out_nll` per token, `held_out_nll_per_note`."""
    nats, targets = piece_nlls(model, list(rows["input_ids"]), collator)
    return {
        "held_out_nll": sum(nats) / sum(targets),
        "held_out_nll_per_note": sum(nats) / sum(rows["num_notes"]),
    }


def sampled_pieces(model: MidiMambaForCausalLM, processor: MidiProcessor, num: int, seed: int) -> list[ScoreTick]:
    """
    Pieces of [`BARS`] bars as `midimamba generate` samples them, with the model's own sampling defaults.

    Args:
        model (`MidiMambaForCausalLM`): the generator.
        processor (`MidiProcessor`): its processor.
        num (`int`): pieces to sample. Those that are not music are left out.
        seed (`int`): the same seed gives the same pieces; the global random state is left as it was.
    """
    return decode_all(processor, _draws(model, processor, num, seed)).scores


def chosen_pieces(
    model: MidiMambaForCausalLM, processor: MidiProcessor, judge: Judge, num: int, seed: int
) -> list[ScoreTick]:
    """As [`sampled_pieces`], but a judge chooses each among [`~midimamba.tokenization.sampling_limits.BEST_OF`] draws,
    as `midimamba generate --discriminator` does."""
    draws = _draws(model, processor, BEST_OF * num, seed)
    ends = processor.pad_token_id, processor.eos_token_id
    log_odds = judge.log_odds([music_of(ids, *ends) for ids in draws]).view(num, BEST_OF)
    places = choose(log_odds, seed=seed).tolist()
    return decode_all(processor, [draws[BEST_OF * group + place] for group, place in enumerate(places)]).scores


def _draws(model: MidiMambaForCausalLM, processor: MidiProcessor, num: int, seed: int) -> list[list[int]]:
    """Ids of pieces, not all of which need be music."""
    inputs = {name: value.to(model.device) for name, value in processor(None, return_tensors="pt").items()}
    ids: list[list[int]] = []
    with seeded(seed, model.device):
        for start in tqdm(range(0, num, _SAMPLED_AT_ONCE), desc="pieces", leave=False, disable=None):
            count = min(_SAMPLED_AT_ONCE, num - start)
            ids += processor.compose(model, inputs, bars=BARS, redraw=False, num=count).ids.tolist()
    return ids


def music_figures(scores: Sequence[ScoreTick]) -> dict[str, float | None]:
    """The features of [`MUSIC`], each a mean over the pieces that have it; `None` if none has."""
    functions: dict[str, Feature] = {**NUMBERS, "most_voices": lambda piece: most_voices(piece.score)}
    measured = measure_with({name: functions[name] for name in MUSIC}, scores) if scores else {}
    figures: dict[str, float | None] = {}
    for name in MUSIC:
        values = measured.get(name, np.zeros(0))
        known = values[np.isfinite(values)]
        figures[name] = float(known.mean()) if len(known) else None
    return figures


def openings(processor: MidiProcessor, rows: Dataset) -> list[ScoreTick]:
    """The first [`BARS`] bars of every held-out piece."""
    pieces = [first_bars(processor, processor.decode(ids), BARS) for ids in rows["input_ids"]]
    return [piece.score for piece in pieces if piece]


def draw_real(scores: Sequence[ScoreTick], folder: Path, count: int, seed: int) -> None:
    """Write `count` of the pieces, drawn by `seed`, as MIDI files and piano rolls: `real-00.mid`, `real-00.png`, …"""
    folder.mkdir(exist_ok=True)
    chosen = np.random.default_rng(seed).permutation(len(scores))[:count]
    for index, which in enumerate(chosen.tolist()):
        name = f"real-{index:02d}"
        scores[which].dump_midi(folder / f"{name}.mid")
        draw_piano_roll(scores[which], folder / f"{name}.png", title=name)
