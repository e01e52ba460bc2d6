"""The rule of `midimamba train`: what follows from corpus, time and speed, and that it is never impossible."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midimamba.training.plan import (
    EPOCHS,
    SHORTEST,
    SIZES,
    Facts,
    Limits,
    Speed,
    choose_size,
    context_of,
    make_plan,
    options_of,
    pace_of,
    tokens_read,
    transposes,
)

PARAMETERS = dict(zip(SIZES, (500_000, 2_600_000, 20_000_000, 160_000_000), strict=True))


def facts(tokens: int = 700_000, held_out: int = 70_000, typical: int = 4000, **others: bool) -> Facts:
    return Facts(160, tokens, held_out, typical, **{"has_bars": True, "tells_drums": True} | others)


def chosen(limits: Limits, rate: float, corpus: Facts) -> tuple[str, list[str]]:
    """The size for a machine that does `rate` parameters times tokens per second, and the sizes it measured."""
    measured = []

    def speed_of(size: str) -> Speed:
        measured.append(size)
        return Speed(PARAMETERS[size], PARAMETERS[size] / rate)

    return choose_size(SIZES, corpus, limits, speed_of)[0], measured


def test_more_time_and_more_speed_make_a_larger_model_and_it_reads_enough_tokens() -> None:
    cores, gpu = 4e9, 1e13
    assert chosen(Limits(seconds=60), cores, facts()) == ("tiny", ["tiny"])  # what is too large is not measured
    sizes = [chosen(Limits(seconds=seconds), cores, facts())[0] for seconds in (60, 600, 6000, 60_000, 600_000)]
    assert sizes == sorted(sizes, key=SIZES.index)
    assert sizes[0] == "tiny"
    assert sizes[-1] != "tiny"
    assert chosen(Limits(seconds=600), gpu, facts(tokens=50_000_000))[0] in ("medium", "large")
    # However fast the machine is, few pieces are not read for ever, nor do they fill a large model.
    assert chosen(Limits(seconds=600), gpu, facts(tokens=50_000))[0] == "tiny"


def test_new_keys_need_tokens_that_tell_drums_and_time_that_they_are_worth() -> None:
    speed = Speed(500_000, 1e-4)  # an epoch takes 70 seconds
    assert transposes(facts(), Limits(seconds=600, new_keys=10), speed)
    assert not transposes(facts(tells_drums=False), Limits(seconds=600, new_keys=10), speed)
    assert not transposes(facts(), Limits(seconds=30, new_keys=10), speed)  # a third of the time
    assert transposes(facts(), Limits(seconds=400, new_keys=100), speed)  # two epochs
    assert not transposes(facts(), Limits(seconds=300, new_keys=100), speed)
    assert tokens_read(facts(), Limits(seconds=1e9), speed) == EPOCHS[True] * 700_000
    assert tokens_read(facts(tells_drums=False), Limits(seconds=1e9), speed) == EPOCHS[False] * 700_000


@pytest.mark.parametrize(
    ("corpus", "length"),
    [
        (facts(typical=4000), 1024),
        (facts(typical=300), 256),
        (facts(typical=20), 256),
        (facts(tokens=900, held_out=400), 64),  # eight blocks to train on
        (facts(held_out=100), 64),  # one block to measure on
        (facts(held_out=0), 1024),
        (facts(tokens=40, held_out=0), SHORTEST),
    ],
)
def test_a_context_is_a_piece_as_far_as_both_splits_hold_one(corpus: Facts, length: int) -> None:
    assert context_of(corpus) == length


def test_a_batch_holds_two_contexts_unless_the_user_wants_longer_ones() -> None:
    speed, brief, long = Speed(500_000, 1e-4), Limits(seconds=60), Limits(seconds=6000)
    assert make_plan("tiny", 1024, facts(), brief, speed).length == 512
    assert make_plan("tiny", 1024, facts(), long, speed).length == 1024
    assert make_plan("tiny", 1024, facts(), brief, speed, shortest=1024).length == 1024
    assert make_plan("tiny", 64, facts(), brief, speed).length == 64


def test_repeated_pieces_get_more_weight_decay_and_wider_models_a_smaller_rate() -> None:
    once = make_plan("tiny", 256, facts(), Limits(seconds=60), Speed(500_000, 1e-4))
    often = make_plan("tiny", 256, facts(tokens=20_000), Limits(seconds=60), Speed(500_000, 1e-4))
    assert once.epochs < 1 < 8 < often.epochs
    decays = [options_of(plan, facts(), 128)["weight_decay"] for plan in (once, often)]
    assert decays[0] < decays[1]
    rates = [options_of(once, facts(), width)["learning_rate"] for width in (128, 256, 512)]
    assert rates == sorted(rates, reverse=True)


def test_a_machine_that_becomes_faster_reads_more_but_no_piece_too_often() -> None:
    speed = Speed(500_000, 1e-4)
    long = make_plan("tiny", 256, facts(), Limits(seconds=600), speed)
    assert long.most_steps == 3 * long.steps
    short = make_plan("tiny", 256, facts(tokens=20_000), Limits(seconds=600), speed)
    assert short.most_steps == short.steps == round(EPOCHS[True] * 20_000 / (short.batch * 256))


def test_without_a_deadline_the_steps_are_those_that_were_given() -> None:
    plan = make_plan("tiny", 256, facts(), Limits(steps=500), Speed(500_000, 1e-4))
    assert options_of(plan, facts(), 128)["max_steps"] == 500
    pace = pace_of(500, plan.rows, plan.evaluates, deadline=False)
    assert pace["eval_steps"] == pace["save_steps"] == 32
    assert pace_of(500, 4, evaluates=False, deadline=True)["eval_strategy"] == "no"


@given(
    st.builds(
        facts,
        tokens=st.integers(SHORTEST, 10**10),
        held_out=st.integers(0, 10**9),
        typical=st.integers(1, 10**6),
        has_bars=st.booleans(),
        tells_drums=st.booleans(),
    ),
    st.floats(0, 10**6),
    st.floats(1e-8, 1),
    st.floats(0, 10**4),
    st.integers(1, 1000),
)
def test_a_plan_is_possible_and_fits_its_time(
    corpus: Facts, seconds: float, per_token: float, new_keys: float, rows: int
) -> None:
    limits, speed = Limits(seconds=seconds, new_keys=new_keys), Speed(500_000, per_token, rows)
    length = context_of(corpus)
    plan = make_plan("tiny", length, corpus, limits, speed)
    assert plan.length <= corpus.tokens
    assert not plan.evaluates or plan.length <= corpus.held_out
    assert 1 <= plan.rows <= min(plan.batch, rows)
    assert plan.batch % plan.rows == 0
    assert plan.steps >= 1
    step = plan.batch * plan.length * per_token
    assert plan.steps * step <= seconds + step
    assert plan.epochs <= EPOCHS[plan.transposes] + plan.batch * plan.length / corpus.tokens
