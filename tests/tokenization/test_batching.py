"""What users of transformers give to every processor: padding, truncation, and the arguments of loading."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from symusic.core import ScoreTick
from transformers import AutoProcessor

from midimamba import MidiProcessor
from midimamba.errors import InputError
from midimamba.tokenization.batching import Batching
from midimamba.tokenization.controls import control_token
from midimamba.tokenization.tokenizer import build_tokenizer
from support import make_score

ROWS = st.lists(st.lists(st.integers(3, 99), max_size=12), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def processor() -> MidiProcessor:
    return MidiProcessor(build_tokenizer(controls=[control_token("key", "C-major")]))


@pytest.mark.filterwarnings("ignore:.max_length. is ignored:UserWarning")
@settings(deadline=None)
@given(
    rows=ROWS,
    padding=st.sampled_from([True, False, "longest", "max_length", "do_not_pad"]),
    max_length=st.integers(1, 16),
    multiple=st.sampled_from([None, 1, 3, 8]),
    side=st.sampled_from(["left", "right"]),
)
def test_rows_are_padded_as_transformers_pads_them(
    processor: MidiProcessor, rows: list[list[int]], padding: Any, max_length: int, multiple: int | None, side: str
) -> None:
    max_length = max(max_length, *map(len, rows))  # transformers has no rule for rows that are longer
    options = {"padding": padding, "max_length": max_length, "pad_to_multiple_of": multiple, "padding_side": side}
    mine = Batching(**options).pad(rows, processor.pad_token_id, None)
    if padding in (False, "do_not_pad"):
        expected = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    else:
        expected = dict(processor.tokenizer.pad({"input_ids": [list(row) for row in rows]}, **options))
    assert dict(mine) == expected


@given(prefix=st.lists(st.integers(), max_size=3), music=st.lists(st.integers()), room=st.integers(0, 9))
def test_only_music_is_cut(prefix: list[int], music: list[int], room: int) -> None:
    size = max(len(prefix) + room, 1)
    for side, kept in (("right", music[:room]), ("left", music[::-1][:room][::-1])):
        rows = Batching(truncation=True, max_length=size, truncation_side=side)
        if len(prefix) + room == size:
            assert rows.cut(prefix, music) == prefix + kept
        assert Batching(max_length=size).cut(prefix, music) == prefix + music


def test_a_processor_is_called_as_in_transformers(processor: MidiProcessor) -> None:
    pieces, asked = [make_score(1, bars=2), make_score(2, bars=5)], {"key": "C-major"}
    short, long = (processor.encode(piece, controls=asked) for piece in pieces)
    inputs = processor(
        pieces, padding=True, truncation=True, max_length=len(short) + 3, return_tensors="pt", controls=asked
    )
    assert inputs["input_ids"].tolist() == [[0] * 3 + short, long[: len(short) + 3]]
    assert inputs["attention_mask"].tolist() == [[0] * 3 + [1] * len(short), [1] * (len(short) + 3)]
    alone = processor.encode(pieces[0])
    single = processor(pieces[0], padding="max_length", max_length=len(alone) + 1, pad_to_multiple_of=64)
    pads = -(-(len(alone) + 1) // 64) * 64 - len(alone)
    assert single["input_ids"] == [0] * pads + alone
    assert single["attention_mask"] == [0] * pads + [1] * len(alone)
    tail = processor(
        pieces[1],
        truncation="longest_first",
        max_length=10,
        truncation_side="left",
        controls=asked,
        return_tensors="np",
    )
    assert isinstance(tail["input_ids"], np.ndarray)
    assert tail["input_ids"].tolist() == [long[:2] + long[-8:]]
    # Without a longest length there is nothing to cut to.
    assert processor(pieces[0], truncation=True)["input_ids"] == processor.encode(pieces[0])


def test_the_sides_are_those_of_the_text_tokenizer(tmp_path: Path) -> None:
    MidiProcessor(build_tokenizer()).save_pretrained(tmp_path)
    given = {"padding_side": "right", "truncation_side": "left", "model_max_length": 20}
    processor = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=False, **given)
    music = processor.encode(make_score(1, bars=4))
    inputs = processor([make_score(1, bars=4), None], truncation=True, return_tensors="pt")
    assert inputs["input_ids"].tolist() == [music[:1] + music[-19:], [1] + [0] * 19]
    assert inputs["attention_mask"].sum(1).tolist() == [20, 1]


def test_rows_of_several_vocabularies_are_cut_and_padded() -> None:
    processor = MidiProcessor(build_tokenizer("CPWord"))
    music = processor.encode(make_score(1, bars=4))
    inputs = processor(
        [make_score(1, bars=4), None], truncation=True, max_length=9, padding_side="right", return_tensors="pt"
    )
    width = len(processor.vocab_size)  # type: ignore[arg-type]
    assert inputs["input_ids"].tolist() == [music[:9], [[1] * width] + [[0] * width] * 8]
    assert inputs["attention_mask"].tolist() == [[1] * 9, [1] + [0] * 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "widest"}, "padding is 'widest'"),
        ({"truncation": "some"}, "truncation is 'some'"),
        ({"max_length": 0}, "max_length is 0"),
        ({"pad_to_multiple_of": 2.5}, "pad_to_multiple_of is 2.5"),
        ({"padding_side": "top"}, "padding_side is 'top'"),
        ({"truncation": True, "max_length": 1, "controls": {"key": "C-major"}}, "2 tokens come before the music"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    processor: MidiProcessor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        processor(make_score(1, bars=1), **options)


def test_an_unknown_argument_is_named(processor: MidiProcessor) -> None:
    with pytest.raises(TypeError, match="cannot be called with paddingside: leave it out; it takes midi, "):
        processor(make_score(1, bars=1), paddingside="left")


def test_decoding_takes_the_arguments_of_transformers(processor: MidiProcessor) -> None:
    pieces = [make_score(1, bars=2), make_score(2, bars=3)]
    batch = processor(pieces, return_tensors="pt")["input_ids"]
    usual = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    plain: list[ScoreTick] = processor.batch_decode(batch)
    assert [score.dumps_midi() for score in plain] == [
        score.dumps_midi() for score in processor.batch_decode(sequences=batch, **usual)
    ]
    for skip in (True, False):
        score = processor.decode(token_ids=batch[0], skip_special_tokens=skip, clean_up_tokenization_spaces=None)
        assert score.dumps_midi() == plain[0].dumps_midi()


def test_unknown_arguments_of_loading_are_refused(processor: MidiProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    usual: dict[str, Any] = {"trust_remote_code": True, "dtype": torch.float16, "device_map": "auto", "use_fast": True}
    assert type(AutoProcessor.from_pretrained(tmp_path, attn_implementation="eager", **usual)) is MidiProcessor
    for load in (MidiProcessor.from_pretrained, AutoProcessor.from_pretrained):
        with pytest.raises(InputError, match="no argument pading_side: leave it out; it takes cache_dir, "):
            load(tmp_path, pading_side="right")
