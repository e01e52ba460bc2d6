"""midimamba: Mamba language models for MIDI, pre-trained, tuned adversarially, at home on the Hub.

Importing the package registers its classes with transformers' Auto classes, and the pipeline "midi-generation"; stock
classes keep doing what they did.
"""

import os
from typing import Any

# Read when torch is imported. Its threads spin between two operations, and hold the core that another process, or a
# kernel of ours, wants: small operations took up to 50 times as long on a busy machine, and our scan twice as long on
# an idle one. After fewer turns they sleep, which costs nothing measurable.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from midimamba.modeling.configuration_discriminator import MidiDiscriminatorConfig
from midimamba.modeling.configuration_midimamba import MidiMambaConfig
from midimamba.modeling.modeling_discriminator import MidiDiscriminator
from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM
from midimamba.modeling.pipeline_midi_generation import MidiGenerationPipeline
from midimamba.modeling.recurrent_cache import CacheMismatchError, RecurrentCache
from midimamba.tokenization.processor import MidiProcessor

__version__ = "0.1.0"

AutoConfig.register(MidiMambaConfig.model_type, MidiMambaConfig, exist_ok=True)
AutoConfig.register(MidiDiscriminatorConfig.model_type, MidiDiscriminatorConfig, exist_ok=True)
AutoModelForCausalLM.register(MidiMambaConfig, MidiMambaForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(MidiDiscriminatorConfig, MidiDiscriminator, exist_ok=True)
AutoProcessor.register(MidiMambaConfig, MidiProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline("midi-generation", MidiGenerationPipeline, pt_model=MidiMambaForCausalLM)


def load(name: str, **kwargs: Any) -> MidiMambaForCausalLM:
    """
    Load a generator as the fast class.

    Args:
        name (`str`): a folder, or a repository on the Hub, that holds a checkpoint of this package or of any
            transformers `MambaForCausalLM` or plain `LlamaForCausalLM`.
        kwargs: as for `from_pretrained`.
    """
    model: MidiMambaForCausalLM = MidiMambaForCausalLM.from_pretrained(name, **kwargs)
    return model


__all__ = [
    "CacheMismatchError",
    "MidiDiscriminator",
    "MidiDiscriminatorConfig",
    "MidiGenerationPipeline",
    "MidiMambaConfig",
    "MidiMambaForCausalLM",
    "MidiProcessor",
    "RecurrentCache",
    "load",
]
