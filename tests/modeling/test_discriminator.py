"""Both discriminators: shapes, padding, causality, learning, and loading through the Auto class."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification

from midimamba import MidiDiscriminator, MidiDiscriminatorConfig
from midimamba.modeling.modeling_discriminator import ConvolutionEncoder
from midimamba.modeling.modeling_midimamba import MidiMambaModel
from support import make_discriminator, make_generator

KINDS = ["cnn", "mamba"]


def tokens(batch: int = 4, time: int = 12) -> torch.Tensor:
    return torch.randint(1, 11, (batch, time), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_loads_with_the_auto_class(kind: str, tmp_path: Path) -> None:
    discriminator = make_discriminator(kind)
    discriminator.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is MidiDiscriminator
    assert torch.equal(loaded(tokens()).logits, discriminator(tokens()).logits)
    assert loaded(tokens()).logits.shape == (4, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [1, 30])
def test_padding_changes_nothing(kind: str, padding: int) -> None:
    discriminator = make_discriminator(kind)
    ids = tokens()
    padded = torch.cat([ids, torch.full((4, padding), 3)], 1)  # not the pad token: the mask alone must do
    mask = torch.cat([torch.ones_like(ids), torch.zeros(4, padding, dtype=torch.long)], 1)
    torch.testing.assert_close(discriminator(padded, attention_mask=mask).logits, discriminator(ids).logits)


def test_a_sequence_shorter_than_the_widest_filter_is_valued() -> None:
    assert make_discriminator("cnn")(tokens(2, 1)).logits.isfinite().all()


def test_the_causal_one_values_every_prefix_in_one_pass() -> None:
    discriminator = make_discriminator("mamba")
    ids = tokens()
    values = discriminator(ids).position_logits
    for t in range(ids.shape[1]):
        torch.testing.assert_close(values[:, t : t + 1], discriminator(ids[:, : t + 1]).logits, atol=1e-5, rtol=0)


def test_the_causal_one_continues_from_a_forked_state() -> None:
    """Two completions of each prefix: what follows is valued as in a pass over the whole sequence."""
    discriminator = make_discriminator("mamba")
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        whole = torch.cat([tokens(2, 5).repeat_interleave(2, 0), tokens(4, 7)], 1)
        cache = discriminator.make_cache(2)
        discriminator(whole[::2, :5], past_key_values=cache)
        continued = discriminator(whole[:, 5:], past_key_values=cache.fork(2))
        expected = discriminator(whole)
    assert expected.logits.std() > 0.01
    torch.testing.assert_close(continued.logits, expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(continued.position_logits, expected.position_logits[:, 5:], atol=1e-5, rtol=0)


def test_begins_with_the_network_of_the_generator() -> None:
    generator = make_generator(state_size=8, expand=3, conv_kernel=3)
    discriminator = MidiDiscriminator.from_generator(generator, dropout=0.5)
    assert (discriminator.config.kind, discriminator.config.dropout) == ("mamba", 0.5)
    expected = generator.backbone(tokens()).last_hidden_state
    assert isinstance(discriminator.encoder, MidiMambaModel)
    torch.testing.assert_close(discriminator.encoder(tokens()).last_hidden_state, expected)
    # A copy: training one leaves the other as it is.
    with torch.no_grad():
        for weight in discriminator.get_input_embeddings().parameters():
            weight.zero_()
    torch.testing.assert_close(generator.backbone(tokens()).last_hidden_state, expected)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'silu', but this one has 'gelu'"),
        ({"layout": "mamba-mlp"}, "layout 'mamba', but this one has 'mamba-mlp'"),
        ({"time_step_rank": 5}, "time_step_rank 1, but this one has 5"),
    ],
)
def test_does_not_begin_as_a_generator_of_another_kind(shape: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MidiDiscriminator.from_generator(make_generator(**shape))


def test_the_convolutions_have_no_state() -> None:
    with pytest.raises(ValueError, match="'cnn' has no state"):
        make_discriminator("cnn").make_cache(2)
    with pytest.raises(ValueError, match="leave past_key_values out"):
        make_discriminator("cnn")(tokens(), past_key_values=make_discriminator("mamba").make_cache(4))


def test_features_are_the_largest_rectified_activations() -> None:
    """Against the definition: every window of every filter, rectified, and those on padding left out."""
    encoder = make_discriminator("cnn").encoder
    assert isinstance(encoder, ConvolutionEncoder)
    ids, lengths = tokens(), [12, 7, 5, 3]
    mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).float()
    expected = []
    for row, length in zip(ids, lengths, strict=True):
        pooled = []
        for width, convolution in zip(encoder.widths, encoder.convolutions, strict=True):
            assert isinstance(convolution, nn.Conv1d)
            assert convolution.bias is not None
            flat = convolution.weight.transpose(1, 2).flatten(1)
            windows = [row[start : start + width] for start in range(length - width + 1)]
            values = [flat @ encoder.embeddings(window).flatten() + convolution.bias for window in windows]
            pooled.append(torch.stack([*values, torch.zeros(len(flat))]).relu().amax(0))
        expected.append(torch.cat(pooled))
    seen: list[torch.Tensor] = []
    encoder.highway.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    encoder(ids, mask)
    torch.testing.assert_close(seen[0], torch.stack(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_learns_to_tell_two_languages_apart(kind: str) -> None:
    torch.manual_seed(0)
    discriminator = make_discriminator(kind).train()
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-2)
    labels = torch.tensor([1.0, 0.0]).repeat(16)
    for _ in range(80):
        ids = torch.randint(1, 11, (32, 12))
        ids[::2, 5:7] = torch.tensor([3, 4])  # real sequences hold the pair 3 4 here
        optimizer.zero_grad()
        discriminator(ids, labels=labels).loss.backward()
        optimizer.step()
    accuracy = ((discriminator.eval()(ids).logits[:, 0] > 0) == (labels > 0.5)).float().mean()
    assert accuracy > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_with_spectral_norm_no_layer_stretches(kind: str, tmp_path: Path) -> None:
    discriminator = make_discriminator(kind, spectral_norm=True).train()
    with torch.no_grad():
        for _ in range(200):  # power iteration, a step each forward pass in training
            discriminator(tokens(1, 5))
    layers = [module for module in discriminator.eval().modules() if hasattr(module, "parametrizations")]
    assert len(layers) == {"cnn": 3 + 1 + 1, "mamba": 2 * 4 + 1}[kind]
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1.0, abs=1e-3)
    discriminator.save_pretrained(tmp_path)
    loaded = MidiDiscriminator.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tokens()).logits, discriminator(tokens()).logits)
    loaded(tokens(), labels=torch.ones(4)).loss.backward()
    assert all(p.grad is not None for p in loaded.score.parameters())


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(StrictDataclassError, match="use 'cnn' or 'mamba'"):
        MidiDiscriminatorConfig(kind="forest")
    with pytest.raises(StrictDataclassError, match="2 filter_sizes need as many num_filters, not 1"):
        MidiDiscriminatorConfig(filter_sizes=[2, 3], num_filters=[8])


LOOK_BACK: dict[str, Any] = {"lookback_bars": [1, 2], "bar_token_ids": [1], "position_token_ids": [[2, 0], [3, 4]]}


def bars(count: int, time: int = 20) -> torch.Tensor:
    """Sequences of bars of four tokens and a bar line."""
    ids = torch.randint(4, 11, (count, time))
    ids[:, ::5] = 1
    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_with_look_back_it_hears_form(kind: str) -> None:
    """Real sequences repeat a random bar. Without look-back the same networks learn little from as many steps."""

    def accuracy(**options: Any) -> float:
        torch.manual_seed(0)
        discriminator = make_discriminator(kind, dropout=0.0, **options).train()
        optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-2)
        labels = torch.tensor([1.0, 0.0]).repeat(32)
        for _ in range(60):
            ids = bars(64)
            ids[::2, 5:10] = ids[::2, :5]
            optimizer.zero_grad()
            discriminator(ids, labels=labels).loss.backward()
            optimizer.step()
        ids = bars(512)
        ids[::2, 5:10] = ids[::2, :5]
        return float(((discriminator.eval()(ids).logits[:, 0] > 0) == (labels.repeat(8) > 0.5)).float().mean())

    assert accuracy() < 0.75
    assert accuracy(**LOOK_BACK) > 0.9


def test_with_look_back_it_continues_from_a_forked_state() -> None:
    discriminator = make_discriminator("mamba", **LOOK_BACK)
    whole = torch.cat([bars(2, 12).repeat_interleave(2, 0), bars(4, 10)[:, 1:]], 1)
    with torch.no_grad():
        cache = discriminator.make_cache(2)
        discriminator(whole[::2, :12], past_key_values=cache)
        continued = discriminator(whole[:, 12:], past_key_values=cache.fork(2))
        expected = discriminator(whole)
    assert expected.logits.std() > 1e-4
    torch.testing.assert_close(continued.logits, expected.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_look_back_and_calibration_are_saved(kind: str, tmp_path: Path) -> None:
    discriminator = make_discriminator(kind, **LOOK_BACK)
    before = discriminator(tokens()).logits
    discriminator.calibration.set(0.5, -1.5)
    torch.testing.assert_close(discriminator(tokens()).logits, 0.5 * before - 1.5)
    discriminator.save_pretrained(tmp_path)
    loaded = MidiDiscriminator.from_pretrained(tmp_path)
    ids = bars(4)
    assert torch.equal(loaded(ids).logits, discriminator(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_without_calibration_is_read(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    discriminator = make_discriminator(kind)
    discriminator.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {name: value for name, value in load_file(file).items() if "calibration" not in name}
    save_file(weights, file, metadata={"format": "pt"})
    loaded = MidiDiscriminator.from_pretrained(tmp_path)
    assert "calibration" not in caplog.text
    assert torch.equal(loaded(tokens()).logits, discriminator(tokens()).logits)
