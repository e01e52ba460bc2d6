"""What the commands do. Each imports what it needs when it runs."""

import importlib.metadata
import importlib.util
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from midimamba.app.options import AppOptions
from midimamba.command_options import (
    ConvertOptions,
    DemoOptions,
    DrawingOptions,
    ExportOptions,
    GenerateOptions,
    InfillOptions,
    PlayOptions,
    RenderingOptions,
    SamplingOptions,
    TokenizeFiles,
    TrainOptions,
    TuneOptions,
)
from midimamba.constraint_options import ConstraintOptions, GapConstraintOptions
from midimamba.corpus.options import ClusterOptions, CorpusOptions
from midimamba.errors import InputError
from midimamba.files import check_can_be_made, is_taken
from midimamba.options import first_given
from midimamba.result_options import FEWEST_SAMPLES, EvaluateOptions, ListenOptions, PublishOptions
from midimamba.serving.options import ServeOptions
from midimamba.text import printable, show
from midimamba.tokenization.sampling_limits import BEST_OF, PICKS

_LISTED = 16  # tracks in a message


def tokenize(files: TokenizeFiles, options: CorpusOptions, cluster: ClusterOptions | None = None) -> None:
    """`midimamba tokenize`: MIDI files to a corpus."""
    if files.tokenizer_config is not None:
        options = replace(options, tokenizer_options=_read_yaml(files.tokenizer_config))
    try:
        report = _make_corpus(files, options, cluster)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: run the same command again to continue\n")
        sys.exit(130)
    if report is None:
        return
    for split, counts in report["splits"].items():
        print(f"{split:>10}: " + ", ".join(f"{value:,} {name}" for name, value in counts.items()))
    print(f"{report['vocab_size']:,} tokens in the vocabulary, {report['duplicates']:,} duplicates dropped")
    held_out = report["splits"]["test"]["pieces"]
    if held_out < 2 * FEWEST_SAMPLES:
        print(f"`midimamba evaluate` needs {2 * FEWEST_SAMPLES} pieces in the test split, which has {held_out}")
    if report["refused"]:
        show(f"{report['refused']:,} files refused: {files.out.rstrip('/')}/quarantine.jsonl says why")


def _make_corpus(
    files: TokenizeFiles, options: CorpusOptions, cluster: ClusterOptions | None
) -> dict[str, Any] | None:
    """What `corpus.json` holds; `None` while a cluster makes it."""
    from midimamba.corpus.addresses import is_address
    from midimamba.corpus.build import tokenize_corpus
    from midimamba.corpus.cluster import tokenize_on_cluster

    if cluster is not None and cluster.executor is not None:
        return tokenize_on_cluster(files.source, files.out, options, cluster)
    if is_address(files.out):
        raise InputError(f"{files.out} is not a folder of this machine: add --executor local, slurm or ray")
    check_can_be_made(Path(files.out))
    return tokenize_corpus(files.source, Path(files.out), options)


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # YAML can be too deep for Python's stack
        raise InputError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise InputError(f"{path} holds no options: write lines such as `num_velocities: 16`")
    return options


def _new_folder(out: Path | None, content: str) -> Path:
    """The folder to write to. Refused early if nothing could be written there at the end."""
    if out is None:
        raise InputError(f"nowhere to write {content}: name a folder with --out")
    check_can_be_made(out)
    if is_taken(out):
        raise InputError(f"{out} already exists: choose another --out or delete it")
    return out


def train(options: TrainOptions) -> None:
    """`midimamba train`: music to a generator, by the rule of [`~midimamba.training.plan`]."""
    from midimamba import launching

    launching.train(options)


def tune(options: TuneOptions) -> None:
    """`midimamba tune`: a generator to one that was tuned adversarially."""
    from midimamba import launching

    launching.tune(options)


def generate(options: GenerateOptions, sampling: SamplingOptions, wanted: ConstraintOptions) -> None:
    """`midimamba generate`: a model to MIDI files."""
    from midimamba.generation import load_pair
    from midimamba.tokenization.ingest import MidiRefusedError

    if options.list_controls:
        _list_controls(options.model)
        return
    controls = _read_controls(options.control)
    out = _new_folder(options.out, "the pieces")
    _check_choosing(options, sampling, out)
    write = _writer(options)  # what is missing is found before the pieces are sampled
    model, processor = load_pair(options.model)
    request = {"prompt": options.prompt, "controls": controls}
    sampling = replace(sampling, constraints=wanted.constraints)
    try:
        chosen = _sample(model, processor, options, sampling, request)
    except MidiRefusedError as error:
        raise InputError(f"{options.prompt} cannot be continued: {error.reason}") from error
    write(out, {f"sample-{index:02d}": score for index, score in enumerate(chosen.scores)})
    if options.keep_unused is not None:
        write(
            options.keep_unused,
            {
                f"sample-{i:02d}-{j:02d}": score
                for i, group in enumerate(chosen.unused)
                for j, score in enumerate(group)
            },
        )
    line = f"{len(chosen.scores)} pieces in {out}"
    if options.discriminator:
        draws = sampling.best_of or BEST_OF
        line += f", each one of {draws} draws; effective sample size {chosen.effective_sample_size:.1f} of {draws}"
    show(line)


def infill(options: InfillOptions, drawing: DrawingOptions, wanted: GapConstraintOptions) -> None:
    """`midimamba infill`: other music for some bars of a MIDI file."""
    from midimamba.generation import infill_scores, load_pair
    from midimamba.tokenization.gaps import find_gap
    from midimamba.tokenization.ingest import MidiRefusedError, read_unordered

    controls = _read_controls(options.control)
    out = _new_folder(options.out, "the pieces")
    write = _writer(options)
    try:
        song = read_unordered(options.song)[0]
        tracks = chosen_tracks(options.numbers, [track.name for track in song.tracks])
        find_gap(song, options.span, tracks)  # what the piece does not have is told before the model is loaded
        model, processor = load_pair(options.model)
        drawing = replace(drawing, constraints=wanted.constraints)
        scores = infill_scores(model, processor, song, options.span, tracks, drawing, controls)
    except MidiRefusedError as error:
        raise InputError(f"{options.song} cannot be used: {error.reason}") from error
    write(out, {f"{options.song.stem}-{index:02d}": score for index, score in enumerate(scores)})
    show(f"{len(scores)} pieces in {out}")


def serve(options: ServeOptions) -> None:
    """`midimamba serve`: a generator over HTTP."""
    for package in ("fastapi", "uvicorn", "python_multipart"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f'{package} is not installed; run: pip install "midimamba[serve]"')
    from midimamba.serving import server

    server.serve(options)


def app(options: AppOptions) -> None:
    """`midimamba app`: a page in the browser."""
    if importlib.util.find_spec("gradio") is None:
        raise InputError('gradio is not installed; run: pip install "midimamba[app]"')
    from midimamba.app import server

    server.run(options)


def chosen_tracks(numbers: Sequence[int] | None, names: Sequence[str]) -> list[int] | None:
    """Indices of the tracks that the user counts from 1.

    Raises:
        InputError: if there is no such track; the message names those that exist.
    """
    if wrong := [number for number in numbers or () if not 1 <= number <= len(names)]:
        listed = ", ".join(f"{number} {name!r}" for number, name in enumerate(names[:_LISTED], 1))
        more = ", …" if len(names) > _LISTED else ""
        raise InputError(f"there is no track {wrong[0]}: tracks can name {listed}{more}")
    return None if numbers is None else [number - 1 for number in numbers]


def _check_choosing(options: GenerateOptions, sampling: SamplingOptions, out: Path) -> None:
    """Refuse, before any work, options about choosing that cannot be."""
    if not options.discriminator and (sampling.best_of is not None or sampling.pick != PICKS[0]):
        raise InputError("--best-of and --pick choose by a discriminator: name one with --discriminator")
    if options.keep_unused is None:
        return
    unused = _new_folder(options.keep_unused, "the unused draws").absolute()
    if unused.is_relative_to(out.absolute()) or out.absolute().is_relative_to(unused):
        raise InputError(
            f"{options.keep_unused} and {out} are not apart, so unused draws would pass for pieces: "
            "choose another --keep-unused"
        )


def _sample(
    model: Any, processor: Any, options: GenerateOptions, sampling: SamplingOptions, request: dict[str, Any]
) -> Any:
    """The pieces, chosen by discriminators if there are any, as [`~midimamba.generation.Chosen`]."""
    from midimamba.generation import Chosen, choose_scores, generate_scores

    if not options.discriminator:
        return Chosen(generate_scores(model, processor, sampling, **request), [], 1.0)
    from midimamba.evaluation.judges import load_judges
    from midimamba.modeling.judging import Ensemble

    judge = Ensemble(load_judges(options.discriminator, processor))
    keep = options.keep_unused is not None
    return choose_scores(model, processor, judge, sampling, keep_unused=keep, **request)


def _writer(options: RenderingOptions) -> Callable[[Path, dict[str, Any]], None]:
    """What writes scores to a new folder, all or none, with pictures and sound if they are wanted."""
    from midimamba.evaluation.rendering import draw_piano_roll, import_demo
    from midimamba.evaluation.sound import check_encoder, load_soundfont, render_sounds
    from midimamba.files import whole_folder

    soundfont = b""
    if options.render:
        import_demo("matplotlib.figure")
        check_encoder(options.format)
        soundfont = load_soundfont(options.soundfont)

    def write(out: Path, scores: dict[str, Any]) -> None:
        with whole_folder(out) as folder:
            pieces = {folder / f"{name}.mid": score for name, score in scores.items()}
            for file, score in pieces.items():
                score.dump_midi(file)
                if options.render:
                    draw_piano_roll(score, file.with_suffix(".png"), title=file.stem)
            if options.render:
                sounds = {file.with_suffix(f".{options.format}"): score for file, score in pieces.items()}
                render_sounds(sounds, soundfont)

    return write


def _list_controls(model: str) -> None:
    """Print one control per line, with its values."""
    from midimamba.loading import load_processor
    from midimamba.tokenization.controls import NO_CONTROLS

    controls = load_processor(model).controls
    if not controls:
        raise InputError(NO_CONTROLS)
    for name, values in controls.items():
        show(f"{name}: {' '.join(values)}")


def _read_controls(pairs: Sequence[str]) -> dict[str, list[str]]:
    """`["instruments=violin", "instruments=drums"]` as `{"instruments": ["violin", "drums"]}`."""
    controls: dict[str, list[str]] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if not (name and value):
            raise InputError(f"--control {pair!r} is not a request: write --control NAME=VALUE, such as key=C-major")
        controls.setdefault(name, []).append(value)
    return controls


def play(options: PlayOptions) -> None:
    """`midimamba play`: a model to a MIDI port."""
    from midimamba import playing

    if options.list_ports:
        for name in playing.port_names():
            show(name)
        return
    if options.model is None:
        raise InputError("MODEL is missing: name it first, or with --model; see --help")
    controls = _read_controls(options.control)
    name = playing.choose_port(options.port)  # what is missing is found before the model is loaded
    from midimamba.generation import load_pair
    from midimamba.streaming import stream
    from midimamba.tokenization.ingest import MidiRefusedError

    model, processor = load_pair(options.model)
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    sampling = SamplingOptions(num=1, temperature=options.temperature, top_p=options.top_p, seed=seed)
    if options.bars is not None:
        sampling = replace(sampling, bars=options.bars)
    try:
        notes = stream(model, processor, options.prompt, sampling, controls=controls, endless=options.bars is None)
    except MidiRefusedError as error:
        raise InputError(f"{options.prompt} cannot be continued: {error.reason}") from error
    with playing.open_port(name) as port, playing.Ahead(notes) as ahead, playing.stopped_by_signals():
        show(f"playing to {name}, seed {seed}: Ctrl-C stops")
        playing.Player(port).play(ahead)


def evaluate(options: EvaluateOptions) -> None:
    """`midimamba evaluate`: generated music beside held-out music."""
    from midimamba.evaluation.comparison import compare, model_figures, read_reference
    from midimamba.evaluation.comparison_page import check_target, figures_table, write_comparison
    from midimamba.evaluation.samples import read_folder
    from midimamba.generation import generate_samples, load_pair

    check_can_be_made(options.out)
    check_target(options.out)
    names = ["music", "reference", "split", "seed"]
    folder, pair = Path(options.music), None
    if folder.is_dir() and not (folder / "config.json").is_file():
        if (name := first_given(options, ("num", "max_new_tokens", "temperature", "top_p"))) is not None:
            raise InputError(f"{name} is for sampling from a generator, and {folder} holds MIDI files: leave it out")
        samples = read_folder(folder)
    else:
        names += ["temperature", "top_p", "max_new_tokens"]
        pair = load_pair(options.music)
    reference = read_reference(options.reference, options.split, options.bars)
    figures = {}
    if pair is not None:
        samples = generate_samples(*pair, options.sampling)
        figures = model_figures(*pair, reference, options.num, options.length, options.temperature, options.seed)
    found = compare(samples, reference, options.length, options.seed)
    found.figures.update(figures)
    settings = {name: getattr(options, name) for name in names}
    write_comparison(options.out, f"{options.music} beside {options.reference}", found, reference, settings)
    print(figures_table(found.figures))
    print()
    show(f"the whole report is in {options.out.with_suffix('.md')}")


def listen(options: ListenOptions) -> None:
    """`midimamba listen`: a blind listening test of several sources of music, or its scores."""
    if options.score is not None:
        _score_answers(options.score, options)
        return
    from midimamba.evaluation import listening

    out = _new_folder(options.out, "the test")
    drawn = listening.draw_arms(options.paths, options.num, options.bars, options.seed)
    listening.write_listening_test(
        out,
        {arm: list(draw.pieces.values()) for arm, draw in drawn.items()},
        options.seed,
        options.bars,
        sources={arm: list(draw.pieces) for arm, draw in drawn.items()},
        soundfont=options.soundfont,
    )
    for arm, draw in drawn.items():
        if draw.passed_over:
            show(f"{arm}: passed over {len(draw.passed_over)} files that cannot be read or heard")
    show(f"{options.num * len(drawn)} pieces in {out}: give listeners everything in it except key.json")


def _score_answers(test: Path, options: ListenOptions) -> None:
    from midimamba.evaluation import listening

    if (name := first_given(options, ("out", "num", "bars", "seed", "soundfont"))) is not None:
        raise InputError(f"--score prints its tables and makes no test: leave out --{name}")
    if len({path.resolve() for path in options.paths}) < len(options.paths):
        raise InputError("a file of answers is named twice, so its listener would count twice: name it once")
    key = listening.read_key(test)
    answers = [listening.read_answers(path, key) for path in options.paths]
    print(listening.scores_table(listening.score_answers(key, answers)))


def convert(options: ConvertOptions) -> None:
    """`midimamba convert`: a file of music to one of another kind."""
    from midimamba.converting import read_music, writer_of

    _check_is_new(options.out)
    write = writer_of(options.out, options.soundfont)
    score, changes = read_music(options.music)
    for change in [*changes, *write(score, options.out)]:
        show(f"{options.out}: {change}", file=sys.stderr)


def _check_is_new(file: Path) -> None:
    """Refused early if nothing could be written there at the end."""
    check_can_be_made(file)
    if file.exists():
        raise InputError(f"{file} already exists: choose another name or delete it")


def export(options: ExportOptions) -> None:
    """`midimamba export`: a generator to a file for programs without torch."""
    file = options.gguf or options.onnx
    assert file is not None  # checked by the options
    _check_is_new(file)
    from midimamba.loading import load_generator, load_processor

    model = load_generator(options.model)
    if options.onnx is not None:
        from midimamba.onnx_export import export_onnx

        export_onnx(model, file)
    else:
        from midimamba.gguf_export import export_gguf
        from midimamba.hub_cards.provenance import read_license

        export_gguf(
            model,
            file,
            load_processor(options.model),
            quantize=options.quantize,
            name=printable(Path(options.model).resolve().name),
            license=read_license(options.model),
        )
    show(f"the generator is in {file}, {file.stat().st_size / 1e6:.1f} MB")


def publish(options: PublishOptions) -> None:
    """`midimamba publish`: a run or a corpus to the Hub, or a page for a model that is there."""
    if options.space is not None:
        _make_space(options.space, options)
        return
    from midimamba.hub_cards.publish import publish as publish_run

    assert options.folder is not None  # checked by the options, as the next
    assert options.repo is not None
    done = publish_run(
        options.folder,
        options.repo,
        discriminators=options.discriminator,
        report=options.report,
        license=options.license,
        data_license=options.data_license,
        private=options.private,
    )
    for name, url in done.urls.items():
        show(f"{name}: {url}")
    if not (options.folder / "README.md").exists():
        if options.license is None:
            show("the card states no licence: name one with --license, such as cc-by-4.0", file=sys.stderr)
        if options.data_license is None and "corpus" not in done.urls:
            show("the card states no licence of the training music: name it with --data-license", file=sys.stderr)
    if done.left_out:
        show(f"not uploaded, because only files with known names are: {', '.join(done.left_out)}", file=sys.stderr)


def _make_space(model: str, options: PublishOptions) -> None:
    from midimamba.hub_cards import space

    if options.out is not None:
        out = _new_folder(options.out, "the Space")
        space.write_space(model, out)
        show(f"the Space is in {out}: upload it with `hf upload OWNER/NAME {out} . --repo-type space`")
    elif options.repo is not None:
        show(f"space: {space.publish_space(model, options.repo, private=options.private)}")


def demo(options: DemoOptions) -> None:
    """`midimamba demo`: the whole path on Bach's chorales."""
    from midimamba import demo as chorales

    chorales.run(options.out)


def info() -> None:
    """`midimamba info`: what is installed, and what it will run on."""
    import torch

    from midimamba.modeling.selective_scan import available_backends, choose_backend

    print(f"python {sys.version.split()[0]}")
    for package in ("midimamba", "torch", "transformers", "miditok", "symusic", "datasets", "accelerate", "trl"):
        print(f"{package} {importlib.metadata.version(package)}")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = f"cuda ({torch.cuda.get_device_name()})" if kind == "cuda" else kind
    print(f"device: {device}, {torch.get_num_threads()} threads of {os.cpu_count()} processors")
    try:
        scan = choose_backend(kind)
    except ValueError as error:
        raise InputError(str(error)) from error
    print(f"scan: {scan} (of {', '.join(available_backends(kind))})")
