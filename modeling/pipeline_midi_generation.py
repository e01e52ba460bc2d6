"""`pipeline("midi-generation")`: music in, as files or scores, and music out."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, Pipeline


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

    _load_processor = True
    _load_tokenizer = False
    _load_feature_extractor = False
    _load_image_processor = False
    _load_video_processor = False
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(do_sample=True, top_p=0.95, top_k=0, max_new_tokens=1024)

    def _sanitize_parameters(
        self, controls: Mapping[str, str | Sequence[str]] | None = None, **generate_options: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return ({} if controls is None else {"controls": controls}), generate_options, {}

    def __call__(self, inputs: Any = None, **options: Any) -> Any:
        # `Pipeline` refuses a call without input; here it means a new piece.
        return super().__call__([inputs], **options)[0] if inputs is None else super().__call__(inputs, **options)

    def preprocess(self, inputs: Any, controls: Mapping[str, str | Sequence[str]] | None = None) -> dict[str, Tensor]:
        return dict(self.processor(inputs, return_tensors="pt", controls=controls))

    def _forward(self, model_inputs: dict[str, Tensor], **generate_options: Any) -> dict[str, Tensor]:
        options = self._prepare_generate_kwargs(generate_options)
        # The grammar comes last: whatever else changes the scores, what it forbids stays forbidden.
        processors = LogitsProcessorList([*options.pop("logits_processor", ()), self.processor.grammar()])
        return {"sequences": self.model.generate(**model_inputs, logits_processor=processors, **options)}

    def postprocess(self, model_outputs: dict[str, Tensor]) -> list[Any]:
        scores: list[Any] = self.processor.batch_decode(model_outputs["sequences"])
        return scores


__all__ = ["MidiGenerationPipeline"]
