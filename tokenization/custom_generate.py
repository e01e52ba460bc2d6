"""`generate` under the grammar. Published with a generator as `custom_generate/generate.py`, where transformers looks.

`model.generate(**inputs, custom_generate="you/bach", trust_remote_code=True)` runs it, and so does plain `generate` of
a model that was loaded with `trust_remote_code=True`. It imports nothing from beside it, because there it is alone in
its folder.
"""

import logging
import re
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoProcessor

logger = logging.getLogger(__name__)


def generate(
    inputs: Tensor | None = None,
    *,
    model: Any,
    logits_processor: Any = None,
    processor: Any = None,
    bars: int | None = None,
    **options: Any,
) -> Any:
    """
    Sample as transformers does, but only what is valid music.

    Args:
        inputs (`LongTensor` of shape `(batch, time)`, *optional*): prompts, also as `input_ids`; by default none.
        model (`PreTrainedModel`): any generator.
        logits_processor (`list`, *optional*): the grammar is put behind them, if there is none among them.
        processor (`MidiProcessor`, *optional*): by default that of the model's repository or folder.
        bars (`int`, *optional*): a piece ends after this many new bars; by default where the model ends it.
        options: as for transformers' `generate`.

    Returns:
        What transformers' `generate` returns.

    Without the packages that the processor needs, it samples without the grammar, and a line says so: a model that was
    loaded with `trust_remote_code=True` comes here even if its user wants no more than tokens.
    """
    plain = partial(type(model).generate, model)
    given = list(logits_processor or ())
    if any(_is_grammar(one) for one in given):
        return plain(inputs, logits_processor=given, **options)
    if processor is None:
        try:
            processor = _processor_of(model.name_or_path)
        except ImportError as error:
            logger.warning("sampled without the grammar, so music is not guaranteed: %s", " ".join(str(error).split()))
            return plain(inputs, logits_processor=given, **options)
    prompt = options.get("input_ids") if inputs is None else inputs
    if prompt is None:
        prompt = inputs = processor(return_tensors="pt")["input_ids"].to(model.device)
    limits = {} if bars is None else {"min_bars": bars, "max_bars": bars}
    return plain(inputs, logits_processor=[*given, processor.grammar(prompt, **limits)], **options)


def _is_grammar(one: Any) -> bool:
    """Whether a logits processor is a grammar, of this package or of any repository's code."""
    return any(kind.__name__ == "MidiGrammar" for kind in type(one).__mro__)


@cache
def _processor_of(name: str) -> Any:
    """The processor beside a model. On the Hub, transformers keeps this file in a folder named like its commit."""
    commit = Path(__file__).resolve().parents[1].name
    revision = commit if re.fullmatch("[0-9a-f]{40}", commit) else None
    return AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=True)


__all__ = ["generate"]
