"""The judges of a round: the discriminators whose log-odds reward samples, and how far they can be trusted."""

import math
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import ProcessorMixin

from midimamba.errors import InputError
from midimamba.evaluation.judges import (
    Ensemble,
    MusicalJudge,
    NothingToCompareError,
    TokenJudge,
    auc,
    calibrate,
    calibration_error,
    fit_musical,
)
from midimamba.evaluation.samples import decode_all
from midimamba.modeling.modeling_discriminator import MidiDiscriminator
from midimamba.modeling.modeling_musical_discriminator import MusicalDiscriminator
from midimamba.modeling.sampling import Ending, Sequences
from midimamba.text import show
from midimamba.tokenization.processor import MidiProcessor
from midimamba.training.metrics import Measures

MUSICAL_FOLDER = "musical_discriminator"
"""Of a checkpoint."""


SIGNIFICANT = 1.645
"""Standard deviations above chance: one time in twenty, a discriminator that knows nothing is that good."""


def chance_deviation(real: int, fake: int) -> float:
    """The standard deviation of the AUC of values that say nothing (Mann-Whitney), from the sizes of both sets."""
    return math.sqrt((real + fake + 1) / (12 * real * fake))


class Judges:
    """
    The discriminator of tokens and, if there is a processor to decode them, one of musical features.

    All processes of a run judge alike: they put their sequences together.

    Args:
        discriminator (`MidiDiscriminator`): without the wrappers of distributed training.
        accelerator (`Accelerator`): the trainer's.
        held_out (`LongTensor` of shape `(n, time)`): music that nothing is trained on.
        ending (`Ending`): sequences are judged up to their end, and without the token that ends them.
        prompt_length (`int`): tokens at the start of every sequence that were given, in which nothing ends.
        processor (`ProcessorMixin`, *optional*): a [`MidiProcessor`], which adds the discriminator of musical
            features.

    Attributes:
        seen (`tuple[Tensor, Tensor]`, *optional*): music and samples of the last step of the discriminator. The one
            of musical features is fitted to them when it is needed, and not after every step.

    Raises:
        ValueError: if the processor is another.
    """

    def __init__(
        self,
        discriminator: MidiDiscriminator,
        accelerator: Accelerator,
        held_out: Tensor,
        ending: Ending,
        prompt_length: int,
        processor: ProcessorMixin | None = None,
    ):
        if not isinstance(processor, MidiProcessor | None):
            raise ValueError(f"a {type(processor).__name__} cannot decode music for a musical discriminator")
        # Where nothing ends, nothing is padding, and every token is music.
        padding = None if ending.eos_token_id is None else ending.pad_token_id
        self.token = TokenJudge(discriminator, padding, ending.eos_token_id)
        self.accelerator = accelerator
        self.ending = ending
        self.prompt_length = prompt_length
        self.held_out = self._rows(held_out)
        self.processor = processor
        self.musical: MusicalJudge | None = None
        self.seen: tuple[Tensor, Tensor] | None = None

    @property
    def all(self) -> list[TokenJudge | MusicalJudge]:
        """Those that there are by now."""
        return [self.token] if self.musical is None else [self.token, self.musical]

    def forget_calibration(self) -> None:
        """Before the discriminator of tokens learns: it must not learn through a scale of zero."""
        self.token.discriminator.calibration.set(1.0, 0.0)

    def learn(self, real: Tensor, fake: Tensor) -> None:
        """Fit a new discriminator of musical features on music and samples `(n, time)` of this process.

        The last one stays where too few of them hold notes.

        Raises:
            InputError: if there is no last one.
        """
        if self.processor is None:
            return
        real_scores, fake_scores = (
            decode_all(self.processor, self._rows(self.accelerator.gather(ids))).scores for ids in (real, fake)
        )
        try:
            self.musical = MusicalJudge(fit_musical(real_scores, fake_scores), self.processor)
        except ValueError as error:
            if self.musical is None:
                raise InputError(
                    f"musical_discriminator: {error}; raise per_device_train_batch_size, or train the generator "
                    "longer first"
                ) from error

    def calibrate(self, fake: Sequences) -> Measures:
        """
        Calibrate the judges together, on held-out music and on samples that they have not seen.

        Judges that do not tell them apart better than chance get a scale of 0: their reward is then the same for all.
        So do judges for which no sample, or no held-out piece, is music.

        Returns:
            `d_auc` and `d_calibration_error`, on the same music and samples, and `d_refused`, whether it was refused.
        """
        if self.seen is not None:
            self.learn(*self.seen)
            self.seen = None
        samples = self._rows(self.accelerator.gather(fake.ids))
        refusal = ""
        try:
            calibrate(self.all, self.held_out, samples)
        except NothingToCompareError as error:
            refusal = str(error)
        ensemble = Ensemble(self.all)
        real, drawn = ensemble.log_odds(self.held_out), ensemble.log_odds(samples)
        measures = {"d_auc": auc(real, drawn), "d_calibration_error": calibration_error(real, drawn)}
        if not refusal and measures["d_auc"] <= 0.5 + SIGNIFICANT * chance_deviation(len(real), len(drawn)):
            refusal = (
                f"the discriminator does not tell {len(real)} held-out pieces from {len(drawn)} samples better than "
                f"by chance (AUC {measures['d_auc']:.2f})"
            )
        if refusal:
            for judge in self.all:
                judge.discriminator.calibration.set(0.0, 0.0)
            if self.accelerator.is_main_process:
                show(f"the discriminators are ignored: {refusal}", file=sys.stderr)
        return {**measures, "d_refused": float(bool(refusal))}

    def log_odds(self, sequences: Sequences) -> Tensor:
        """What all judges together say of sequences: log-odds `(n,)` that they are real, on their device."""
        return Ensemble(self.all).log_odds(self._rows(sequences.ids)).to(sequences.ids.device, torch.float32)

    def save(self, folder: Path) -> None:
        """Add the discriminator of musical features to a checkpoint."""
        if self.musical is not None:
            self.musical.discriminator.save_pretrained(folder / MUSICAL_FOLDER)

    def load(self, folder: Path) -> None:
        """Read what [`~Judges.save`] wrote."""
        if self.processor is not None and (folder / MUSICAL_FOLDER).is_dir():
            discriminator = MusicalDiscriminator.from_pretrained(folder / MUSICAL_FOLDER)
            self.musical = MusicalJudge(discriminator, self.processor)

    def _rows(self, ids: Tensor) -> list[list[int]]:
        """Sequences up to their ends, as lists."""
        lengths = self.ending.mask(ids, self.prompt_length).sum(1).tolist()
        return [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
