"""`pipeline("midi-generation")`: music in, as files or scores, and music out."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationConfig, LogitsProcessorList, Pipeline
from transformers.utils.generic import ModelOutput

from .modeling_midimamba import MidiMambaForCausalLM


class MidiGenerationPipeline(Pipeline):
    """
    Continues music, or makes new music, and guarantees that it is valid.

    ```python
    compose = pipeline("midi-generation", model="you/bach")
    compose("prompt.mid", num_return_sequences=4, max_new_tokens=512)[0].dump_midi("continuation.mid")
    ```

    A call takes a prompt, which is a path, the bytes of a file, a `symusic.Score` or `None` for no music, and returns
    a list of `symusic.Score`; for a list of prompts, a list of such lists. Its options are

    - controls (`Mapping[str, str | Sequence[str]]`, *optional*): what the music should be like, such as
      `{"key": "C-major"}`; `pipeline.processor.controls` has the names and their values;
    - everything that `generate` takes. By default it samples, with `top_p=0.95`, at most 1,024 new tokens.

    Raises:
        MidiRefusedError: if a prompt cannot be used.
        InputError: if a control or its value is unknown, or valid music cannot be guaranteed for the tokenization.
    """

    model: MidiMambaForCausalLM
    processor: Any  # a MidiProcessor, of this package or of the checkpoint
    # Transformers declares these as None, without a type.
    _load_processor = True  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_video_processor = False  # type: ignore[assignment]
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(do_sample=True, top_p=0.95, top_k=0, max_new_tokens=1024)

    def _sanitize_parameters(
        self, controls: Mapping[str, str | Sequence[str]] | None = None, **generate_options: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return ({} if controls is None else {"controls": controls}), generate_options, {}

    def __call__(self, inputs: Any = None, *args: Any, **options: Any) -> Any:
        # `Pipeline` refuses a call without input; here it means a new piece.
        if inputs is None:
            return super().__call__([inputs], *args, **options)[0]
        return super().__call__(inputs, *args, **options)

    def preprocess(self, input_: Any, **options: Any) -> dict[str, Any]:
        return dict(self.processor(input_, return_tensors="pt", **options)) | {"prompt": input_}

    def _forward(self, input_tensors: dict[str, Any], **generate_options: Any) -> ModelOutput:
        options = self._prepare_generate_kwargs(generate_options)
        prompt = input_tensors.pop("prompt")  # of a batch, the list of them
        # The grammar comes last: whatever else changes the scores, what it forbids stays forbidden.
        processors = LogitsProcessorList([*options.pop("logits_processor", ()), self.processor.grammar()])
        sequences = self.model.generate(**input_tensors, logits_processor=processors, **options)
        return ModelOutput(sequences=sequences, prompt=prompt)

    def postprocess(self, model_outputs: ModelOutput, **options: Any) -> list[Any]:
        prompt = model_outputs["prompt"]
        return [self.processor.continue_score(prompt, ids) for ids in model_outputs["sequences"]]


__all__ = ["MidiGenerationPipeline"]
