"""Publish networks on the Hub: two repositories with cards, and of each folder only the files that a user loads."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from safetensors import safe_open

from midimamba.errors import InputError
from midimamba.evaluation.report_page import bullet_list, training_settings
from midimamba.modeling.configuration_midimamba import STOCK, MidiMambaConfig

from .evaluation import Evaluation, read_evaluation
from .publish_corpus import publish_corpus

# The files that a user loads or reads. No other file is uploaded: optimizer states and checkpoints are large, and
# pickles run code.
PUBLISHED = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "miditok.json", "processor_config.json"),
    *("training_args.json", "evaluation.json", "README.md"),
    # The code of the processor, for users who have transformers but not midimamba.
    *("processor.py", "grammar.py", "tokenizer.py", "hf_tokenizer.py", "tokenizations.py", "controls.py"),
    *("grammar_tables.py", "composing.py", "sampling_limits.py"),
    *("choices.py", "musical_time.py", "ingest.py", "errors.py"),
    # The generator's own code, of layouts that transformers has no class for.
    *("configuration_midimamba.py", "modeling_midimamba.py", "mamba_mixer.py", "attention.py", "feed_forward.py"),
    *(
        "recurrent_cache.py",
        "layer_states.py",
        "frame.py",
        "stock_names.py",
        "selective_scan.py",
        "scan_backends.py",
        "scan_chunked.py",
        "scan_common.py",
        "numba_common.py",
        "scan_numba.py",
        "scan_triton.py",
        "step_numba.py",
    ),
)
TAGS = ["midi", "music", "mamba", "seqgan"]


def publish(
    folder: Path,
    repo_id: str,
    *,
    discriminator: Path | None = None,
    report: Path | None = None,
    license: str | None = None,
    private: bool = False,
    token: str | None = None,
) -> dict[str, str]:
    """
    Upload a generator to `repo_id`, and its discriminator to `<repo_id>-discriminator`, each in one commit.

    A folder with a `corpus.json` is a corpus, and is uploaded to the data set repository `repo_id`; see
    [`~midimamba.hub_cards.publish_corpus.publish_corpus`].

    A card is added to the upload, unless the folder has a `README.md`, which is uploaded unchanged.

    Args:
        folder (`Path`): written by `save_pretrained` of the model and of its processor, or by `midimamba tokenize`.
        repo_id (`str`): `"owner/name"`, or `"name"` for the owner of the token. Created if it does not exist.
        discriminator (`Path`, *optional*): folder of a `MidiDiscriminator`.
        report (`Path`, *optional*): `report.json` of the run, or the report of `midimamba evaluate`. It becomes the
            evaluation section of the cards and `evaluation.json`; its pictures, and the samples of a run, are uploaded
            as well.
        license (`str`, *optional*): the identifier of the Hub, such as `"cc-by-4.0"`; left out of the card by default.
        private (`bool`, *optional*, defaults to `False`): whether repositories that are created are private.
        token (`str`, *optional*): the token for the Hub; that of `hf auth login` by default.

    Returns:
        `dict[str, str]`: the addresses of `generator` and, if there is one, `discriminator`; or of `corpus`.

    Raises:
        InputError: if a folder is neither a checkpoint nor a corpus, the report cannot be read, or the Hub refuses.
    """
    api = HfApi(token=token)
    if (folder / "corpus.json").is_file():
        if discriminator is not None or report is not None:
            raise InputError(
                f"{folder} is a corpus; leave out --discriminator and --report, which belong to a generator"
            )
        with _naming_refusals(repo_id):
            return publish_corpus(api, folder, repo_id, license=license, private=private)
    _check_checkpoints(folder, discriminator)
    evaluation = None if report is None else read_evaluation(report)
    with _naming_refusals(repo_id):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        card = _generator_card(folder, url.repo_id, evaluation, license)
        _upload(api, url.repo_id, folder, card, evaluation)
        urls = {"generator": str(url)}
        if discriminator is not None:
            url = api.create_repo(f"{repo_id}-discriminator", private=private, exist_ok=True)
            card = _discriminator_card(discriminator, url.repo_id, evaluation, license)
            _upload(api, url.repo_id, discriminator, card)
            urls["discriminator"] = str(url)
    return urls


@contextmanager
def _naming_refusals(repo_id: str) -> Iterator[None]:
    """Turn a refusal of the Hub into an [`InputError`]."""
    try:
        yield
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the Hub refused {repo_id!r}: {reason}; check the name, and `hf auth login`") from error


def _check_checkpoints(generator: Path, discriminator: Path | None) -> None:
    """Check before anything is sent whether the folders are complete."""
    if not (generator / "config.json").is_file():
        raise InputError(
            f"{generator} is neither a checkpoint to publish nor a corpus; "
            "name a folder with a config.json or a corpus.json"
        )
    _require(generator, "*.safetensors", "miditok.json")
    if discriminator is not None:
        _require(discriminator, "config.json", "*.safetensors")


def _require(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        if not any(folder.glob(pattern)):
            raise InputError(
                f"{folder} is not a checkpoint to publish: it has no {pattern}; write it with save_pretrained"
            )


def _generator_card(folder: Path, repo_id: str, evaluation: Evaluation | None, license: str | None) -> ModelCard:
    # The Hub has no task for symbolic music. Text generation loads the model and describes its output: tokens.
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=TAGS, license=license)
    fields = _architecture(folder)
    return _render("generator_card.md", data, folder, repo_id=repo_id, evaluation=evaluation, **fields)


def _architecture(folder: Path) -> dict[str, Any]:
    """The kind of language model, and how transformers alone loads it."""
    config = json.loads((folder / "config.json").read_text())
    model_type = config["model_type"]
    if model_type == MidiMambaConfig.model_type:
        return {"kind": config["layout"], "loads_as": "with its own code", "trust": ", trust_remote_code=True"}
    kind, name = {model_type: (layout, name) for layout, (model_type, name) in STOCK.items()}[model_type]
    return {"kind": kind.capitalize(), "loads_as": f"a stock `{name}`, no remote code", "trust": ""}


def _discriminator_card(folder: Path, repo_id: str, evaluation: Evaluation | None, license: str | None) -> ModelCard:
    data = ModelCardData(library_name="transformers", pipeline_tag="text-classification", tags=TAGS, license=license)
    return _render(
        "discriminator_card.md",
        data,
        folder,
        repo_id=repo_id,
        generator_id=repo_id.removesuffix("-discriminator"),
        measures=evaluation and evaluation.of_discriminator,
    )


def _render(template: str, data: ModelCardData, folder: Path, **fields: Any) -> ModelCard:
    training = training_settings(folder)
    return ModelCard.from_template(
        data,
        template_str=(files("midimamba.hub_cards") / template).read_text(encoding="utf-8"),
        parameters=_count_parameters(folder),
        training=bullet_list(training),
        adversarial="estimator" in training,
        sequence_length=training.get("sequence_length"),
        **fields,
    )


def _count_parameters(folder: Path) -> int:
    """Read the count from the headers alone: tied weights are stored once, and so counted once."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as weights:
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return total


def _upload(api: HfApi, repo_id: str, folder: Path, card: ModelCard, evaluation: Evaluation | None = None) -> None:
    contents: dict[str, bytes | Path] = {"README.md": str(card).encode()}
    contents |= {file.name: file for pattern in PUBLISHED for file in folder.glob(pattern)}
    if evaluation is not None:
        contents |= evaluation.files
    operations = [CommitOperationAdd(name, content) for name, content in sorted(contents.items())]
    api.create_commit(repo_id, operations, commit_message="Publish with midimamba")
