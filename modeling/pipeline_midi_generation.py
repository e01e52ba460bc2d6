"""`pipeline("midi-generation")`: music in, as files or scores, and music out.

Published with a generator, where it is `pipeline("music-generation", trust_remote_code=True)`, for those who have not
installed midimamba. Therefore it imports none of the networks. The name is another because transformers would ask
those who have midimamba for `trust_remote_code` as well.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import Pipeline, PreTrainedModel
from transformers.utils.generic import ModelOutput

from .judging import Ensemble, Judge, TokenJudge, music_of
from .resampling import check_pick, choose

_DISCRIMINATOR = "midimamba-discriminator"  # the type of models that judge tokens
_BEST_OF = 8  # draws for each piece, where a discriminator chooses


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
    - infill (`Mapping[str, Any]`, *optional*): what to write again instead of continuing the piece, such as
      `{"bars": (5, 8)}` or `{"bars": (5, 8), "tracks": [0]}`; as for `processor.infill`. Everything else stays as it
      is in the piece;
    - constraints (`Mapping[str, Any]`, *optional*): what every new note keeps to, such as `{"scale": "D-dorian",
      "pitch_range": ["48-84"], "polyphony": 4, "grid": "1/8"}`; the names and values are those of
      [`~midimamba.tokenization.constraints.Constraints`];
    - num, seed, bars and at_most: as in [`~midimamba.command_options.SamplingOptions`], by default one piece, torch's
      random state, and no limit of bars;
    - discriminator (`MidiDiscriminator` or a judge, or a list of them, *optional*): chooses one of every `best_of`
      draws, by default of 8, with `pick` as in `SamplingOptions`. A judge is whatever has `log_odds`, such as
      [`~midimamba.evaluation.judges.MusicalJudge`]; the log-odds of several are added;
    - everything that `generate` takes. It samples by default. What is not given is the model's own, from its
      `generation_config.json`, as with `midimamba generate`; without one, temperature is 1, `top_p` 0.95, `top_k` 0
      and `max_new_tokens` 2,048.

    Raises:
        MidiRefusedError: if a prompt cannot be used.
        ValueError: if `best_of` or `pick` is given without a discriminator, or the discriminator cannot judge.
        InputError: if a control or its value is unknown, constraints cannot be kept together, an option makes no
            sense, the model computes NaN, or pieces are not music where the tokenization has no grammar.
    """

    model: PreTrainedModel
    processor: Any  # a MidiProcessor, of this package or of the checkpoint
    # Transformers declares these as None, without a type.
    _load_processor = True  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_video_processor = False  # type: ignore[assignment]
    _pipeline_calls_generate = True

    def _sanitize_parameters(
        self,
        controls: Mapping[str, str | Sequence[str]] | None = None,
        discriminator: Any = None,
        infill: Mapping[str, Any] | None = None,
        constraints: Any = None,
        **generate_options: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if infill is not None and discriminator is not None:
            raise ValueError("a discriminator judges whole pieces, not fillings: leave out one of the two")
        if discriminator is not None:
            generate_options["judge"] = self._judge(discriminator)
            generate_options.setdefault("best_of", _BEST_OF)
            check_pick(generate_options.get("pick", "resample"))
        elif {"best_of", "pick"} & generate_options.keys():
            raise ValueError("best_of and pick choose by a discriminator: give discriminator=… as well")
        asked = {} if infill is None else {"infill": infill}
        wanted = {} if constraints is None else {"constraints": constraints}
        before = ({} if controls is None else {"controls": controls}) | asked
        return before, generate_options | wanted, asked | wanted

    def _judge(self, given: Any) -> Judge:
        """What adds the log-odds of discriminators and judges."""
        judges: list[Judge] = []
        for each in given if isinstance(given, list | tuple) else [given]:
            if hasattr(each, "log_odds"):
                judges.append(each)
            elif getattr(getattr(each, "config", None), "model_type", None) != _DISCRIMINATOR:
                raise ValueError(
                    f"a {type(each).__name__} does not read tokens: give a MidiDiscriminator, or a judge such as "
                    "midimamba.evaluation.judges.MusicalJudge(discriminator, processor)"
                )
            elif each.config.vocab_size != self.processor.vocab_size:
                raise ValueError(
                    f"the discriminator reads {each.config.vocab_size} different tokens, but the generator's "
                    f"tokenizer has {self.processor.vocab_size}: give a discriminator of this generator"
                )
            else:
                judges.append(TokenJudge(each, self.processor.pad_token_id, self.processor.eos_token_id))
        return Ensemble(judges)

    def __call__(self, inputs: Any = None, *args: Any, **options: Any) -> Any:
        # `Pipeline` refuses a call without input; here it means a new piece.
        if inputs is None:
            return super().__call__([inputs], *args, **options)[0]
        # `Pipeline` takes a tuple for a single input, and looks at the first of a list even if it is empty.
        if isinstance(inputs, tuple | list):
            return super().__call__(list(inputs), *args, **options) if inputs else []
        return super().__call__(inputs, *args, **options)

    def preprocess(self, input_: Any, infill: Mapping[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        if infill is not None:
            if input_ is None:
                raise ValueError("there is no piece with a gap to fill: give one as the input")
            asked = self.processor.infill(input_, **infill, **options, return_tensors="pt")
            return dict(asked) | {"prompt": input_}
        return dict(self.processor(input_, return_tensors="pt", **options)) | {"prompt": input_}

    def _forward(self, input_tensors: dict[str, Any], **generate_options: Any) -> ModelOutput:
        bars: int | None = generate_options.pop("bars", None)
        judge, pick = generate_options.pop("judge", None), generate_options.pop("pick", "resample")
        best_of, seed = generate_options.get("best_of"), generate_options.get("seed")
        constraints = generate_options.pop("constraints", None)
        options = self._prepare_generate_kwargs(generate_options)
        prompt = input_tensors.pop("prompt")  # of a batch, the list of them
        composed = self.processor.compose(self.model, input_tensors, bars=bars, constraints=constraints, **options)
        composed.tell_unfinished([composed])
        # `Pipeline` gives row i to input i.
        rows = composed.ids.unflatten(0, (len(input_tensors["input_ids"]), -1))
        if judge is not None:
            ends = self.processor.pad_token_id, self.processor.eos_token_id
            log_odds = judge.log_odds([music_of(ids, *ends) for ids in composed.ids]).view(-1, best_of)
            places = choose(log_odds, pick, seed).to(rows.device)
            groups = rows.unflatten(1, (-1, best_of)).flatten(0, 1)  # (batch * num, best_of, time)
            rows = groups[torch.arange(len(groups)), places].unflatten(0, (len(rows), -1))
        return ModelOutput(sequences=rows, prompt=prompt)  # (batch, num, time)

    def postprocess(
        self,
        model_outputs: ModelOutput,
        infill: Mapping[str, Any] | None = None,
        constraints: Any = None,
        **options: Any,
    ) -> list[Any]:
        prompt = model_outputs["prompt"]
        sequences, place, limits = model_outputs["sequences"][0], self.processor.place, _limits(constraints)
        if infill is not None:
            return [place(prompt, ids, **infill, **limits) for ids in sequences]
        return [self.processor.continue_score(prompt, ids, **limits) for ids in sequences]


def _limits(constraints: Any) -> dict[str, int]:
    """What constraints say of a piece as a whole: the voices that may sound at once beside the prompt's."""
    own = constraints.get("polyphony") if isinstance(constraints, Mapping) else getattr(constraints, "polyphony", None)
    return {} if own is None else {"polyphony": own}


__all__ = ["MidiGenerationPipeline"]
