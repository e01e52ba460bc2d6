"""Make our classes known to transformers without importing transformers.

`AutoProcessor.from_pretrained` finds [`MidiProcessor`] only if it was registered, and `AutoProcessor.register` takes
the class itself. Importing all our classes takes seconds and brings torch, so `import midimamba` only watches: as soon
as transformers' own registry is loaded, by whoever and in whatever order, our classes are added to it. A registry
that is never loaded costs nothing.

Transformers loads its registries while other modules of it are half loaded, and so may our modules. Registering at
that moment would import a class that is not there yet. So a registration waits until the outermost import of
transformers or midimamba is complete.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from threading import local
from types import ModuleType

_WATCHED = ("transformers.", "midimamba.")


def _register_configurations() -> None:
    from transformers import AutoConfig

    from midimamba.modeling.configuration_discriminator import MidiDiscriminatorConfig
    from midimamba.modeling.configuration_midimamba import MidiMambaConfig
    from midimamba.modeling.configuration_musical_discriminator import MusicalDiscriminatorConfig

    for config in (MidiMambaConfig, MidiDiscriminatorConfig, MusicalDiscriminatorConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_models() -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from midimamba.modeling.configuration_discriminator import MidiDiscriminatorConfig
    from midimamba.modeling.configuration_midimamba import MidiMambaConfig
    from midimamba.modeling.configuration_musical_discriminator import MusicalDiscriminatorConfig
    from midimamba.modeling.modeling_discriminator import MidiDiscriminator
    from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM
    from midimamba.modeling.modeling_musical_discriminator import MusicalDiscriminator

    AutoModelForCausalLM.register(MidiMambaConfig, MidiMambaForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(MidiDiscriminatorConfig, MidiDiscriminator, exist_ok=True)
    AutoModelForSequenceClassification.register(MusicalDiscriminatorConfig, MusicalDiscriminator, exist_ok=True)


def _register_processor() -> None:
    from transformers import AutoProcessor

    from midimamba.modeling.configuration_midimamba import MidiMambaConfig
    from midimamba.tokenization.processor import MidiProcessor

    AutoProcessor.register(MidiMambaConfig, MidiProcessor, exist_ok=True)


def _register_pipeline() -> None:
    from transformers.pipelines import PIPELINE_REGISTRY

    from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM
    from midimamba.modeling.pipeline_midi_generation import MidiGenerationPipeline

    PIPELINE_REGISTRY.register_pipeline("midi-generation", MidiGenerationPipeline, pt_model=MidiMambaForCausalLM)


# What is still to be registered, by the module that holds the registry.
_pending: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_configurations,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.models.auto.processing_auto": _register_processor,
    "transformers.pipelines": _register_pipeline,
}


def register_when_loaded() -> None:
    """Register with every registry that is loaded, and watch for those that are not. Called once, on import."""
    watcher = _Watcher()
    sys.meta_path.insert(0, watcher)
    watcher.run(_nothing)


def _nothing() -> None:
    """Stands for an import that is complete already."""


class _Watcher:
    """A finder that finds nothing itself: it has the other finders look, and learns when a module is loaded.

    It leaves `sys.meta_path` after the last registration.
    """

    def __init__(self) -> None:
        self._thread = _ThreadState()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith(_WATCHED) or self._thread.searching:
            return None
        self._thread.searching = True  # another finder may ask all finders in turn, this one included
        try:
            found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
            spec = next(filter(None, found), None)
        finally:
            self._thread.searching = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            self._watch(spec)
        return spec

    def _watch(self, spec: ModuleSpec) -> None:
        """Let the loader of this one module tell when the module is loaded."""
        loader = spec.loader
        assert loader is not None

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # the method of the class is back
            self.run(lambda: loader.exec_module(module))

        loader.exec_module = exec_module  # type: ignore[method-assign]

    def run(self, load: Callable[[], None]) -> None:
        """Load a module; once no import is under way that began before it, register what can be registered."""
        self._thread.depth += 1
        try:
            load()
            if self._thread.depth == 1:
                _register_loaded()
        finally:
            self._thread.depth -= 1
        if not _pending and self in sys.meta_path:
            sys.meta_path.remove(self)


class _ThreadState(local):
    """What each thread is importing."""

    depth = 0
    searching = False


def _register_loaded() -> None:
    while loaded := [name for name in _pending if name in sys.modules]:
        _pending.pop(loaded[0])()
