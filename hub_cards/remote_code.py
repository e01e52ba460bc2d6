"""What lets transformers make music from a repository where midimamba is not installed: a pipeline and `generate`."""

from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from midimamba.files import read_json
from midimamba.modeling import pipeline_midi_generation
from midimamba.text import for_json
from midimamba.tokenization import custom_generate
from midimamba.tokenization.grammar_types import check_supported
from midimamba.tokenization.processor import MidiProcessor

from .upload import copy_file

TASK = "music-generation"
"""The pipeline's name. It is not "midi-generation", which midimamba registers: transformers would then ask everybody
for `trust_remote_code`, and no longer take the faster class."""
PIPELINE_CODE = (
    "pipeline_midi_generation.py",
    "judging.py",
    "scoring.py",
    "policy.py",
    "resampling.py",
)
GENERATE = "custom_generate/generate.py"


def add_remote_code(folder: Path, processor: MidiProcessor) -> None:
    """
    Add to a folder that is published the code of the pipeline and of `generate`, and name the pipeline in its
    `config.json`. What is there already stays.

    Nothing is added where the processor's code is missing, which both need. `generate` needs a grammar as well.

    Args:
        folder (`Path`): of a generator and its processor.
        processor (`MidiProcessor`): that one.

    Raises:
        InputError: if `config.json` cannot be read.
    """
    if not (folder / "processor.py").exists():
        return
    file = folder / "config.json"
    config = read_json(file)
    if "custom_pipelines" not in config:
        entry = {"impl": "pipeline_midi_generation.MidiGenerationPipeline", "pt": ["AutoModelForCausalLM"]}
        file.write_text(for_json({**config, "custom_pipelines": {TASK: entry}}, indent=2) + "\n", encoding="utf-8")
        module = Path(pipeline_midi_generation.__file__)
        for source in (module, *map(Path, get_relative_import_files(module))):
            copy_file(source.parent, source, folder / source.name)
    if not (folder / GENERATE).exists() and _has_grammar(processor):
        source = Path(custom_generate.__file__)
        copy_file(source.parent, source, folder / GENERATE)


def _has_grammar(processor: MidiProcessor) -> bool:
    try:
        check_supported(processor.midi_tokenizer)
    except ValueError:
        return False
    return True
