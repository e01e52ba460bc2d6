"""midimamba: Mamba language models for MIDI, pre-trained, fine-tuned adversarially, at home on the Hub.

Importing the package takes a few milliseconds: each public name is imported when it is first used (PEP 562). Our
classes are registered with transformers' Auto classes and pipelines as soon as these are loaded, before or after this
package (see [`midimamba.registration`]). Stock classes keep doing what they did.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from midimamba.registration import register_when_loaded

if TYPE_CHECKING:
    from midimamba.gguf_export import export_gguf
    from midimamba.modeling.configuration_discriminator import MidiDiscriminatorConfig
    from midimamba.modeling.configuration_midimamba import MidiMambaConfig
    from midimamba.modeling.configuration_musical_discriminator import MusicalDiscriminatorConfig
    from midimamba.modeling.modeling_discriminator import MidiDiscriminator
    from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM
    from midimamba.modeling.modeling_musical_discriminator import MusicalDiscriminator
    from midimamba.modeling.pipeline_midi_generation import MidiGenerationPipeline
    from midimamba.modeling.recurrent_cache import CacheMismatchError, RecurrentCache
    from midimamba.note_decoding import Note
    from midimamba.onnx_export import export_onnx
    from midimamba.streaming import NoteStreamer, stream
    from midimamba.tokenization.processor import MidiProcessor

__version__ = "0.1.0"

__all__ = [
    "CacheMismatchError",
    "MidiDiscriminator",
    "MidiDiscriminatorConfig",
    "MidiGenerationPipeline",
    "MidiMambaConfig",
    "MidiMambaForCausalLM",
    "MidiProcessor",
    "MusicalDiscriminator",
    "MusicalDiscriminatorConfig",
    "Note",
    "NoteStreamer",
    "RecurrentCache",
    "export_gguf",
    "export_onnx",
    "load",
    "stream",
]

_MODULES = {
    "CacheMismatchError": "modeling.recurrent_cache",
    "MidiDiscriminator": "modeling.modeling_discriminator",
    "MidiDiscriminatorConfig": "modeling.configuration_discriminator",
    "MidiGenerationPipeline": "modeling.pipeline_midi_generation",
    "MidiMambaConfig": "modeling.configuration_midimamba",
    "MidiMambaForCausalLM": "modeling.modeling_midimamba",
    "MidiProcessor": "tokenization.processor",
    "MusicalDiscriminator": "modeling.modeling_musical_discriminator",
    "MusicalDiscriminatorConfig": "modeling.configuration_musical_discriminator",
    "Note": "note_decoding",
    "NoteStreamer": "streaming",
    "RecurrentCache": "modeling.recurrent_cache",
    "stream": "streaming",
    "export_gguf": "gguf_export",
    "export_onnx": "onnx_export",
}


def load(name: str, **kwargs: Any) -> "MidiMambaForCausalLM":
    """
    Load a generator as the fast class.

    Args:
        name (`str`): a folder, or a repository on the Hub, that holds a checkpoint of this package or of any
            transformers `MambaForCausalLM` or plain `LlamaForCausalLM`.
        kwargs: as for `from_pretrained`.

    Raises:
        InputError: if there is no whole generator, or its weights are not finite.
    """
    from midimamba.loading import load_generator

    return load_generator(name, **kwargs)


if not TYPE_CHECKING:  # a type checker knows the names above, and would take any other for one

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value  # so that this function is not asked again
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_loaded()
