"""The judges of a round: what they say is what rewards, and a judge that knows nothing rewards nothing."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from midimamba import MidiProcessor
from midimamba.errors import InputError
from midimamba.evaluation.judges import Ensemble, auc
from midimamba.modeling.sampling import Ending, Sequences
from midimamba.training.action_values import ActionValues
from midimamba.training.discriminator_update import DiscriminatorUpdate
from midimamba.training.guarded_trainer import CALIBRATED_ON
from midimamba.training.judging import Judges, chance_deviation
from midimamba.training.rewards import Reward
from support import make_discriminator, make_generator, make_score
from trainer_support import LENGTH, make_blocks, make_trainer

ENDING = Ending(2, 0)
DISCRIMINATOR = make_discriminator()


def music(low: int, high: int, count: int = 40, seed: int = 0) -> Tensor:
    return torch.randint(low, high, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


def judges_of(discriminator: Any, held_out: Tensor, ending: Ending = ENDING, prompt: int = 1) -> Judges:
    return Judges(discriminator, Accelerator(cpu=True), held_out, ending, prompt)


def whole(ids: Tensor, ending: Ending = ENDING, prompt: int = 1) -> Sequences:
    return Sequences(ids, ending.mask(ids, prompt))


@pytest.mark.parametrize("kind", ["cnn", "mamba"])
@pytest.mark.parametrize("prompt", [1, 4])
@pytest.mark.parametrize("bars", [None, 2])
@pytest.mark.parametrize("padding", [0, 2], ids=["padding", "ends as padding"])
def test_what_is_calibrated_is_what_rewards(kind: str, prompt: int, bars: int | None, padding: int) -> None:
    """The same music, up to its end and without it. Ends in prompts end nothing, and bars end for both."""
    ending = Ending(2, padding, bars, (7, 8))
    ids = music(1, 11)
    ids[:, 0] = 3  # nothing ends or pads at once
    assert (ids[:, 1:4] == 2).any()
    discriminator = make_discriminator(kind)
    heard = []
    for row in ids.tolist():
        ends = [place for place, token in enumerate(row) if token == 2 and place >= prompt] + [len(row)]
        begun = [place for place, token in enumerate(row) if token in (7, 8)] if bars else []
        row = row[: min(ends[0], *begun[bars : bars + 1] if bars else begun, len(row))]
        while row[-1] == 2:  # a prompt may end in ends
            row = row[:-1]
        heard.append(row)
    assert len({len(row) for row in heard}) > 2
    judges = judges_of(discriminator, ids, ending, prompt)
    for _ in range(2):  # before and after calibration
        with torch.no_grad():
            expected = torch.cat([discriminator(torch.tensor([row])).logits[:, 0] for row in heard])
        for kind_of_reward in ("log-odds", "shuffled"):
            found = Reward(kind_of_reward, discriminator, judges.log_odds).of_whole(whole(ids, ending, prompt), 16)
            if kind_of_reward == "shuffled":
                expected, found = expected.sort().values, found.sort().values
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        found = Ensemble(judges.all).log_odds(judges.held_out).float()
        torch.testing.assert_close(found.sort().values, expected, atol=1e-5, rtol=1e-4)
        judges.calibrate(whole(music(3, 9, seed=3), ending, prompt))


def test_a_judge_that_is_wrong_gets_scale_zero_and_rewards_all_alike() -> None:
    """It prefers samples to held-out music, as one that learned its music by heart may."""
    discriminator = make_discriminator()
    pool = music(3, 11, 400)
    with torch.no_grad():
        order = discriminator(pool).logits[:, 0].argsort()
    held_out, samples = pool[order[:200]], pool[order[200:]]
    judges = judges_of(discriminator, held_out)
    measures = judges.calibrate(whole(samples))
    assert discriminator.calibration.scale.item() == 0
    assert measures["d_auc"] == 0.5
    assert float(measures["d_calibration_error"]) == pytest.approx(0, abs=0.02)
    reward = Reward("log-odds", discriminator, judges.log_odds)
    rewards = reward.of_whole(whole(samples), 64)
    assert (rewards == rewards[0]).all()
    # It may learn again: nothing would pass through a scale of zero.
    judges.forget_calibration()
    assert (discriminator.calibration.scale.item(), discriminator.calibration.offset.item()) == (1, 0)


def test_a_judge_that_is_right_by_chance_rewards_nothing_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Held-out music is preferred by a hair, which two random sets would often show."""
    discriminator = make_discriminator()
    pool = music(3, 11, 400)
    with torch.no_grad():
        order = discriminator(pool).logits[:, 0].argsort()
    samples = pool[order[0::2]]
    measures = judges_of(discriminator, pool[order[1::2]]).calibrate(whole(samples))
    assert 0.5 < measures["d_auc"] < 0.5 + 1.645 * chance_deviation(200, 200)
    assert measures["d_refused"] == 1.0
    assert "does not tell 200 held-out pieces from 200 samples better than by chance" in capsys.readouterr().err
    rewards = Reward("log-odds", discriminator).of_whole(whole(samples), 64)
    assert (rewards == rewards[0]).all()


def test_the_deviation_of_chance_is_that_of_permutations() -> None:
    numbers = torch.rand(4000, 12 + 7, generator=torch.Generator().manual_seed(0))
    found = torch.tensor([auc(row[:12], row[12:]) for row in numbers])
    assert found.std().item() == pytest.approx(chance_deviation(12, 7), rel=0.05)


def test_a_judge_that_tells_them_apart_is_trusted_as_far_as_it_is_right() -> None:
    """Twice too sure of itself: calibration halves it."""
    discriminator = make_discriminator()
    pool = music(3, 11, 6000)
    with torch.no_grad():
        logits = discriminator(pool).logits[:, 0]
        unit = logits.std()
        discriminator.calibration.set(float(2 / unit), float(-2 * logits.mean() / unit))
        log_odds = discriminator(pool).logits[:, 0] / 2
    torch.manual_seed(0)
    is_real = torch.rand(len(pool)) < log_odds.sigmoid()
    judges = judges_of(discriminator, pool[is_real])
    before = discriminator.calibration.scale.item()
    measures = judges.calibrate(whole(pool[~is_real]))
    assert discriminator.calibration.scale.item() / before == pytest.approx(0.5, rel=0.1)
    assert float(measures["d_auc"]) > 0.65
    assert float(measures["d_calibration_error"]) < 0.03


@given(st.integers(1, 30), st.integers(0, 99))
def test_shuffled_rewards_are_the_log_odds_dealt_out(count: int, seed: int) -> None:
    discriminator = DISCRIMINATOR
    ids = music(3, 11, count, seed)
    judged = discriminator(ids).logits[:, 0].detach() + torch.linspace(0, 1, count)
    kinds = (Reward(kind, discriminator, lambda _: judged) for kind in ("log-odds", "shuffled"))
    plain, shuffled = (reward.of_whole(whole(ids), 8) for reward in kinds)
    torch.testing.assert_close(shuffled.sort().values, plain.sort().values)
    torch.testing.assert_close(plain, judged)


def test_shuffled_rewards_are_dealt_out_again_in_every_round() -> None:
    reward = Reward("shuffled", make_discriminator())
    ids = music(3, 11, 20)
    dealt = [tuple(reward.of_whole(whole(ids), 8).tolist()) for _ in range(5)]
    assert len(set(dealt)) == 5


@pytest.mark.parametrize("estimator", ["terminal", "distill"])
@pytest.mark.parametrize("reward", ["log-odds", "shuffled"])
def test_calibration_is_forgotten_before_the_discriminator_learns_and_fitted_before_it_rewards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimator: str, reward: str
) -> None:
    trainer = make_trainer(tmp_path, estimator=estimator, reward=reward, per_device_train_batch_size=16)
    calibration = trainer.judges.token.discriminator.calibration
    seen: list[tuple[str, float, float]] = []

    def watch(owner: type, method: str, name: str) -> None:
        function = getattr(owner, method)

        def called(*arguments: Any) -> Any:
            result = function(*arguments)
            seen.append((name, calibration.scale.item(), calibration.offset.item()))
            return result

        monkeypatch.setattr(owner, method, called)

    watch(DiscriminatorUpdate, "__call__", "learn")
    watch(Judges, "calibrate", "calibrate")
    watch(ActionValues, "__call__", "reward")
    trainer.train()
    assert [name for name, *_ in seen[:2]] == ["learn"] * 2  # the warm-up
    a_round = ["learn", "calibrate", "reward"]
    assert [name for name, *_ in seen[2:]] == a_round * 3
    assert all((scale, offset) == (1, 0) for name, scale, offset in seen if name == "learn")
    assert all((scale, offset) != (1, 0) for name, scale, offset in seen if name == "calibrate")
    assert all(one[1:] == other[1:] for one, other in zip(seen[3::3], seen[4::3], strict=True))
    assert all(scale >= 0 for _, scale, _ in seen)


def test_discriminators_are_fitted_to_the_generator_that_a_run_ends_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, estimator="distill", reward="log-odds", per_device_train_batch_size=16)
    trainer.train()
    drawn: list[Tensor] = []
    learned: list[Tensor] = []
    calibrated: list[Tensor] = []
    sample, learn, calibrate = trainer.sample, DiscriminatorUpdate.__call__, Judges.calibrate

    def watched_sample(prompts: Tensor) -> Tensor:
        drawn.append(sample(prompts))
        return drawn[-1]

    def watched_learn(self: DiscriminatorUpdate, real: Tensor, fake: Tensor) -> Any:
        learned.append(fake)
        return learn(self, real, fake)

    def watched_calibrate(self: Judges, fake: Sequences) -> Any:
        calibrated.append(fake.ids)
        return calibrate(self, fake)

    monkeypatch.setattr(trainer, "sample", watched_sample)
    monkeypatch.setattr(DiscriminatorUpdate, "__call__", watched_learn)
    monkeypatch.setattr(Judges, "calibrate", watched_calibrate)
    discriminator = trainer.judges.token.discriminator
    before = copy.deepcopy(discriminator.state_dict())
    generator = copy.deepcopy(trainer.generator.state_dict())
    trainer.fit_to_result()
    assert len(learned) == trainer.args.d_steps
    assert len(calibrated) == 1
    assert all(one is other for one, other in zip(drawn, [*learned, *calibrated], strict=True))
    assert len(calibrated[0]) == CALIBRATED_ON
    assert all(torch.equal(value, generator[name]) for name, value in trainer.generator.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in discriminator.state_dict().items())
    # What a resumed run would draw.
    trainer.fit_to_result()
    assert torch.equal(drawn[0], drawn[len(drawn) // 2])


def test_without_a_round_only_discriminators_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"estimator": "distill", "reward": "log-odds", "max_steps": 0}
    trainer = make_trainer(tmp_path, d_warmup_steps=2, d_steps=3, per_device_train_batch_size=16, **options)
    learned = 0
    learn = DiscriminatorUpdate.__call__

    def watched_learn(self: DiscriminatorUpdate, real: Tensor, fake: Tensor) -> Any:
        nonlocal learned
        learned += 1
        return learn(self, real, fake)

    monkeypatch.setattr(DiscriminatorUpdate, "__call__", watched_learn)
    generator = copy.deepcopy(trainer.generator.state_dict())
    trainer.train()
    assert learned == 0
    trainer.fit_to_result()
    assert learned == 2 + 3
    assert all(torch.equal(value, generator[name]) for name, value in trainer.generator.state_dict().items())
    calibration = trainer.judges.token.discriminator.calibration
    assert (calibration.scale.item(), calibration.offset.item()) != (1, 0)


@pytest.mark.parametrize("options", [{"estimator": "dense", "reward": "log-odds"}, {"reward": "constant"}])
def test_nothing_is_calibrated_where_log_odds_do_not_reward(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, "mamba", **options)
    trainer.train()
    calibration = trainer.judges.token.discriminator.calibration
    trainer.fit_to_result()
    assert (calibration.scale.item(), calibration.offset.item()) == (1, 0)
    assert "d_auc" not in trainer.state.log_history[0]


def test_a_discriminator_that_learned_nothing_leaves_the_generator_alone(tmp_path: Path) -> None:
    """Scale 0 gives equal rewards, and the baseline takes them away exactly."""
    trainer = make_trainer(tmp_path, estimator="terminal", reward="log-odds", mle_weight=0.0, max_steps=1)
    with torch.no_grad():
        trainer.judges.token.discriminator.score.weight.zero_()
    trainer.discriminator_update.optimizer.param_groups[0]["lr"] = 0.0
    trainer.train()
    assert trainer.state.log_history[0]["advantage_std"] == 0
    assert trainer.state.log_history[0]["d_auc"] == 0.5


# ---- with a discriminator of musical features ----


@pytest.fixture(scope="module")
def pieces(processor: MidiProcessor) -> tuple[Tensor, Tensor]:
    """Long notes and many, and a single short note: easy to tell apart by ear. `(12, time)` each, padded."""
    ends = [processor.eos_token_id]
    rows = [[*processor.encode(make_score(seed, bars=2)), *ends] for seed in range(12)]
    rows += [[*processor.encode(make_score(seed, bars=1, programs=(0,), drums=False)), *ends] for seed in range(12)]
    longest = max(map(len, rows))
    padded = torch.tensor([row + [processor.pad_token_id] * (longest - len(row)) for row in rows])
    return padded[:12], padded[12:]


def musical_judges(processor: MidiProcessor, held_out: Tensor) -> Judges:
    discriminator = make_discriminator(vocab_size=processor.vocab_size)
    ending = Ending(processor.eos_token_id, processor.pad_token_id)
    return Judges(discriminator, Accelerator(cpu=True), held_out, ending, 1, processor)


def test_a_musical_judge_is_fitted_calibrated_added_saved_and_loaded(
    processor: MidiProcessor, pieces: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    real, fake = pieces
    ending = Ending(processor.eos_token_id, processor.pad_token_id)
    judges = musical_judges(processor, real[8:])
    judges.save(tmp_path)
    assert not list(tmp_path.iterdir())  # there is none yet
    tokens_alone = judges.token.log_odds(judges._rows(real)).float()
    torch.testing.assert_close(judges.log_odds(whole(real, ending)), tokens_alone)
    judges.learn(real[:8], fake[:8])
    measures = judges.calibrate(whole(fake[8:], ending))
    assert measures["d_auc"] == 1.0
    assert judges.musical is not None
    reward = Reward("log-odds", judges.token.discriminator, judges.log_odds)
    ids = torch.cat([real[8:], fake[8:]])
    rewards = reward.of_whole(whole(ids, ending), 4)
    assert rewards.dtype == torch.float32
    rows = judges._rows(ids)
    expected = (judges.token.log_odds(rows) + judges.musical.log_odds(rows)).float()
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=1e-4)
    assert rewards[:4].min() > rewards[4:].max()
    judges.save(tmp_path)
    other = musical_judges(processor, real[8:])
    other.load(tmp_path)
    assert other.musical is not None
    assert torch.equal(other.musical.log_odds(rows), judges.musical.log_odds(rows))


def test_too_few_samples_that_are_music_are_one_clear_line_or_leave_the_judge_as_it_was(
    processor: MidiProcessor, pieces: tuple[Tensor, Tensor]
) -> None:
    real, fake = pieces
    silent = torch.full_like(fake, processor.eos_token_id)
    silent[:, 0] = processor.bos_token_id
    judges = musical_judges(processor, real[8:])
    with pytest.raises(InputError, match=r"4 different real pieces and 0 samples .* raise per_device_train"):
        judges.learn(real[:4], silent[:4])
    judges.learn(real[:8], fake[:8])
    fitted = judges.musical
    judges.learn(real[:8], silent[:8])
    assert judges.musical is fitted


@pytest.mark.parametrize("silent", ["samples", "held-out music", "both"])
def test_a_round_in_which_nothing_is_music_is_refused_and_does_not_end_the_run(
    silent: str, processor: MidiProcessor, pieces: tuple[Tensor, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    real, fake = pieces
    nothing = torch.full_like(fake, processor.eos_token_id)
    nothing[:, 0] = processor.bos_token_id
    held_out, samples = (
        nothing if silent in (kind, "both") else ids for kind, ids in (("held-out music", real), ("samples", fake))
    )
    ending = Ending(processor.eos_token_id, processor.pad_token_id)
    judges = musical_judges(processor, held_out)
    judges.seen = real[:8], fake[:8]
    measures = judges.calibrate(whole(samples, ending))
    assert measures["d_refused"] == 1.0
    what = "samples" if silent == "samples" else "pieces of real music"
    assert capsys.readouterr().err.splitlines() == [
        f"the discriminators are ignored: none of 12 {what} is music, so there is nothing to compare"
    ]
    assert judges.musical is not None
    for judge in judges.all:
        assert judge.discriminator.calibration.scale.item() == 0
    rewards = judges.log_odds(whole(samples, ending))
    assert (rewards == rewards[0]).all()
    # The next round is judged as ever.
    judges.forget_calibration()
    judges.held_out = judges._rows(real[8:])
    judges.seen = real[:8], fake[:8]
    assert judges.calibrate(whole(fake[8:], ending)) | {"d_calibration_error": 0} == {
        "d_auc": 1.0,
        "d_calibration_error": 0,
        "d_refused": 0.0,
    }


def test_another_processor_cannot_serve_a_musical_judge() -> None:
    from transformers import WhisperProcessor

    class Other(WhisperProcessor):
        def __init__(self) -> None:
            pass

    with pytest.raises(ValueError, match="a Other cannot decode music"):
        Judges(
            make_discriminator(), Accelerator(cpu=True), torch.tensor(make_blocks(8)["input_ids"]), ENDING, 1, Other()
        )


def test_judges_see_samples_up_to_their_end(tmp_path: Path) -> None:
    """What a generator pads after its end is not judged."""
    trainer = make_trainer(tmp_path, generator=make_generator(), estimator="terminal", reward="log-odds")
    ids = music(3, 11, 6)
    ids[:, 4] = 2
    others = ids.clone()
    others[:, 5:] = 9
    values = [trainer.action_values(whole(rows, trainer.ending, 2)) for rows in (ids, others)]
    torch.testing.assert_close(*values, atol=1e-6, rtol=1e-5)
    assert trainer.judges._rows(ids) == trainer.judges._rows(others)
