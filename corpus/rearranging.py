"""Training pieces for infilling: a share of them has a span moved to its end, another one in every epoch."""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from midimamba.corpus.augmentation import Augmentation, EpochBlocks
from midimamba.corpus.options import INFILL_SHARE
from midimamba.errors import InputError
from midimamba.tokenization.infilling import CONTEXT_BARS, Piece, Span
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.sampling_limits import check_fraction
from midimamba.tokenization.tokenizations import GAP

LONGEST = 8  # wanted bars
# Half of the spans are as long as phrases are, the others have any length.
_PHRASES = (1, 2, 4, 8)
_SOME_TRACKS, _ONE_VOICE = 0.5, 0.25  # how often only some tracks are wanted; of these, how often one voice of one
_OPEN = 32  # blocks that a document may still go to
_STREAM = 1  # tells these draws from those of augmentation


def share_of(share: float | None, processor: MidiProcessor) -> float:
    """The share of pieces to rearrange: the given one, or else the default of a corpus.

    Raises:
        InputError: if it is not from 0 to 1, or the corpus was not made for infilling.
    """
    supported = GAP in processor.midi_tokenizer.special_tokens
    if share is None:
        return INFILL_SHARE if supported else 0.0
    check_fraction("infill_share", share)
    if share and not supported:
        raise InputError(
            f"infill_share is {share}, but the corpus has no tokens for infilling: "
            "make it with `midimamba tokenize SOURCE --infill`"
        )
    return share


class InfillBlocks(EpochBlocks):
    """
    As [`EpochBlocks`], but a share of the pieces is rearranged as [`~midimamba.tokenization.infilling`] says.

    A rearranged piece is never cut: it has a block of its own or shares one, and padding fills the rest. A piece that
    is longer than a block becomes several excerpts, about as long as a block each. Which pieces and which bars are
    drawn depends only on the seed and the epoch. A piece that cannot be rearranged so that it fits stays as it is.

    Args:
        split (`datasets.Dataset`), processor (`MidiProcessor`), block_size (`int`), augmentation (`Augmentation`),
        seed (`int`): as for [`EpochBlocks`].
        share (`float`): of the pieces.

    Raises:
        InputError: if the corpus was not made for infilling.
    """

    def __init__(
        self,
        split: Dataset,
        processor: MidiProcessor,
        block_size: int,
        augmentation: Augmentation,
        seed: int,
        share: float,
    ):
        self.share = share
        self.arranger = processor.arranger
        super().__init__(split, processor, block_size, augmentation, seed)

    def _arrange(self, pieces: list[np.ndarray]) -> np.ndarray:
        """Blocks `(n, block_size)`: those of the pieces that stay as they are, and those of the others, shuffled."""
        assert self.epoch is not None
        random = np.random.default_rng([self.seed, self.epoch, len(pieces), _STREAM])
        drawn = random.random(len(pieces)) < self.share
        plain: list[np.ndarray] = []
        documents: list[np.ndarray] = []
        for piece, is_drawn in zip(pieces, drawn, strict=True):
            found = self._documents(piece, random) if is_drawn else []
            documents += found
            plain += [] if found else [piece]
        blocks = [self._packed(documents)]
        if plain:
            blocks.append(super()._arrange(plain))
        return random.permutation(np.concatenate(blocks))

    def _documents(self, ids: np.ndarray, random: np.random.Generator) -> list[np.ndarray]:
        """Excerpts of a piece, rearranged, that fit into a block each."""
        bos, eos = self.processor.bos_token_id, self.processor.eos_token_id
        controls = ids[np.isin(ids, self._controls)]
        base = self.arranger.expand(ids.tolist())
        piece = self.arranger.take_apart(base)
        room = self.block_size - len(controls) - 2
        # At least half of what a model is shown should be context.
        longest = max(1, int(room / 2 * piece.num_bars / len(ids)))
        found: list[np.ndarray] = []
        for _ in range(2 + 2 * len(ids) // self.block_size):  # some draws come to nothing
            if found and sum(map(len, found)) > len(ids) - self.block_size / 2:
                break
            span = draw_span(piece, longest, random)
            document = None if span is None else self._fitted(piece, span, room, len(base) / len(ids))
            if document is not None:
                found.append(np.array([bos, *controls, *document, eos], dtype=np.int32))
        return found

    def _fitted(self, piece: Piece, span: Span, room: int, per_id: float) -> list[int] | None:
        """The span with as many bars around it as fit into `room` ids, of which each stands for `per_id` base ids."""
        before, after = context_of(piece, span, room * per_id, self.arranger.num_base_ids(piece))
        while before >= 0:
            prompt, music = self.arranger.arrange(piece, span, before, after)
            if len(prompt) + len(music) <= room:
                return prompt + music
            if not before + after:
                return None
            before, after = (before - 1, after) if before > after else (before, after - 1)
        return None

    def _packed(self, documents: Sequence[np.ndarray]) -> np.ndarray:
        """Blocks `(n, block_size)` of whole documents, each put where it fits first, and padding."""
        rows: list[list[np.ndarray]] = []
        room: list[int] = []
        for document in documents:
            recent = range(max(0, len(rows) - _OPEN), len(rows))
            place = next((row for row in recent if room[row] >= len(document)), len(rows))
            if place == len(rows):
                rows.append([])
                room.append(self.block_size)
            rows[place].append(document)
            room[place] -= len(document)
        blocks = np.full((len(rows), self.block_size), self.processor.pad_token_id, dtype=np.int32)
        for block, row in zip(blocks, rows, strict=True):
            ids = np.concatenate(row)
            block[: len(ids)] = ids
        return blocks


def draw_span(piece: Piece, longest: int, random: np.random.Generator) -> Span | None:
    """A span of a piece to move to its end, or `None` if the bars that were drawn hold no note.

    Half of the time all notes of some bars; else those of some instruments, or the upper or the lower voice of one, as
    tracks of one instrument are.

    Args:
        piece (`Piece`): the piece.
        longest (`int`): the most bars. There are never more than 8, nor more than half of the piece.
        random (`numpy.random.Generator`): for all draws.
    """
    if piece.num_bars < 2:
        return None
    longest = min(LONGEST, longest, piece.num_bars // 2)
    length = int(random.choice(_PHRASES) if random.random() < 0.5 else random.integers(1, LONGEST + 1))
    length = min(length, longest)
    first = int(random.integers(piece.num_bars - length + 1))
    last = first + length
    inside = (piece.bar >= first) & (piece.bar < last)
    if not inside.any():
        return None
    if random.random() >= _SOME_TRACKS:
        return Span(first, last, inside, np.unique(piece.program).tolist(), beside=False)
    wanted = _draw_tracks(piece, inside, random)
    return Span(first, last, wanted, np.unique(piece.program[wanted]).tolist(), beside=True)


def _draw_tracks(piece: Piece, inside: NDArray[np.bool_], random: np.random.Generator) -> NDArray[np.bool_]:
    """The notes of some of the instruments that play in a span, or one voice of one of them; shape (notes,)."""
    programs = np.unique(piece.program[inside])
    if len(programs) > 1 and random.random() >= _ONE_VOICE:
        count = int(random.integers(1, len(programs)))
        chosen = random.choice(programs, count, replace=False)
        return inside & np.isin(piece.program, chosen)
    its = inside & (piece.program == random.choice(programs))
    pitches = piece.tokens[:, 0]  # ids of pitches ascend
    border = random.choice(pitches[its])
    upper = its & (pitches >= border)
    lower = its & ~upper
    return lower if lower.any() and random.random() < 0.5 else upper


def context_of(piece: Piece, span: Span, room: float, sizes: NDArray[np.int64]) -> tuple[int, int]:
    """How many bars before a span and after it fit into `room` base ids together with it, by turns.

    Args:
        piece (`Piece`), span (`Span`): the piece and what is wanted.
        room (`float`): base ids.
        sizes (`array` of shape (bars,)): base ids of each bar.
    """
    room -= int(sizes[span.first : span.last].sum())
    before = after = 0
    while True:
        left, right = span.first - before - 1, span.last + after
        options = [(after, right, 0, 1)] if right < piece.num_bars and after < CONTEXT_BARS else []
        options += [(before, left, 1, 0)] if left >= 0 and before < CONTEXT_BARS else []
        if not options:
            return before, after
        _, bar, more_before, more_after = min(options, key=lambda option: (option[0], -option[2]))
        room -= int(sizes[bar])
        if room < 0:
            return before, after
        before, after = before + more_before, after + more_after
