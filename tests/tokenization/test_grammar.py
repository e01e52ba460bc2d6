import copy
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import pytest
import torch
from miditok import MusicTokenizer
from symusic.core import ScoreTick
from transformers import LogitsProcessorList, MambaConfig, MambaForCausalLM

from midimamba.errors import InputError
from midimamba.tokenization.controls import control_token
from midimamba.tokenization.grammar import MAX_SILENT_TOKENS, MidiGrammar
from midimamba.tokenization.grammar_tables import SUPPORTED
from midimamba.tokenization.processor import MidiProcessor
from midimamba.tokenization.tokenizer import base_ids, build_tokenizer, expand_ids, merge_ids, train_tokenizer
from support import make_score

PAD, BOS, EOS = 0, 1, 2
CONTROL_TOKENS = [control_token(*pair) for pair in (("key", "C-major"), ("instruments", "drums"), ("bars", "1-8"))]
# In REMI: the fewest base tokens from each type to a complete note.
TO_NOTE = {
    "Bar": 5,
    "TimeSig": 4,
    "Position": 3,
    "Tempo": 3,
    "Program": 3,
    "Pitch": 2,
    "PitchDrum": 2,
    "Velocity": 1,
}
NEXT = {
    None: {"Bar"},
    "Bar": {"TimeSig"},
    "TimeSig": {"Bar", "Position"},
    "Position": {"Tempo", "Program", "Pitch", "PitchDrum"},
    "Tempo": {"Bar", "Position", "Program", "Pitch", "PitchDrum"},
    "Program": {"Pitch", "PitchDrum"},
    "Pitch": {"Velocity"},
    "PitchDrum": {"Velocity"},
    "Velocity": {"Duration"},
    "Duration": {"Bar", "Position", "Program", "Pitch", "PitchDrum"},
}


class Reader:
    """The rules of REMI once more, read token by token and slowly."""

    def __init__(
        self,
        max_empty_bars: int = 2,
        max_notes: int = 32,
        programs: Collection[int] = range(-1, 128),
        bars: int | None = None,
        voices: int = 32,
    ) -> None:
        self.max_empty_bars, self.max_notes, self.programs, self.exact_bars = max_empty_bars, max_notes, programs, bars
        self.voices = voices
        self.last: str | None = None
        self.position, self.limit, self.program = -1, 48, 0
        self.silence = self.empty = self.bars = self.notes = 0
        self.onset: set[tuple[int, int]] = set()  # (program, pitch)
        self.held = False

    def continue_prompt(self) -> None:
        """What was read is a prompt."""
        self.held, self.bars = True, 0

    def read(self, tokens: list[str]) -> bool:
        """Whether `tokens` may follow what was read before."""
        return all(self._read(*token.split("_")) for token in tokens) and self._in_time()

    def may_end(self) -> bool:
        """Whether the end may follow."""
        return self.last == "Duration" and not self.held and self.exact_bars in (None, self.bars)

    def _in_time(self) -> bool:
        assert self.last is not None
        if self.last == "Duration":
            return True
        to_note = TO_NOTE[self.last]
        if self.program not in self.programs and self.last not in ("Pitch", "PitchDrum", "Velocity"):
            to_note += 1  # a program
        return self.silence + to_note <= MAX_SILENT_TOKENS

    def _read(self, kind: str, value: str) -> bool:
        if kind not in NEXT[self.last]:
            return False
        self.last = kind
        self.silence += 1
        if kind in ("Bar", "Position"):
            self.onset, self.held = set(), False
        if kind == "Bar":
            self.position = -1
            self.bars += 1
            self.empty += 1
            return self.empty <= self.max_empty_bars + 1 and (self.exact_bars is None or self.bars <= self.exact_bars)
        if kind == "TimeSig":
            self.limit = int(value.split("/")[0]) * 12
        if kind == "Program":
            self.program = int(value)
            return self._is_room() and self.program in self.programs
        if kind in ("Pitch", "PitchDrum"):
            note = (self.program, int(value))
            fits = self._is_room() and self.program in self.programs and note not in self.onset
            self.onset.add(note)
            return fits and (self.program == -1) == (kind == "PitchDrum")
        if kind == "Position":
            before, self.position = self.position, int(value)
            return before < self.position < self.limit
        if kind == "Duration":
            in_time = self.silence <= MAX_SILENT_TOKENS
            self.silence = self.empty = 0
            self.notes += 1
            return in_time
        return True

    def _is_room(self) -> bool:
        pitched = sum(program != -1 for program, _ in self.onset)
        has_voice = self.program == -1 or pitched < self.voices
        return not self.held and has_voice and len(self.onset) < self.max_notes


def read(tokenizer: MusicTokenizer, ids: Sequence[int], **options: Any) -> Reader:
    reader = Reader(**options)
    for index in ids:
        assert reader.read(expand(tokenizer, index)), (index, ids)
    return reader


# The tokenizer is kept beside its tokens, or another could get its `id`.
_EXPANDED: dict[int, tuple[MusicTokenizer, list[list[str]]]] = {}


def expand(tokenizer: MusicTokenizer, index: int) -> list[str]:
    if id(tokenizer) not in _EXPANDED:
        tokens = [tokenizer._ids_to_tokens(expand_ids(tokenizer, [i])) for i in range(tokenizer.vocab_size)]
        _EXPANDED[id(tokenizer)] = tokenizer, tokens
    return _EXPANDED[id(tokenizer)][1][index]


@pytest.fixture(scope="module", params=["untrained", "BPE", "Unigram"])
def tokenizer(request: pytest.FixtureRequest, scores: list[ScoreTick]) -> MusicTokenizer:
    tokenizer = build_tokenizer()
    if request.param != "untrained":
        train_tokenizer(tokenizer, scores, 1000, request.param)
    return tokenizer


@pytest.fixture(scope="module", params=["untrained", "BPE", "Unigram"])
def tsd(request: pytest.FixtureRequest, scores: list[ScoreTick]) -> MusicTokenizer:
    tokenizer = build_tokenizer("TSD")
    if request.param != "untrained":
        train_tokenizer(tokenizer, scores, 1000, request.param)
    return tokenizer


def sample(
    tokenizer: MusicTokenizer,
    grammar: MidiGrammar,
    preference: torch.Tensor,
    rows: int,
    steps: int,
    seed: int = 0,
    prefix: Sequence[int] = (BOS,),
) -> list[list[int]]:
    """Sample rows of ids from random logits plus `preference` of shape (vocab,), as `generate` would."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([prefix]).repeat(rows, 1)
    for _ in range(steps):
        scores = torch.randn(rows, len(preference), generator=generator) + preference
        scores = grammar(ids, scores)
        assert (scores > -torch.inf).any(dim=1).all()
        chosen = torch.multinomial(scores.softmax(dim=1), 1, generator=generator)
        done = (ids == EOS).any(dim=1, keepdim=True)
        ids = torch.cat([ids, chosen.masked_fill(done, PAD)], dim=1)
    assert not ((ids[:, 1:] == BOS).any())
    assert not (((ids == PAD) & ~(ids == EOS).cumsum(dim=1).bool()).any())
    return [[index for index in row if index > EOS] for row in ids.tolist()]


def prefer(tokenizer: MusicTokenizer, kind: str) -> torch.Tensor:
    firsts = [expand(tokenizer, index)[0].split("_")[0] for index in range(tokenizer.vocab_size)]
    return torch.tensor([60.0 if first == kind else 0.0 for first in firsts])


def assert_judged_slowly(
    tokenizer: MusicTokenizer, grammar: MidiGrammar, prompt: Sequence[int], row: Sequence[int], **rules: Any
) -> None:
    """Every id is allowed after `prompt` and `row` exactly if the slow reader would read its tokens."""
    judged = grammar(torch.tensor([[BOS, *prompt, *row]]), torch.zeros(1, tokenizer.vocab_size))[0] > -torch.inf
    reader = read(tokenizer, prompt, **rules)
    if prompt:
        reader.continue_prompt()
    for index in row:
        assert reader.read(expand(tokenizer, index))
    for index in range(EOS + 1, tokenizer.vocab_size):
        expected = copy.deepcopy(reader).read(expand(tokenizer, index))
        assert bool(judged[index]) == expected, (row, expand(tokenizer, index))
    assert not judged[PAD]
    assert not judged[BOS]
    assert bool(judged[EOS]) == reader.may_end()


def test_every_id_is_judged_as_if_its_tokens_were_read(tokenizer: MusicTokenizer) -> None:
    grammar = MidiGrammar(tokenizer)
    for row in sample(tokenizer, grammar, torch.zeros(tokenizer.vocab_size), rows=4, steps=25):
        for length in range(0, len(row) + 1, 3):
            assert_judged_slowly(tokenizer, grammar, [], row[:length])


@pytest.mark.parametrize("kind", ["none", "Pitch", "PitchDrum", "Program", "Duration", "Bar"])
def test_ids_are_judged_one_by_one_under_all_rules(tokenizer: MusicTokenizer, kind: str) -> None:
    rules: dict[str, Any] = {"max_notes": 3, "programs": {-1, 40, 73}, "max_empty_bars": 1, "voices": 2}
    grammar = MidiGrammar(tokenizer, **rules, min_bars=2, max_bars=2)
    for row in sample(tokenizer, grammar, prefer(tokenizer, kind), rows=2, steps=24, seed=2):
        for length in range(len(row) + 1):
            assert_judged_slowly(tokenizer, grammar, [], row[:length], **rules, bars=2)


def test_ids_are_judged_one_by_one_after_a_prompt(tokenizer: MusicTokenizer, scores: list[ScoreTick]) -> None:
    prompt = merge_ids(tokenizer, base_ids(tokenizer, make_score(3, bars=2, programs=(0, 40), drums=False)))
    grammar = MidiGrammar(tokenizer, programs=[73], max_bars=2, min_bars=2, prompt_length=len(prompt) + 1)
    preference = torch.zeros(tokenizer.vocab_size)
    for row in sample(tokenizer, grammar, preference, rows=3, steps=20, prefix=[BOS, *prompt]):
        for length in range(0, len(row) - len(prompt) + 1, 2):
            new = row[len(prompt) :][:length]
            assert_judged_slowly(tokenizer, grammar, prompt, new, programs={0, 40}, bars=2)


def test_real_music_is_always_allowed(tokenizer: MusicTokenizer, tsd: MusicTokenizer, scores: list[ScoreTick]) -> None:
    for score in scores[:4]:
        assert_allowed(tokenizer, score)
        assert_allowed(tsd, score)


def test_real_music_of_structured_is_always_allowed(scores: list[ScoreTick]) -> None:
    tokenizer = build_tokenizer("Structured")
    train_tokenizer(tokenizer, scores[:20], len(tokenizer.vocab) + 400)
    for score in scores[:4]:
        assert_allowed(tokenizer, score)


def assert_allowed(tokenizer: MusicTokenizer, score: ScoreTick) -> None:
    """The grammar lets a model write `score`, id by id, and end there, with no more voices than `score` has."""
    notes = Counter(n.time for track in score.tracks if not track.is_drum for n in track.notes)
    ids = [BOS, *merge_ids(tokenizer, base_ids(tokenizer, score)), EOS]
    prefixes = torch.zeros(len(ids) - 1, len(ids) - 1, dtype=torch.long)
    for length in range(1, len(ids)):
        prefixes[length - 1, -length:] = torch.tensor(ids[:length])
    grammar = MidiGrammar(tokenizer, voices=max(notes.values(), default=None))
    judged = grammar(prefixes, torch.zeros(len(prefixes), tokenizer.vocab_size))
    assert (judged[torch.arange(len(prefixes)), torch.tensor(ids[1:])] == 0).all()


def test_uniform_samples_are_valid_music(tokenizer: MusicTokenizer) -> None:
    processor = MidiProcessor(tokenizer)
    rows = sample(tokenizer, processor.grammar(), torch.zeros(tokenizer.vocab_size), rows=150, steps=30)
    for row in rows:
        assert read(tokenizer, row).notes > 0
        assert processor.decode(row).note_num() > 0


@pytest.mark.parametrize("kind", [*sorted(TO_NOTE), "Duration", "EOS"])
def test_a_note_comes_within_16_tokens_whatever_the_model_prefers(tokenizer: MusicTokenizer, kind: str) -> None:
    processor = MidiProcessor(tokenizer)
    rows = sample(tokenizer, processor.grammar(), prefer(tokenizer, kind), rows=30, steps=MAX_SILENT_TOKENS)
    for row in rows:
        read(tokenizer, row)
        assert processor.decode(row).note_num() > 0


@pytest.mark.parametrize("kind", ["TimeShift", "TimeSig", "Tempo", "Program", "Pitch", "EOS", "none"])
def test_tsd_samples_also_hold_notes(tsd: MusicTokenizer, kind: str) -> None:
    processor = MidiProcessor(tsd)
    rows = sample(tsd, processor.grammar(), prefer(tsd, kind), rows=30, steps=MAX_SILENT_TOKENS)
    assert all(processor.decode(row).note_num() > 0 for row in rows)


@pytest.mark.parametrize("kind", ["Pitch", "PitchDrum", "Duration", "TimeShift_0.0.1", "none"])
@pytest.mark.parametrize("model", ["untrained", "BPE"])
@pytest.mark.parametrize("name", SUPPORTED)
def test_no_onset_has_a_note_twice_or_too_many_or_a_foreign_program(
    name: str, model: str, kind: str, scores: list[ScoreTick]
) -> None:
    tokenizer = build_tokenizer(name, drums_pitch_range=(60, 61))
    if model != "untrained":
        train_tokenizer(tokenizer, scores, len(tokenizer.vocab) + 200, model)
    processor = MidiProcessor(tokenizer, programs=[-1, 40])
    preference = prefer(tokenizer, kind)
    if "_" in kind and kind in tokenizer.vocab:
        preference[tokenizer.vocab[kind]] = 60.0
    for row in sample(tokenizer, processor.grammar(max_notes=4, voices=2), preference, rows=20, steps=60):
        score = processor.decode(row)
        found = [(track.is_drum, track.program, n.time, n.pitch) for track in score.tracks for n in track.notes]
        assert len(set(found)) == len(found) > 0
        assert {-1 if is_drum else program for is_drum, program, _, _ in found} <= {-1, 40}
        assert max(Counter(time for _, _, time, _ in found).values()) <= 4
        assert max(Counter(time for is_drum, _, time, _ in found if not is_drum).values(), default=0) <= 2


def test_reordered_cut_and_other_batches_are_judged_as_if_read_from_the_start(tokenizer: MusicTokenizer) -> None:
    size = tokenizer.vocab_size
    options: dict[str, Any] = {"prompt_length": 5, "max_bars": 3}
    rows = sample(tokenizer, MidiGrammar(tokenizer), torch.zeros(size), rows=6, steps=24, seed=4)
    rows = [row for row in rows if len(row) == 24] or [[*rows[0]]]
    ids = torch.tensor([[BOS, *row] for row in rows])
    generator = torch.Generator().manual_seed(0)
    grammar = MidiGrammar(tokenizer, **options)
    for length in [5, 6, 7, 9, 10, 10, 12, 20, 6, 7]:
        order = torch.randint(len(ids), (1 + length % 7,), generator=generator)
        prefixes = ids[order, :length]
        logits = torch.randn(len(order), size, generator=generator)
        assert torch.equal(grammar(prefixes, logits), MidiGrammar(tokenizer, **options)(prefixes, logits))


@pytest.mark.parametrize("max_empty_bars", [0, 1, 4])
def test_empty_bars_are_limited(tokenizer: MusicTokenizer, max_empty_bars: int) -> None:
    grammar = MidiGrammar(tokenizer, max_empty_bars=max_empty_bars)
    for row in sample(tokenizer, grammar, prefer(tokenizer, "Bar"), rows=20, steps=60):
        read(tokenizer, row, max_empty_bars=max_empty_bars)


@pytest.mark.parametrize("kind", ["Bar", "Position", "Pitch", "Tempo", "none"])
@pytest.mark.parametrize("max_bars", [1, 3])
def test_samples_have_no_more_bars_than_asked(tokenizer: MusicTokenizer, kind: str, max_bars: int) -> None:
    processor = MidiProcessor(tokenizer)
    grammar = processor.grammar(max_bars=max_bars)
    for row in sample(tokenizer, grammar, prefer(tokenizer, kind), rows=20, steps=40):
        reader = read(tokenizer, row)
        assert 1 <= reader.bars <= max_bars
        assert processor.decode(row).note_num() > 0


def test_a_model_that_wants_another_bar_ends_instead(tokenizer: MusicTokenizer) -> None:
    grammar = MidiGrammar(tokenizer, max_bars=2)
    size = tokenizer.vocab_size
    bar = [tokenizer.vocab[token] for token in ("Bar_None", "TimeSig_4/4")]
    note = [tokenizer.vocab[token] for token in ("Position_0", "Pitch_60", "Velocity_63", "Duration_1.0.12")]
    logits = torch.randn(1, size)
    one = grammar(torch.tensor([[BOS, *bar, *note]]), logits).softmax(dim=1)
    two = grammar(torch.tensor([[BOS, *bar, *note, *bar, *note]]), logits).softmax(dim=1)
    bars = prefer(tokenizer, "Bar") > 0
    assert two[0, bars].sum() == 0
    # Whatever the first row gives to bars, the second gives to the end; everything else stays.
    torch.testing.assert_close(two[0, EOS], one[0, EOS] + one[0, bars].sum())
    others = ~bars
    others[EOS] = False
    torch.testing.assert_close(two[0, others], one[0, others])


def test_padding_bos_and_order_of_rows_change_nothing(tokenizer: MusicTokenizer) -> None:
    grammar = MidiGrammar(tokenizer, max_bars=4)
    size = tokenizer.vocab_size
    rows = sample(tokenizer, grammar, torch.zeros(size), rows=8, steps=20)
    rows = [row[:length] for row, length in zip(rows, range(0, 16, 2), strict=True)]
    alone = torch.cat([grammar(torch.tensor([row], dtype=torch.long), torch.zeros(1, size)) for row in rows])
    padded = torch.tensor([[PAD] * (20 - len(row)) + [BOS, *row] for row in rows])
    assert torch.equal(grammar(padded, torch.zeros(8, size)), alone)
    order = torch.randperm(8)
    assert torch.equal(grammar(padded[order], torch.zeros(8, size)), alone[order])
    # A block of packed pieces: what came before the last begin is forgotten.
    packed = torch.tensor([[*rows[7], EOS, BOS, *rows[5]]])
    assert torch.equal(grammar(packed, torch.zeros(1, size)), alone[5:6])


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("trained", [False, True])
def test_controls_are_never_sampled_and_change_nothing(name: str, trained: bool, scores: list[ScoreTick]) -> None:
    shift = len(CONTROL_TOKENS)
    tokenizers = [build_tokenizer(name, controls=tokens) for tokens in ([], CONTROL_TOKENS)]
    if trained:
        for tokenizer in tokenizers:  # byte-pair encoding learns the same ids but for the shift
            train_tokenizer(tokenizer, scores, len(tokenizer.vocab) + 200)
    size = tokenizers[0].vocab_size
    options: dict[str, Any] = {"max_bars": 3} if name == "REMI" else {}
    plain, controlled = (MidiGrammar(tokenizer, **options) for tokenizer in tokenizers)
    for row in sample(tokenizers[0], plain, torch.zeros(size), rows=6, steps=20):
        for length in range(0, len(row) + 1, 2):
            logits = torch.randn(1, size)
            expected = plain(torch.tensor([[BOS, *row[:length]]]), logits)
            music = [index + shift for index in row[:length]]
            shifted = torch.cat([logits[:, :3], torch.full((1, shift), 50.0), logits[:, 3:]], dim=1)
            middle = length // 2
            within = [BOS, *music[:middle], 4, *music[middle:]]
            before = [[*prefix, *music] for prefix in ([BOS], [BOS, 3, 5], [PAD, BOS, 3, 4, 5], [3])]
            for ids in (*before, within):
                judged = controlled(torch.tensor([ids]), shifted)
                assert torch.isinf(judged[:, 3 : 3 + shift]).all()
                assert torch.equal(torch.cat([judged[:, :3], judged[:, 3 + shift :]], dim=1), expected)


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("model", ["untrained", "BPE", "Unigram"])
def test_uniform_samples_after_controls_are_valid_music(name: str, model: str, scores: list[ScoreTick]) -> None:
    tokenizer = build_tokenizer(name, controls=CONTROL_TOKENS)
    if model != "untrained":
        train_tokenizer(tokenizer, scores, len(tokenizer.vocab) + 200, model)
    processor = MidiProcessor(tokenizer)
    prefix = processor.encode(None, controls={"key": "C-major", "bars": "1-8"})
    assert prefix == [BOS, 3, 5]
    preference = torch.zeros(tokenizer.vocab_size)
    preference[3:6] = 50.0  # a model that would only write controls
    for row in sample(tokenizer, processor.grammar(), preference, rows=40, steps=MAX_SILENT_TOKENS, prefix=prefix):
        assert row[:2] == [3, 5]
        assert not {3, 4, 5} & set(row[2:])
        if name == "REMI":
            assert read(tokenizer, row[2:]).notes > 0
        assert processor.decode(row).note_num() > 0


def test_a_prompt_that_was_silent_too_long_gets_a_note_at_once(tokenizer: MusicTokenizer) -> None:
    bar = [tokenizer.vocab["Bar_None"], tokenizer.vocab["TimeSig_4/4"]]
    ids = torch.tensor([[BOS, *bar * 20]])
    for kind in ("Position", "Pitch", "Velocity", "Duration"):
        allowed = MidiGrammar(tokenizer)(ids, torch.zeros(1, tokenizer.vocab_size))[0] > -torch.inf
        # With merges one id may hold several of the tokens, but never a way round.
        chosen = int(allowed.nonzero()[0])
        token = expand(tokenizer, chosen)[0]
        assert token.split("_")[0] == kind
        ids = torch.cat([ids, torch.tensor([[tokenizer.vocab[token]]])], dim=1)


def test_columns_beyond_the_vocabulary_are_forbidden_and_scores_left_alone(tokenizer: MusicTokenizer) -> None:
    size = tokenizer.vocab_size
    scores = torch.randn(2, size + 24)
    before = scores.clone()
    judged = MidiGrammar(tokenizer, max_bars=1)(torch.empty(2, 0, dtype=torch.long), scores)
    assert torch.equal(scores, before)
    assert torch.isinf(judged[:, size:]).all()
    kept = ~torch.isinf(judged)
    assert torch.equal(judged[kept], scores[kept])


def test_generate_with_a_padded_batch_and_with_beams(scores: list[ScoreTick]) -> None:
    processor = MidiProcessor(build_tokenizer())
    torch.manual_seed(0)
    size = processor.midi_tokenizer.vocab_size
    config = MambaConfig(vocab_size=size, hidden_size=8, num_hidden_layers=1, state_size=4, pad_token_id=PAD)
    model = MambaForCausalLM(config).eval()
    inputs = processor([scores[0], scores[1]], return_tensors="pt")
    prompt = {key: value[:, :30] for key, value in inputs.items()}
    strategies: list[dict[str, Any]] = [{"do_sample": True}, {"num_beams": 3}]
    for options in strategies:
        ids = model.generate(
            **prompt,
            **options,
            max_new_tokens=25,
            eos_token_id=EOS,
            logits_processor=LogitsProcessorList([processor.grammar()]),
        )
        assert isinstance(ids, torch.Tensor)
        for row in ids.tolist():
            read(processor.midi_tokenizer, [index for index in row if index > EOS])


@pytest.mark.parametrize("name", ["MIDILike", "PerTok", "MMM", "BEAT", "CPWord", "Octuple", "MuMIDI"])
def test_other_tokenizations_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"supports REMI, TSD, Structured, not {name}"):
        MidiProcessor(build_tokenizer(name)).grammar()


@pytest.mark.parametrize(
    "options",
    [
        {"use_chords": True},
        {"use_rests": True},
        {"use_key_signatures": True},
        {"use_sustain_pedals": True},
        {"use_pitch_bends": True},
        {"use_control_changes": True},
        {"use_pitchdrum_tokens": False},
        {"use_note_duration_programs": [0]},
        {"programs": [0, 1]},
    ],
)
def test_options_that_break_its_rules_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        MidiGrammar(build_tokenizer("TSD", **options))


@pytest.mark.parametrize("model", ["BPE", "Unigram"])
@pytest.mark.parametrize(
    "options",
    [
        {"beat_res": {(0, 16): 6}, "use_velocities": False},
        {"program_changes": False},
        {"num_velocities": 4, "use_tempos": False, "use_time_signatures": False},
        {"pitch_range": (40, 80), "drums_pitch_range": (50, 60), "log_tempos": False, "encode_ids_split": "no"},
    ],
)
def test_options_that_keep_its_rules_are_honoured(
    model: str, options: dict[str, Any], scores: list[ScoreTick]
) -> None:
    for name in SUPPORTED:
        if name == "Structured" and "use_tempos" in options:
            continue  # it has none to turn off
        tokenizer = build_tokenizer(name, **options)
        train_tokenizer(tokenizer, scores, len(tokenizer.vocab) + 100, model)
        processor = MidiProcessor(tokenizer)
        for kind in ("Bar", "TimeShift", "Program", "EOS"):
            rows = sample(tokenizer, processor.grammar(), prefer(tokenizer, kind), rows=10, steps=MAX_SILENT_TOKENS)
            assert all(processor.decode(row).note_num() > 0 for row in rows)
        assert_allowed(tokenizer, scores[0])


@pytest.mark.parametrize("model", ["untrained", "BPE", "Unigram"])
@pytest.mark.parametrize("kind", ["TimeShift", "Program", "Pitch", "PitchDrum", "Velocity", "Duration", "EOS"])
def test_structured_samples_repeat_the_five_tokens_of_a_note(kind: str, model: str, scores: list[ScoreTick]) -> None:
    tokenizer = build_tokenizer("Structured")
    if model != "untrained":
        train_tokenizer(tokenizer, scores, len(tokenizer.vocab) + 200, model)
    processor = MidiProcessor(tokenizer)
    for row in sample(tokenizer, processor.grammar(), prefer(tokenizer, kind), rows=20, steps=MAX_SILENT_TOKENS):
        tokens = [token.split("_") for index in row for token in expand(tokenizer, index)]
        for first in range(0, len(tokens) - 4, 5):
            shift, (program, number), (pitch, _), velocity, duration = tokens[first : first + 5]
            assert (shift[0], program, velocity[0], duration[0]) == ("TimeShift", "Program", "Velocity", "Duration")
            assert pitch == ("PitchDrum" if number == "-1" else "Pitch")
        assert len(tokens) >= 5
        assert processor.decode(row).note_num() == len(tokens) // 5
    assert_allowed(tokenizer, scores[0])


def test_max_bars_needs_bars() -> None:
    with pytest.raises(ValueError, match="bars"):
        MidiGrammar(build_tokenizer("TSD"), max_bars=4)
    with pytest.raises(ValueError, match="at least 1"):
        MidiGrammar(build_tokenizer(), max_bars=0)
