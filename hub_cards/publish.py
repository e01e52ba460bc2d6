"""Publish networks on the Hub: a repository with a card for each, and of its folder only what a user loads."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from midimamba.errors import InputError
from midimamba.evaluation.report_page import MUSICAL_DISCRIMINATOR, bullet_list, training_settings
from midimamba.files import read_json
from midimamba.modeling.configuration_midimamba import STOCK, MidiMambaConfig
from midimamba.modeling.configuration_musical_discriminator import MusicalDiscriminatorConfig
from midimamba.modeling.modeling_discriminator import MidiDiscriminator
from midimamba.modeling.modeling_midimamba import MidiMambaForCausalLM
from midimamba.modeling.modeling_musical_discriminator import MusicalDiscriminator
from midimamba.text import for_markdown, printable
from midimamba.tokenization.processor import MidiProcessor

from .evaluation import Evaluation, read_evaluation
from .gallery import PUBLISHED_SAMPLES, gallery
from .provenance import Provenance, on_hub, read_provenance
from .publish_corpus import KNOWN_OF_CORPUS, add_corpus_card, collect_corpus
from .remote_code import GENERATE, PIPELINE_CODE, TASK, add_remote_code
from .results import RESULTS_FILE, eval_results, model_index
from .upload import Hub, Upload, check_license, check_name, copy_file, copy_known, left_out, scratch_beside

# The files that a user loads or reads. No other file is uploaded: optimizer states and checkpoints are large, and
# pickles run code.
PUBLISHED = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "miditok.json", "processor_config.json"),
    *("training_args.json", "training_run.json", "evaluation.json", RESULTS_FILE, "README.md"),
    *PUBLISHED_SAMPLES,
    # The code of the processor, for users who have transformers but not midimamba.
    *("processor.py", "grammar.py", "tokenizer.py", "hf_tokenizer.py", "tokenizations.py", "controls.py"),
    *(
        "grammar_types.py",
        "grammar_state.py",
        "grammar_torch.py",
        "grammar_numba.py",
        "grammar_tables.py",
        "grammar_midilike.py",
        "grammar_pertok.py",
        "grammar_rests.py",
        "grammar_mmm.py",
        "grammar_beat.py",
        "grammar_beat_tables.py",
        "grammars.py",
        "composing.py",
        "batching.py",
        "processor_loading.py",
        "constraints.py",
        "sampling_limits.py",
        "timed_rules.py",
        "walks.py",
        "voices.py",
    ),
    *("normalization.py", "bar_plan.py", "note_times.py", "open_notes.py", "continuation.py"),
    *("infilling.py", "gaps.py"),
    *("choices.py", "musical_time.py", "ingest.py", "abc_notation.py", "errors.py"),
    # What samples music where midimamba is not installed.
    *(*PIPELINE_CODE, GENERATE),
    # The generator's own code, of layouts that transformers has no class for.
    *("configuration_midimamba.py", "modeling_midimamba.py", "mamba_mixer.py", "attention.py", "feed_forward.py"),
    *(
        "look_back.py",
        "look_back_numba.py",
        "recurrent_cache.py",
        "layer_states.py",
        "frame.py",
        "decoding.py",
        "decode_numba.py",
        "config_checks.py",
        "stock_names.py",
        "whole_weights.py",
        "selective_scan.py",
        "scan_backends.py",
        "scan_chunked.py",
        "scan_common.py",
        "numba_common.py",
        "numba_products.py",
        "scan_numba.py",
        "mixer_numba.py",
        "scan_triton.py",
        "step_numba.py",
    ),
)
TAGS = ["midi", "music", "symbolic-music", "music-generation", "mamba", "seqgan"]
_LANGUAGE = "en"  # of cards and of the names of controls; music has none
DISCRIMINATORS = ("discriminator", MUSICAL_DISCRIMINATOR)
"""The kinds of discriminators: of tokens, and of musical features. Each goes to the repository `<repo>-<kind>`."""


class Licences(NamedTuple):
    """What the uploader states, by the Hub's names: the licence of the weights, and that of the training music."""

    weights: str | None
    music: str | None


class Published(NamedTuple):
    """
    What was published.

    Args:
        urls (`dict[str, str]`): the addresses of `generator` and, if there are any, `discriminator` and
            `musical-discriminator`; or of `corpus`.
        left_out (`list[str]`): files and folders that are not known and so were not uploaded.
    """

    urls: dict[str, str]
    left_out: list[str]


def publish(
    folder: Path,
    repo_id: str,
    *,
    discriminators: Sequence[Path] = (),
    report: Path | None = None,
    license: str | None = None,
    data_license: str | None = None,
    private: bool = False,
    token: str | None = None,
) -> Published:
    """
    Upload a generator to `repo_id`, and its discriminators to `<repo_id>-discriminator`, if it reads tokens, and
    `<repo_id>-musical-discriminator`, if it hears musical features, each in one commit.

    A folder with a `corpus.json` is a corpus, and is uploaded to the data set repository `repo_id`.

    Everything is first built in a scratch folder and checked there: the files, whether the networks load, the report
    and the cards. Only then is a repository created. Links are refused, unknown files stay here, and access tokens and
    passwords are replaced by `[removed]` in all text. A card is added to the upload, unless the folder has a
    `README.md`.

    Args:
        folder (`Path`): written by `save_pretrained` of the model and of its processor, or by `midimamba tokenize`.
        repo_id (`str`): `"owner/name"`, or `"name"` for the owner of the token. Created if it does not exist.
        discriminators (`Sequence[Path]`, *optional*): folders of a `MidiDiscriminator`, a `MusicalDiscriminator`, or
            one of each.
        report (`Path`, *optional*): `report.json` of the run, or the report of `midimamba evaluate`. It becomes the
            evaluation section of the cards and `evaluation.json`; its pictures, and the samples of a run, are uploaded
            as well.
        license (`str`, *optional*): of the weights or the corpus, by the identifier of the Hub, such as `"cc-by-4.0"`;
            left out of the card by default.
        data_license (`str`, *optional*): of the music that the networks were trained on, likewise.
        private (`bool`, *optional*, defaults to `False`): whether repositories that are created are private. One that
            exists and is public is then refused.
        token (`str`, *optional*): the token for the Hub; that of `hf auth login` by default.

    Returns:
        [`Published`]: the addresses, and what was left out.

    Raises:
        InputError: if a folder is neither a checkpoint nor a corpus, if a file in it is broken, if two discriminators
            are of one kind, if the report cannot be read, or if the Hub cannot be reached or refuses.
    """
    is_corpus = (folder / "corpus.json").is_file()
    if is_corpus and (discriminators or report is not None):
        raise InputError(f"{folder} is a corpus; leave out --discriminator and --report, which belong to a generator")
    if is_corpus and data_license is not None:
        raise InputError(f"{folder} is a corpus: state its licence with --license, and leave out --data-license")
    for each in (license, data_license):
        check_license(each)
    check_name(repo_id)
    hub = Hub(token)
    with scratch_beside(folder) as scratch:
        if is_corpus:
            uploads, others = _prepare_corpus(hub, scratch, folder, repo_id, license)
        else:
            uploads, others = _prepare_models(
                hub, scratch, folder, repo_id, discriminators, report, Licences(license, data_license)
            )
        return Published(hub.send(uploads, private), others)


def _prepare_corpus(
    hub: Hub, scratch: Path, folder: Path, repo_id: str, license: str | None
) -> tuple[list[Upload], list[str]]:
    """What is to be uploaded of a corpus, checked, and the names of what is not."""
    uploads = [Upload("corpus", repo_id, scratch / "corpus", stale="data/*.parquet")]
    others = left_out(folder, KNOWN_OF_CORPUS)
    collect_corpus(folder, uploads[0].folder)
    uploads = hub.prepare(uploads)
    with _checking(folder, uploads[0].folder):
        add_corpus_card(uploads[0].folder, uploads[0].repo_id, license)
    return uploads, others


def _prepare_models(
    hub: Hub,
    scratch: Path,
    folder: Path,
    repo_id: str,
    discriminators: Sequence[Path],
    report: Path | None,
    licences: Licences,
) -> tuple[list[Upload], list[str]]:
    """The same of a generator and its discriminators."""
    _check_checkpoints(folder, discriminators)
    uploads = [Upload("generator", repo_id, scratch / "generator")]
    sources = {"generator": folder}
    others = left_out(folder, PUBLISHED)
    evaluation = _collect_generator(folder, uploads[0].folder, report)
    for index, source in enumerate(discriminators):
        target = scratch / f"discriminator-{index}"
        kind = _collect_discriminator(source, target)
        if kind in sources:
            raise InputError(
                f"{sources[kind]} and {source} are both of the kind {kind}, and a generator is published with one of "
                "each kind: leave one out"
            )
        sources[kind] = source
        uploads.append(Upload(kind, f"{repo_id}-{kind}", target))
        check_name(uploads[-1].repo_id)
        others += [f"{source.name}/{name}" for name in left_out(source, PUBLISHED)]
    uploads = hub.prepare(uploads)
    _add_cards(uploads, sources, evaluation, licences)
    return uploads, others


def check_target(repo_id: str, *, discriminators: Sequence[str] = (), token: str | None = None) -> None:
    """
    Check before long work whether something could be published.

    Args:
        repo_id (`str`): `"owner/name"`, or `"name"` for the owner of the token.
        discriminators (`Sequence[str]`, *optional*): the kinds of those that are published as well, of
            [`DISCRIMINATORS`].
        token (`str`, *optional*): the token for the Hub; that of `hf auth login` by default.

    Raises:
        InputError: if a name is impossible, if there is no token that may write, or if the Hub cannot be reached.
    """
    for name in (repo_id, *(f"{repo_id}-{kind}" for kind in discriminators)):
        check_name(name)
    Hub(token).resolve([Upload("generator", repo_id, Path())])


def _collect_generator(source: Path, target: Path, report: Path | None) -> Evaluation | None:
    """Fill `target` with what is uploaded of a generator, and check that it loads."""
    evaluation = None if report is None else read_evaluation(report)
    copy_known(source, PUBLISHED, target)
    if report is not None and evaluation is not None:
        for name, file in evaluation.files.items():
            copy_file(report.parent, file, target / name)
    with _checking(source, target):
        if evaluation is None and (target / "evaluation.json").exists():
            read_evaluation(target / "evaluation.json")
        _check_json(target)
        processor = MidiProcessor.from_pretrained(target)
        add_remote_code(target, processor)
        model = MidiMambaForCausalLM.from_pretrained(target)
        if model.config.vocab_size != processor.vocab_size:
            raise InputError(
                f"{target}: the generator has {model.config.vocab_size} tokens, but its tokenizer "
                f"{processor.vocab_size}; save the generator and its processor together again"
            )
    return evaluation


def _collect_discriminator(source: Path, target: Path) -> str:
    """Fill `target` with what is uploaded of a discriminator, check that it loads, and return its kind."""
    copy_known(source, PUBLISHED, target)
    with _checking(source, target):
        _check_json(target)
        kind = _kind_of(target)
        network = MidiDiscriminator if kind == DISCRIMINATORS[0] else MusicalDiscriminator
        network.from_pretrained(target)
    return kind


def _kind_of(folder: Path) -> str:
    """Whether a discriminator reads tokens or hears musical features, as one of [`DISCRIMINATORS`]."""
    return DISCRIMINATORS[read_json(folder / "config.json").get("model_type") == MusicalDiscriminatorConfig.model_type]


def _add_cards(
    uploads: Sequence[Upload], sources: Mapping[str, Path], evaluation: Evaluation | None, licences: Licences
) -> None:
    """Write a card where the owner has written none. `sources` has the owner's folder of each kind."""
    judges = [upload.repo_id for upload in uploads if upload.kind in DISCRIMINATORS]
    for upload in uploads:
        card = upload.folder / "README.md"
        if card.exists():
            continue
        with _checking(sources[upload.kind], upload.folder):
            if upload.kind in DISCRIMINATORS:
                made = _discriminator_card(upload.folder, upload.repo_id, evaluation, licences)
            else:
                made = _generator_card(upload.folder, upload.repo_id, evaluation, licences, judges)
            made.save(card)


@contextmanager
def _checking(source: Path, target: Path) -> Iterator[None]:
    """Turn what broken files raise into an [`InputError`] that names `source` and not its copy in `target`."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(str(target), str(source))) from error
    except (
        *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError),
        *(FileNotFoundError, SafetensorError, StrictDataclassError),
    ) as error:
        reason = " ".join(str(error).split()).replace(str(target), str(source)) or type(error).__name__
        raise InputError(
            f"{source} cannot be published, because it does not load ({reason}): save it again"
        ) from error
    except OSError as error:
        if error.errno is not None:  # a full disk, for example
            raise
        reason = " ".join(str(error).split()).replace(str(target), str(source))
        raise InputError(
            f"{source} cannot be published, because it does not load ({reason}): save it again"
        ) from error


def _check_json(folder: Path) -> None:
    """Check every JSON file, and that an index of weights names only files that are there."""
    for file in sorted(folder.glob("*.json")):
        content = read_json(file)
        if file.name.endswith(".safetensors.index.json"):
            shards = content.get("weight_map")
            names = set(shards.values()) if isinstance(shards, dict) else {None}
            there = {path.name for path in folder.glob("*.safetensors")}
            if not names <= there:
                raise InputError(f"{file} names weights that are not beside it: save the model again")


def _check_checkpoints(generator: Path, discriminators: Sequence[Path]) -> None:
    """Check before anything is sent whether the folders are complete."""
    if not (generator / "config.json").is_file():
        raise InputError(
            f"{generator} is neither a checkpoint to publish nor a corpus; "
            "name a folder with a config.json or a corpus.json"
        )
    _require(generator, "*.safetensors", "miditok.json")
    for discriminator in discriminators:
        _require(discriminator, "config.json", "*.safetensors")


def _require(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        if not any(folder.glob(pattern)):
            raise InputError(
                f"{folder} is not a checkpoint to publish: it has no {pattern}; write it with save_pretrained"
            )


def _generator_card(
    folder: Path,
    repo_id: str,
    evaluation: Evaluation | None,
    licences: Licences,
    discriminators: Sequence[str] = (),
) -> ModelCard:
    origin = read_provenance(folder)
    # The Hub has no task for symbolic music. Text generation loads the model and describes its output: tokens.
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        language=_LANGUAGE,
        tags=TAGS,
        license=licences.weights,
        datasets=origin.dataset,
        base_model=origin.base_model,
        model_name=repo_id.split("/")[-1],
        eval_results=None if evaluation is None else _add_results(folder, evaluation, origin),
    )
    fields = {
        "repo_id": repo_id,
        "evaluation": evaluation,
        "discriminators": discriminators,
        "data_license": licences.music,
        "origin": origin,
        "samples": gallery(folder, repo_id),
        "task": TASK if (folder / PIPELINE_CODE[0]).exists() else None,
        "under_grammar": (folder / GENERATE).exists(),
        **_architecture(folder),
    }
    return _render("generator_card.md", data, folder, **fields)


def _add_results(folder: Path, evaluation: Evaluation, origin: Provenance) -> list[EvalResult] | None:
    """The figures for the card, if their music is known, and a file of them if that is on the Hub."""
    reference = evaluation.reference or origin.data
    if not reference or not evaluation.results:
        return None
    dataset = on_hub(reference)
    file = folder / RESULTS_FILE
    if dataset and not file.exists():
        file.parent.mkdir()
        file.write_text(eval_results(evaluation.results, dataset, evaluation.split), encoding="utf-8")
    return model_index(evaluation.results, dataset or PureWindowsPath(printable(reference)).name, evaluation.split)


def _architecture(folder: Path) -> dict[str, Any]:
    """The kind of language model, and how transformers alone loads it."""
    config = read_json(folder / "config.json")
    model_type = config.get("model_type")
    if model_type == MidiMambaConfig.model_type:
        kind = for_markdown(str(config.get("layout")))
        return {"kind": kind, "loads_as": "with its own code", "trust": ", trust_remote_code=True"}
    stock = {model_type: (layout, name) for layout, (model_type, name) in STOCK.items()}
    if model_type not in stock:
        raise InputError(f"{folder / 'config.json'} has the model_type {model_type!r}, which is not a generator's")
    kind, name = stock[model_type]
    return {"kind": kind.capitalize(), "loads_as": f"a stock `{name}`, no remote code", "trust": ""}


def _discriminator_card(folder: Path, repo_id: str, evaluation: Evaluation | None, licences: Licences) -> ModelCard:
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        language=_LANGUAGE,
        tags=TAGS,
        license=licences.weights,
    )
    kind = _kind_of(folder)
    return _render(
        "discriminator_card.md",
        data,
        folder,
        repo_id=repo_id,
        generator_id=repo_id.removesuffix(f"-{kind}"),
        measures=evaluation and evaluation.of_discriminators.get(kind),
        musical=kind != DISCRIMINATORS[0],
        data_license=licences.music,
        bars=read_json(folder / "config.json").get("bars"),
    )


def _render(template: str, data: ModelCardData, folder: Path, **fields: Any) -> ModelCard:
    training = training_settings(folder)
    fields["license"] = data.license
    return ModelCard.from_template(
        data,
        template_str=(files("midimamba.hub_cards") / template).read_text(encoding="utf-8"),
        parameters=_count_parameters(folder),
        training=bullet_list(training),
        # In a run without rounds, only discriminators have learned.
        estimator=training.get("estimator") if training.get("max_steps") != 0 else None,
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
