"""Every benchmark, one after the other: `make bench`.

Results are written to `results/`, and intermediate files to `runs/bench`. A second start continues from the
intermediate files; delete the folder to start over. With `--quick` everything is so small that the whole takes ten
minutes on two cores. Its results show that everything runs but mean nothing, and are written to `runs/bench` as well.

The corpora and the parameters of SeqGAN's oracle are not part of the repository. `--corpora` names a folder with
nottingham.tar.gz, pop909.tar.gz, asap-perf.tar.gz, m21-chorales.tar.gz, hostile-core.tar.gz and seqgan-oracle.npz. If
one of them is missing, the benchmarks that need it are skipped, and the table at the end says so. The same holds for
packages that the extra `dev` does not bring.
"""

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path("benchmarks", "results")
PRETRAIN = "-m midimamba.training.pretrain --config training/recipes/chorales-cpu.yaml --disable_tqdm true"


@dataclass(frozen=True)
class Step:
    """
    A command of the table.

    Args:
        name (`str`): the name of its results.
        command (`str`): the command after `python`. `{work}` stands for the folder of intermediate files, `{corpora}`
            for the folder of corpora, and `{music21}` for that of the corpora that music21 brings.
        quick (`str`, *optional*): options to add to make it small; they override those of the command.
        needs (`tuple[str, ...]`, *optional*): the files of the folder of corpora that it needs.
        makes (`str`, *optional*): a file of the folder of intermediate files. If it exists, the step is done.
        packages (`tuple[str, ...]`, *optional*): modules that it needs and the extra `dev` does not bring.
    """

    name: str
    command: str
    quick: str = ""
    needs: tuple[str, ...] = ()
    makes: str = ""
    packages: tuple[str, ...] = ()


def _learned(name: str, source: str, needs: tuple[str, ...] = ()) -> tuple[Step, ...]:
    """A corpus and a generator that is trained on it: the start of later benchmarks."""
    tokenize = f"-m midimamba.cli tokenize {source} --vocab-size 800 --out {{work}}/{name}-data"
    pretrain = f"{PRETRAIN} --data {{work}}/{name}-data --output_dir {{work}}/{name}-model"
    return (
        Step(f"{name} corpus", tokenize, _FEW_PIECES, needs, f"{name}-data/corpus.json"),
        Step(f"{name} model", pretrain, _TINY_MODEL, needs, f"{name}-model/config.json"),
    )


def _on(corpus: str, script: str) -> str:
    """The command of a script that starts from the generator of a corpus."""
    return f"benchmarks/{script} --model {{work}}/{corpus}-model --data {{work}}/{corpus}-data"


def _music(name: str, data: str, needs: tuple[str, ...] = (), options: str = "") -> Step:
    """What discriminators teach, on a corpus in the folder of intermediate files."""
    command = f"benchmarks/music.py --data {{work}}/{data} --split test --rows {{work}}/music-{name}.jsonl {options}"
    command += f" --plot benchmarks/results/music-{name}.png"
    quick = "--seeds 1 --num 24 --bars 4 --steps 5 --draws 64 --temperatures 1.0 --runs chosen distilled"
    quick += f" --plot {{work}}/music-{name}.png"
    return Step(f"music-{name}", command, quick, needs)


def _repetition(name: str, data: str, needs: tuple[str, ...] = (), options: str = "") -> Step:
    """Which generator repeats best, on a corpus in the folder of intermediate files."""
    command = f"benchmarks/repetition.py --data {{work}}/{data} --rows {{work}}/repetition-{name}.jsonl {options}"
    quick = "--seeds 1 --seconds 0.5 --length 64 --batch-size 2 --num 24 --bars 4 --temperatures 0.9 --arms mamba"
    return Step(f"repetition-{name}", command, quick, needs)


def _infilling(name: str, needs: tuple[str, ...], options: str = "") -> Step:
    """What infilling gains and costs, on a corpus in the folder of intermediate files."""
    command = f"benchmarks/infilling.py --data {{work}}/{name}-infill --rows {{work}}/infilling-{name}.jsonl {options}"
    return Step(f"infilling-{name}", command, "--seeds 1 --steps 5 --length 256 --batch-size 2 --pieces 8", needs)


def _tuned(name: str, needs: tuple[str, ...] = ()) -> tuple[Step, ...]:
    """What adversarial training does to the generator of a corpus: its stability, and its controls."""
    ablation = _on(name, "ablation.py") + f" --rows {{work}}/ablation-{name}.jsonl"
    controls = '--arms "constant alone" "random alone" --seeds 5'
    return (
        Step(f"stability-{name}", f"{ablation} --arms stable --seeds 10", _TINY_TUNING, needs),
        Step(f"controls-{name}", f"{ablation} {controls}", _TINY_TUNING, needs),
    )


_FEW_PIECES = "--limit 120 --test-fraction 0.25 --valid-fraction 0.25"
_TINY_MODEL = "--max_steps 8 --eval_steps 8 --save_steps 8 --hidden_size 32 --num_hidden_layers 2 --sequence_length 64"
_TINY_TUNING = "--steps 1 --length 32 --seeds 1"
_ONLY_LIKELIHOOD = '--arms mamba "mamba, look-back" --num 32 --temperatures'
_NOTTINGHAM, _POP909 = ("nottingham.tar.gz",), ("pop909.tar.gz",)
_ASAP = (*_POP909, "asap-perf.tar.gz")
_MEMORY = "benchmarks/memory.py --rollout-mb 320 --limit-gb 12"
_SMALL_MEMORY = "--length 16 --rollouts 2 --positions 2 --micro-batch 2 --batch 4 --rollout-mb 8 --naive-length 8 "

STEPS = (
    Step("scan-512", "benchmarks/scan.py --seq-len 512", "--seq-len 64 --layers 1 --repeats 1"),
    Step(
        "scan-512-mambapy",
        "benchmarks/scan.py --seq-len 512 --mambapy --their-repeats 3",
        "--seq-len 64 --layers 1 --repeats 1 --their-repeats 1",
    ),
    Step("scan-memory", "benchmarks/scan_memory.py", "--length 64 128 --layers 1 --hidden 32"),
    Step("training-step", "benchmarks/training_step.py", "--length 32 64 --size tiny --repeats 1"),
    Step("sampling", "benchmarks/sampling.py", "--batch 1 --length 32 --layers 1 --repeats 1"),
    Step(
        "streaming",
        "benchmarks/streaming.py",
        "--seeds 2 --late 150 --steps 8 --rounds 2 --bars 8 --warm-up 4 --layers 1 --hidden 32",
    ),
    Step("grammar", "benchmarks/grammar.py", "--layers 1 --hidden 32 --tokens 40 --repeats 1"),
    Step("constraints", "benchmarks/constraints.py", "--num 12 --combinations 4 --each 4"),
    Step(
        "onnx",
        "benchmarks/onnx_step.py",
        "--batch 1 --length 16 --layers 1 --hidden 32 --repeats 1 --layouts mamba",
    ),
    Step(
        "llama-cpp",
        "benchmarks/gguf_step.py",
        "--batch 1 --threads 1 --length 16 --layers 1 --hidden 32 --repeats 1",
        packages=("llama_cpp",),
    ),
    Step("rollout", "benchmarks/rollout.py", "--length 32 --rollouts 2 --positions 2 --layers 1 --skip-all"),
    Step(
        "memory",
        f"{_MEMORY} --length 256 512 1024 --rollouts 4 1 16 --positions 16 --micro-batch 4 --naive-length 16 32 64",
        _SMALL_MEMORY + "--layers 1 --hidden 32",
    ),
    Step(
        "memory-rollouts",
        f"{_MEMORY} --length 256 --rollouts 1 4 16 --positions 16 --micro-batch 4 --naive-length --repeats 3",
        _SMALL_MEMORY + "--layers 1 --hidden 32 --repeats 1",
    ),
    Step(
        "memory-4096",
        f"{_MEMORY} --length 4096 --batch 4 --rollouts 4 --positions 16 --micro-batch 1 --naive-length "
        "--gradient-checkpointing 1",
        _SMALL_MEMORY + "--layers 1 --hidden 32",
    ),
    Step("look-back", "benchmarks/look_back.py", "--late 100 --steps 5 --layers 1 --hidden 32 --batch 2"),
    Step("serving", "benchmarks/serving.py", "--seconds 6 --settle 1"),
    Step("packing", "benchmarks/packing.py {corpora}/pop909.tar.gz", "--limit 20", _POP909),
    Step("ingestion", "benchmarks/ingestion.py {corpora}/hostile-core.tar.gz", "", ("hostile-core.tar.gz",)),
    Step(
        "tokenization",
        "benchmarks/tokenization.py {corpora}/nottingham.tar.gz",
        "--limit 40 --repeats 1",
        _NOTTINGHAM,
    ),
    Step(
        "tokenization-memory",
        "benchmarks/tokenization.py {corpora}/nottingham.tar.gz --memory 10000 100000 1000000",
        "--memory 50 100",
        _NOTTINGHAM,
    ),
    Step(
        "tokenization-memory-distinct",
        "benchmarks/tokenization.py --memory 10000 100000",
        "--memory 50 100",
    ),
    Step("cluster", "benchmarks/cluster.py --files 2000 20000", "--files 50 100"),
    Step(
        "corpora",
        "benchmarks/corpora.py {corpora}/nottingham.tar.gz {corpora}/m21-chorales.tar.gz {corpora}/pop909.tar.gz",
        "--limit 4 --tokenizations REMI",
        (*_NOTTINGHAM, "m21-chorales.tar.gz", *_POP909),
    ),
    Step(
        "oracle",
        "benchmarks/oracle.py --oracle {corpora}/seqgan-oracle.npz --rows {work}/oracle.jsonl "
        "--plot benchmarks/results/oracle.png",
        "--quick --seeds 1 --plot {work}/oracle.png",
        ("seqgan-oracle.npz",),
    ),
    Step("form-oracle", "benchmarks/form_oracle.py --rows {work}/form-oracle.jsonl", "--quick --seeds 1"),
    *_learned("chorales", "chorales"),
    *_tuned("chorales"),
    _music("chorales", "chorales-data", options="--seeds 5"),
    Step(
        "ablation-chorales",
        _on("chorales", "ablation.py")
        + " --steps 20 --learning-rate 2e-4 --seeds 2 --rows {work}/ablation-chorales.jsonl",
        f"{_TINY_TUNING} --arms stable constant",
    ),
    _repetition("chorales", "chorales-data", options=f"--seconds 90 {_ONLY_LIKELIHOOD}"),
    *_learned("nottingham", "{corpora}/nottingham.tar.gz", _NOTTINGHAM),
    Step(
        "nottingham corpus without velocities",
        "-m midimamba.cli tokenize {corpora}/nottingham.tar.gz --vocab-size 800 "
        "--tokenizer-config benchmarks/no-velocities.yaml --out {work}/nottingham-notes",
        _FEW_PIECES,
        _NOTTINGHAM,
        "nottingham-notes/corpus.json",
    ),
    _repetition("nottingham", "nottingham-notes", _NOTTINGHAM),
    *_tuned("nottingham", _NOTTINGHAM),
    _music("nottingham", "nottingham-notes", _NOTTINGHAM),
    Step(
        "mammoth corpus",
        "-m midimamba.cli tokenize {music21}/ryansMammoth --vocab-size 800 "
        "--tokenizer-config benchmarks/no-velocities.yaml --seed 1 --out {work}/mammoth-notes",
        _FEW_PIECES,
        makes="mammoth-notes/corpus.json",
    ),
    _music(
        "mammoth",
        "mammoth-notes",
        options='--seeds 5 --runs distilled "distilled, constant" '
        '"distilled, more draws" "distilled, more draws, constant" "distilled, more draws, best of 8"',
    ),
    Step(
        "nottingham corpus for infilling",
        "-m midimamba.cli tokenize {corpora}/nottingham.tar.gz --vocab-size 800 "
        "--tokenizer-config benchmarks/no-velocities.yaml --infill --out {work}/nottingham-infill",
        _FEW_PIECES,
        _NOTTINGHAM,
        "nottingham-infill/corpus.json",
    ),
    _infilling("nottingham", _NOTTINGHAM),
    Step(
        "pop909 corpus for infilling",
        "-m midimamba.cli tokenize {corpora}/pop909.tar.gz --vocab-size 800 --infill --out {work}/pop909-infill",
        _FEW_PIECES,
        _POP909,
        "pop909-infill/corpus.json",
    ),
    _infilling("pop909", _POP909, "--length 1024 --batch-size 4"),
    Step(
        "recipe",
        "benchmarks/recipe.py --data {work}/chorales-data --rows {work}/recipe.jsonl",
        "--seconds 1 --arms base",
    ),
    _learned("pop909", "{corpora}/pop909.tar.gz", _POP909)[0],
    Step(
        "asap corpus with the tokenizer of pop909",
        "-m midimamba.cli tokenize {corpora}/asap-perf.tar.gz --tokenizer {work}/pop909-data/tokenizer "
        "--out {work}/asap-data",
        "--limit 20",
        _ASAP,
        "asap-data/corpus.json",
    ),
    Step(
        "figure",
        "benchmarks/figure.py --data {work}/pop909-data {work}/asap-data --rows {work}/figure.jsonl "
        "--plot benchmarks/results/figure.png",
        "--seeds 1 --steps 6 --evaluations 3 --length 64 --batch-size 2 --layouts mamba moe-mamba --rates 3e-3 "
        "--plot {work}/figure.png",
        _ASAP,
    ),
    _music("pop909", "pop909-data", _POP909, "--seeds 5"),
    _repetition("pop909", "pop909-data", _POP909, f"--seconds 120 --length 1024 --batch-size 4 {_ONLY_LIKELIHOOD}"),
)


def command_of(step: Step, quick: bool, work: Path, corpora: Path | None, results: Path) -> list[str]:
    """The command line of a step, to be run in the root of the repository."""
    text = f"{step.command} {step.quick}" if quick else step.command
    found = importlib.util.find_spec("music21")
    music21 = Path(found.origin).with_name("corpus") if found and found.origin else ""
    line = [sys.executable, *shlex.split(text.format(work=work, corpora=corpora or "", music21=music21))]
    return [*line, "--out", str(results / f"{step.name}.json")] if _is_script(step) else line


def _is_script(step: Step) -> bool:
    """Whether a step measures something, and so has a result."""
    return step.command.startswith("benchmarks/")


def make(step: Step, command: list[str], work: Path) -> tuple[str, str, str]:
    """Run a step, with its output in a separate log file; return its row of the table."""
    print(f"==> {step.name}: python {shlex.join(command[1:])}", flush=True)
    start = time.perf_counter()
    log = ROOT / work / f"{step.name.replace(' ', '-')}.log"
    with log.open("w") as file:
        code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file).returncode
    seconds = f"{time.perf_counter() - start:.0f} s"
    if code:
        return step.name, f"failed: {log}", seconds
    ratio = json.loads((ROOT / command[-1]).read_text()).get("ratio") if _is_script(step) else None
    return step.name, "done" if ratio is None else f"{ratio}", seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/all.py --quick --corpora ../corpora",
    )
    parser.add_argument("--quick", action="store_true", help="make everything small; the figures then mean nothing")
    parser.add_argument(
        "--only", nargs="+", metavar="STEP", choices=[step.name for step in STEPS], help="run only these steps"
    )
    parser.add_argument("--corpora", type=Path, help="folder of the corpora and of the oracle's parameters")
    args = parser.parse_args()

    # All paths are relative to the root of the repository, also those in the results.
    work = Path("runs", "bench", "quick" if args.quick else "full")
    (ROOT / work).mkdir(parents=True, exist_ok=True)
    corpora = Path(os.path.relpath(args.corpora, ROOT)) if args.corpora else None
    results = work if args.quick else RESULTS
    table = []
    for step in STEPS:
        if args.only and step.name not in args.only:
            continue
        missing = [name for name in step.needs if corpora is None or not (ROOT / corpora / name).exists()]
        absent = [name for name in step.packages if importlib.util.find_spec(name) is None]
        if absent:
            table.append((step.name, "skipped", f"{', '.join(absent)} is not installed"))
        elif missing:
            table.append((step.name, "skipped", f"--corpora has no {', '.join(missing)}"))
        elif not (step.makes and (ROOT / work / step.makes).exists()):
            table.append(make(step, command_of(step, args.quick, work, corpora, results), work))
    print("\n| step | ratio | |\n|---|---:|---|")
    for row in table:
        print("| " + " | ".join(row) + " |")
    sys.exit(any(row[1].startswith("failed") for row in table))


if __name__ == "__main__":
    main()
