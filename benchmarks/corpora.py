"""Every file of real corpora in every tokenization: are ids, texts and notes what they should be?

For each corpus and tokenization, untrained and with BPE and Unigram trained on the corpus itself:

- `identical`: files for whose text the plain `transformers` tokenizer gives exactly the ids that MidiTok gives for the
  score;
- `same_text`: files whose ids the plain tokenizer decodes to the same text;
- `reloaded`: files for which MidiTok alone, loaded from `miditok.json`, gives the same ids;
- `notes_kept`: the share of notes that come back from the ids with the pitch, onset, duration, velocity and
  instrument that they have after MidiTok has rounded them to its grid.

The last line is JSON. `ratio` is the share of files that pass the first three checks. Any value but 1.0 is a bug.
"""

import copy
import json
import multiprocessing
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import miditok
from miditok import MusicTokenizer, TokSequence
from symusic.core import ScoreTick
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from measure import finish, make_parser
from midimamba.corpus.entries import Entry
from midimamba.corpus.sources import list_source, read_entries
from midimamba.tokenization.choices import ONE_STREAM
from midimamba.tokenization.ingest import MidiRefusedError, read_score
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import MIDITOK_FILE, base_ids, build_tokenizer, normalize_score, train_on_ids

MODELS = (None, "BPE", "Unigram")
# The tokens that a subword model is trained on, and the number of ids that it learns beyond the base tokens.
TRAINING_TOKENS, LEARNED = 1_000_000, 500
# PerTok writes onsets to 1/240 and durations to 1/24 of a beat, or 1/8 beyond four beats, up to 11.75 beats; here in
# ticks, 480 a beat.
PERTOK_ONSET, PERTOK_DURATION, PERTOK_LONGEST = 2, 60, 5640

Note = tuple[int, bool, int, int, float, float]
Coders = dict[str, tuple[MusicTokenizer, MusicTokenizer, PreTrainedTokenizerBase]]


def notes_of(score: ScoreTick) -> list[Note]:
    """Sorted (program, drums, pitch, velocity, onset, duration), times in 1/480 of a quarter note."""
    unit = 480 / score.ticks_per_quarter
    return sorted(
        (0 if track.is_drum else track.program, track.is_drum, n.pitch, n.velocity, n.time * unit, n.duration * unit)
        for track in score.tracks
        for n in track.notes
    )


def count_kept(tokenizer: MusicTokenizer, score: ScoreTick) -> tuple[int, int]:
    """The number of notes that are decoded correctly, and the number of notes."""
    expected = notes_of(tokenizer.preprocess_score(normalize_score(tokenizer, score)))
    found = notes_of(tokenizer.decode(TokSequence(ids=base_ids(tokenizer, score))))
    if type(tokenizer).__name__ == "PerTok":
        close = (
            a[:4] == b[:4]
            and abs(a[4] - b[4]) <= PERTOK_ONSET
            and abs(min(a[5], PERTOK_LONGEST) - b[5]) <= PERTOK_DURATION
            for a, b in zip(expected, found, strict=False)
        )
        return sum(close), max(len(expected), len(found))
    return sum((Counter(expected) & Counter(found)).values()), max(len(expected), len(found))


def make_coders(tokenization: str, pieces: list[list[int]]) -> Coders:
    """For every subword model: the tokenizer, the one that MidiTok reloads, and the one that AutoTokenizer loads."""
    coders: Coders = {}
    for model in MODELS:
        tokenizer = build_tokenizer(tokenization)
        if model:
            train_on_ids(tokenizer, pieces, len(tokenizer.vocab) + LEARNED, model)
        with tempfile.TemporaryDirectory() as folder:
            MidiProcessor(tokenizer).save_pretrained(folder)
            reloaded = getattr(miditok, tokenization)(params=Path(folder) / MIDITOK_FILE)
            coders[model or "untrained"] = (tokenizer, reloaded, AutoTokenizer.from_pretrained(folder))
    return coders


def encode_on(tokenizer: MusicTokenizer, base: TokSequence) -> list[int]:
    """The second half of MidiTok's `encode`: apply its subword model to base tokens, all at once or bar by bar."""
    sequence = copy.copy(base)
    if tokenizer.is_trained:
        tokenizer.encode_token_ids(sequence)
    return list(sequence.ids)


def check(coders: Coders, content: bytes) -> Counter[str] | None:
    """The checks that a file passes; `None` if it is refused."""
    try:
        score = read_score(content)
        untrained = coders["untrained"][0]
        ids = base_ids(untrained, score)
        kept, notes = count_kept(untrained, score)
    except MidiRefusedError:
        return None
    counts = Counter(files=1, tokens=len(ids), kept=kept, notes=notes)
    sequence = untrained.encode(normalize_score(untrained, score), encode_ids=False)
    text = " ".join(untrained[index] for index in ids)
    for model, (tokenizer, reloaded, plain) in coders.items():
        theirs, again = encode_on(tokenizer, sequence), encode_on(reloaded, sequence)
        ours = plain(text).input_ids
        counts[f"identical {model}"] += ours == theirs
        counts[f"same_text {model}"] += plain.decode(ours) == text
        counts[f"reloaded {model}"] += again == theirs
    return counts


def measure(corpus: str, contents: list[bytes], tokenization: str, workers: int) -> dict[str, Any]:
    pieces: list[list[int]] = []
    untrained = build_tokenizer(tokenization)
    for content in contents:
        if sum(map(len, pieces)) >= TRAINING_TOKENS:
            break
        try:
            pieces.append(base_ids(untrained, read_score(content)))
        except MidiRefusedError:
            continue
    coders = make_coders(tokenization, pieces)
    counts: Counter[str] = Counter()
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        results = pool.imap_unordered(partial(check, coders), contents, chunksize=4)
        for result in tqdm(results, desc=f"{corpus} {tokenization}", total=len(contents), unit="file"):
            counts.update(result or Counter(refused=1))
    return {
        "corpus": corpus,
        "tokenization": tokenization,
        "files": counts["files"],
        "refused": counts["refused"],
        "tokens": counts["tokens"],
        **{
            what: {model or "untrained": counts[f"{what} {model or 'untrained'}"] for model in MODELS}
            for what in ("identical", "same_text", "reloaded")
        },
        "notes": counts["notes"],
        "notes_kept": round(counts["kept"] / max(1, counts["notes"]), 5),
    }


def main() -> None:
    parser = make_parser(__doc__, "corpora.py nottingham.tar.gz pop909.tar.gz --tokenizations REMI TSD")
    parser.add_argument("corpora", nargs="+", help="folders or archives of MIDI files")
    parser.add_argument("--tokenizations", nargs="+", default=ONE_STREAM, choices=ONE_STREAM, help="(default: all)")
    parser.add_argument("--limit", type=int, help="files per corpus, evenly spread (default: all)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    args = parser.parse_args()
    rows = []
    for corpus in args.corpora:
        entries = sorted((item for item in list_source(corpus) if isinstance(item, Entry)), key=lambda e: e.name)
        step = max(1, len(entries) // args.limit) if args.limit else 1
        contents = [content for _, content in read_entries(entries[::step]) if isinstance(content, bytes)]
        for tokenization in args.tokenizations:
            rows.append(measure(Path(corpus).name, contents, tokenization, args.workers))
            print(json.dumps(rows[-1]), flush=True)
    passed = [value for row in rows for what in ("identical", "same_text", "reloaded") for value in row[what].values()]
    files = [row["files"] for row in rows for _ in range(3 * len(MODELS))]
    finish(
        {
            "benchmark": "corpora",
            "compared": "ids of MidiTok and of the plain tokenizer that AutoTokenizer loads",
            "ratio": sum(passed) / sum(files),
            "rows": rows,
        },
        args.out,
    )


if __name__ == "__main__":
    main()
