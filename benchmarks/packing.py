"""Tokens lost to training: our packed blocks against MidiTok's `split_files_for_training` and `DatasetMIDI`.

MidiTok cuts files into chunks of about one block of tokens each, and drops the tokens of a chunk beyond the block. The
last line is JSON: `ratio` is their lost share over ours.
"""

import tempfile
from pathlib import Path

from datasets import Dataset
from miditok.pytorch_data import DatasetMIDI
from miditok.utils import split_files_for_training

from measure import finish, make_parser
from midimamba.corpus.entries import Entry
from midimamba.corpus.packing import PackedBlocks
from midimamba.corpus.sources import list_source, read_entries
from midimamba.tokenization.ingest import read_score
from midimamba.tokenization.tokenizer import base_ids, build_tokenizer, merge_ids, train_on_ids


def main() -> None:
    parser = make_parser(__doc__, "packing.py my-midi-folder --block-size 512")
    parser.add_argument("source", help="folder or archive of MIDI files")
    parser.add_argument("--limit", type=int, default=200, help="number of files (default: %(default)s)")
    parser.add_argument("--block-size", type=int, default=512, help="tokens per block (default: %(default)s)")
    parser.add_argument(
        "--vocab-size", type=int, default=1000, help="vocabulary of byte-pair encoding (default: %(default)s)"
    )
    args = parser.parse_args()

    entries = [item for item in list_source(args.source) if isinstance(item, Entry)][: args.limit]
    tokenizer = build_tokenizer("REMI")
    with tempfile.TemporaryDirectory() as scratch:
        paths, scores = [], []
        for index, (_, content) in enumerate(read_entries(entries)):
            if not isinstance(content, bytes):
                raise content
            scores.append(read_score(content))
            paths.append(Path(scratch) / f"{index:05}.mid")
            scores[-1].dump_midi(paths[-1])
        bases = [base_ids(tokenizer, score) for score in scores]
        train_on_ids(tokenizer, bases, args.vocab_size)
        pieces = [[1, *merge_ids(tokenizer, base), 2] for base in bases]
        blocks = PackedBlocks(Dataset.from_dict({"input_ids": pieces}), args.block_size)

        chunks = split_files_for_training(
            files_paths=paths,
            tokenizer=tokenizer,
            save_dir=Path(scratch, "chunks"),
            max_seq_len=args.block_size,
            num_overlap_bars=0,
        )
        theirs = DatasetMIDI(chunks, tokenizer, max_seq_len=args.block_size, bos_token_id=1, eos_token_id=2)
        kept = sum(len(theirs[index]["input_ids"]) for index in range(len(theirs)))
        whole = sum(len(tokenizer.encode(chunk).ids) + 2 for chunk in chunks)

    ours = 1 - len(blocks) * args.block_size / blocks.num_ids
    lost = 1 - kept / whole
    finish(
        {
            "benchmark": "packing",
            "compared": "MidiTok's split_files_for_training and DatasetMIDI",
            "ratio": round(lost / ours, 1) if ours else None,
            "our_lost_share": round(ours, 5),
            "their_lost_share": round(lost, 5),
            "their_padded_share": round(1 - kept / (len(chunks) * args.block_size), 5),
            "sizes": {"files": len(paths), "tokens": blocks.num_ids, "block_size": args.block_size},
        },
        args.out,
    )


if __name__ == "__main__":
    main()
