"""The discriminator that hears musical features of a whole piece, such as how exactly its bars repeat."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from .calibration import Calibration
from .configuration_musical_discriminator import MusicalDiscriminatorConfig
from .whole_weights import WholeWeights

_FAR = 5.0  # standard deviations: one stray feature must not outweigh all others


class MusicalDiscriminator(WholeWeights):
    """
    Logistic regression on musical features; `sigmoid(logit)` is the probability that a piece is real.

    It takes features and not tokens, so it knows no vocabulary: one judge serves every tokenization of its music.
    [`~midimamba.evaluation.judges.MusicalJudge`] computes the features of token sequences, and
    [`~midimamba.evaluation.judges.fit_musical`] fits one. Loads with `AutoModelForSequenceClassification` once
    `midimamba` is imported.
    """

    config_class = MusicalDiscriminatorConfig
    config: MusicalDiscriminatorConfig
    _own_weights = ("center", "spread", "score.", "calibration.")
    base_model_prefix = "score"
    main_input_name = "features"
    center: Tensor
    spread: Tensor

    def __init__(self, config: MusicalDiscriminatorConfig):
        super().__init__(config)
        self.register_buffer("center", torch.zeros(config.num_columns))
        self.register_buffer("spread", torch.ones(config.num_columns))
        self.score = nn.Linear(config.num_columns * (2 if config.squares else 1), 1)
        self.calibration = Calibration()
        self.post_init()

    def standardize(self, features: Tensor) -> Tensor:
        """
        What the linear layer takes: standard deviations from the mean, at most 5; a missing feature counts as average.

        Args:
            features (`Tensor` of shape `(batch, columns)`): NaN where a piece has no such feature.

        Returns:
            `Tensor` of shape `(batch, columns)`, or twice the columns with `squares`.
        """
        features = features.to(self.center)
        standard = ((features - self.center) / self.spread).clamp(-_FAR, _FAR).nan_to_num(nan=0.0)
        if self.config.squares:
            # A missing feature is 0 in both halves; the square of any other has mean 0 over the real pieces.
            squares = torch.where(features.isnan(), torch.zeros_like(standard), standard.square() - 1)
            standard = torch.cat([standard, squares], dim=1)
        return standard

    @can_return_tuple
    def forward(self, features: Tensor, labels: Tensor | None = None, **kwargs: Any) -> SequenceClassifierOutput:
        """
        Args:
            features (`Tensor` of shape `(batch, columns)`): the features of `config.feature_names`, side by side; NaN
                where a piece has none.
            labels (`Tensor` of shape `(batch,)`, *optional*): 1 for real, 0 for generated. The loss is the
                cross-entropy.

        Returns:
            `SequenceClassifierOutput`: with `logits` of shape `(batch, 1)`, the log-odds that a piece is real.

        Raises:
            ValueError: if there are more or fewer columns than features.
        """
        if features.dim() != 2 or features.shape[1] != self.config.num_columns:
            raise ValueError(
                f"features have shape {tuple(features.shape)}, but the discriminator takes (batch, "
                f"{self.config.num_columns})"
            )
        logits = self.calibration(self.score(self.standardize(features)))
        loss = None
        if labels is not None:
            loss = F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype))
        return SequenceClassifierOutput(loss=loss, logits=logits)


__all__ = ["MusicalDiscriminator"]
