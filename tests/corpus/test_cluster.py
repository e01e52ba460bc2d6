"""Corpora that are made in tasks: the same as on one machine, whatever runs the tasks and whatever kills them."""

import hashlib
import importlib.util
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from midimamba.corpus.addresses import Folder
from midimamba.corpus.build import tokenize_corpus
from midimamba.corpus.load import SPLITS, load_corpus
from midimamba.corpus.options import ClusterOptions, CorpusOptions
from midimamba.errors import InputError
from midimamba.hub_cards.publish_corpus import collect_corpus
from support import command, make_score

pytest.importorskip("datatrove", reason="datatrove is not installed: pip install -e '.[cluster]'")
from midimamba.corpus import cluster_steps
from midimamba.corpus.cluster import tokenize_on_cluster

LOCAL = ClusterOptions(executor="local", tasks=3)
# In this process, so that tests can replace parts of it and look at what is in memory.
ALONE = CorpusOptions(vocab_size=None, num_workers=1)


@pytest.fixture
def music(tmp_path: Path) -> Path:
    """Files, archives, duplicates and files that cannot be used, with a manifest."""
    folder = tmp_path / "music"
    (folder / "more").mkdir(parents=True)
    for seed in range(14):
        make_score(seed, bars=2).dump_midi(folder / f"{seed:02}.mid")
    shutil.copy(folder / "03.mid", folder / "more" / "again.mid")
    shutil.copy(folder / "00.mid", folder / "zz.mid")
    with zipfile.ZipFile(folder / "more" / "some.zip", "w") as archive:
        for seed in (3, 20, 21, 22):
            archive.writestr(f"{seed}.mid", make_score(seed, bars=2).dumps_midi())
    (folder / "broken.mid").write_bytes((folder / "01.mid").read_bytes()[:40])
    (folder / "broken.zip").write_bytes(b"PK no archive")
    (folder / "notes.txt").write_text("not music")
    rows = "file,split,mood\n02.mid,test,sad\nmore/again.mid,validation,glad\n05.mid,train,sad\n"
    (folder / "manifest.csv").write_text(rows)
    return folder


def assert_same(one: Path, other: Path | str) -> None:
    """Two corpora with equal rows, in the same order, and equal bytes in everything else but the rows' format."""
    (rows, _), (others, _) = load_corpus(one), load_corpus(other)
    for split in SPLITS:
        assert others[split].features == rows[split].features
        assert others[split].to_dict() == rows[split].to_dict()
    if isinstance(other, str):
        return
    files = sorted(path.relative_to(one) for path in (one / "tokenizer").rglob("*") if path.is_file())
    assert Path("tokenizer/miditok.json") in files
    for name in (*files, Path("quarantine.jsonl")):
        assert (other / name).read_bytes() == (one / name).read_bytes(), name
    report, second = (json.loads((folder / "corpus.json").read_text()) for folder in (one, other))
    assert set(second.pop("written")) >= {"corpus.json", "quarantine.jsonl", "tokenizer/miditok.json"}
    assert report.pop("written")
    assert second == report


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        CorpusOptions(vocab_size=800, controls=("key", "bars"), labels=("mood",), training_tokens=1500),
        CorpusOptions(tokenization="CPWord"),
        CorpusOptions(vocab_size=None, limit=15, seed=3, valid_fraction=0.0, test_fraction=0.0),
    ],
    ids=["bpe-controls-labels", "several-vocabularies", "limit"],
)
def test_any_number_of_tasks_makes_the_corpus_of_one_machine(
    options: CorpusOptions, music: Path, tmp_path: Path
) -> None:
    report = tokenize_corpus(str(music), tmp_path / "plain", options)
    assert report["duplicates"] == (0 if options.limit else 3)
    assert report["refused"] == 2
    for tasks in (1, 8):
        out = tmp_path / f"of-{tasks}"
        tokenize_on_cluster(str(music), str(out), options, ClusterOptions("local", tasks))
        assert_same(tmp_path / "plain", out)
        assert tasks // 2 < len(list((out / "data").glob("train-*.parquet"))) <= tasks
    assert sorted(path.name for path in tmp_path.iterdir()) == ["music", "of-1", "of-8", "plain"]


@pytest.mark.slow
def test_a_data_set_is_divided_by_rows(tmp_path: Path) -> None:
    contents = [make_score(seed % 9, bars=2).dumps_midi() for seed in range(11)] + [b"broken", None]
    splits = ["train", "test", None] * 4 + [None]
    rows = Dataset.from_dict({"midi": contents, "split": splits})
    (tmp_path / "set").mkdir()
    rows.to_parquet(tmp_path / "set" / "rows.parquet")
    tokenize_corpus(str(tmp_path / "set"), tmp_path / "plain", ALONE)
    for tasks in (1, 4, 20):
        tokenize_on_cluster(
            str(tmp_path / "set"), str(tmp_path / f"of-{tasks}"), ALONE, ClusterOptions("local", tasks)
        )
        assert_same(tmp_path / "plain", tmp_path / f"of-{tasks}")


def test_a_corpus_can_be_made_and_read_at_any_address(
    music: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    out, work = f"memory://{tmp_path.name}/out", f"memory://{tmp_path.name}/work"
    there = ClusterOptions("local", 3, work)
    tokenize_corpus(str(music), tmp_path / "plain", ALONE)
    report = tokenize_on_cluster(str(music), out, ALONE, there)
    assert_same(tmp_path / "plain", out)
    assert report is not None
    assert "data/train-00000-of-00003.parquet" in report["written"]
    assert not Folder(work).names()
    assert tokenize_on_cluster(str(music), out, ALONE, there) == report
    with pytest.raises(InputError, match="exists already and holds something else"):
        tokenize_on_cluster(str(music), out, CorpusOptions(vocab_size=800, num_workers=1), there)
    # Another corpus at the same address is not taken for the copy of the first one.
    Folder(out).remove()
    (music / "00.mid").unlink()
    tokenize_on_cluster(str(music), out, ALONE, there)
    tokenize_corpus(str(music), tmp_path / "fewer", ALONE)
    assert_same(tmp_path / "fewer", out)
    with pytest.raises(InputError, match=r"is not a tokenized corpus: it has no corpus\.json"):
        load_corpus(f"memory://{tmp_path.name}/nothing")


def test_a_corpus_of_tasks_can_be_published_and_brought_up_to_date_by_one_machine(music: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tokenize_on_cluster(str(music), f"file://{out}", ALONE, LOCAL)
    collect_corpus(out, tmp_path / "published")
    published, _ = load_corpus(tmp_path / "published")
    assert len(published["train"]) == len(load_corpus(out)[0]["train"])
    make_score(50, bars=2).dump_midi(music / "50.mid")
    report = tokenize_corpus(str(music), out, ALONE)
    assert sum(split["pieces"] for split in report["splits"].values()) == 18
    assert not (out / "data").exists()


def bytes_of(folder: Path) -> dict[str, str]:
    """Digests of all files."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def in_a_group_of_its_own(*arguments: Any) -> None:
    os.setpgid(0, 0)
    tokenize_on_cluster(*arguments)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the run that is killed is a fork of this process")
def test_a_run_that_is_killed_twenty_times_ends_with_the_same_files(music: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    options = CorpusOptions(vocab_size=750, num_workers=2)
    cluster = ClusterOptions("local", 6)
    start = time.monotonic()
    tokenize_on_cluster(str(music), str(tmp_path / "calm"), options, cluster)
    seconds = time.monotonic() - start
    kills, runs, out = 0, 0, tmp_path / "out"
    while kills < 20 or runs == 0:
        arguments = (str(music), str(out), options, cluster)
        process = multiprocessing.get_context("fork").Process(target=in_a_group_of_its_own, args=arguments)
        process.start()
        process.join(draw.uniform(0, 0.9 * seconds) if kills < 20 else None)
        if process.exitcode is None:
            os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
            runs += 1
            assert bytes_of(out) == bytes_of(tmp_path / "calm")
            shutil.rmtree(out)
    assert kills == 20
    shutil.rmtree(out, ignore_errors=True)
    tokenize_on_cluster(str(music), str(out), options, cluster)
    assert bytes_of(out) == bytes_of(tmp_path / "calm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calm", "music", "out"]


def test_what_a_killed_run_was_writing_is_no_part_of_the_corpus(
    music: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (str(music), str(tmp_path / "out"), ALONE, LOCAL)
    with monkeypatch.context() as patch:
        broken(cluster_steps.FinishCorpus, patch)
        with pytest.raises(InputError, match="the disk is full"):
            tokenize_on_cluster(*arguments)
    half = tmp_path / ".out.work" / "corpus"
    (half / ".unfinished-corpus.json-a1").touch()
    (half / "data" / ".unfinished-train-a1").touch()
    tokenize_on_cluster(*arguments)
    tokenize_on_cluster(str(music), str(tmp_path / "calm"), ALONE, LOCAL)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "calm")


def broken(step: type[Any], monkeypatch: pytest.MonkeyPatch, task: int = 0) -> None:
    """Let a task fail as if the disk were full."""
    original = step.run

    def run(self: Any, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        if rank == task:
            raise InputError("the disk is full")
        original(self, data, rank, world_size)

    monkeypatch.setattr(step, "run", run)


def test_a_run_that_goes_on_repeats_no_task(music: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (str(music), str(tmp_path / "out"), ALONE, LOCAL)
    for step, task in ((cluster_steps.ReadFiles, 2), (cluster_steps.EncodePieces, 1), (cluster_steps.FinishCorpus, 0)):
        with monkeypatch.context() as patch:
            broken(step, patch, task)
            with pytest.raises(InputError, match="the disk is full"):
                tokenize_on_cluster(*arguments)
        assert not (tmp_path / "out").exists()
        for number in range(task):  # what was done may not be done again
            monkeypatch.setattr(step, "run", never_for(step.run, number))
    tokenize_on_cluster(*arguments)
    tokenize_corpus(str(music), tmp_path / "plain", ALONE)
    assert_same(tmp_path / "plain", tmp_path / "out")


def never_for(run: Callable[..., None], task: int) -> Callable[..., None]:
    def guarded(self: Any, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        assert rank != task
        run(self, data, rank, world_size)

    return guarded


def test_a_run_starts_again_when_the_source_has_changed(
    music: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        broken(cluster_steps.MergeParts, patch)
        with pytest.raises(InputError, match="the disk is full"):
            tokenize_on_cluster(str(music), str(out), ALONE, LOCAL)
    with pytest.raises(InputError, match="belongs to a run with other options"):
        tokenize_on_cluster(str(music), str(out), ALONE, ClusterOptions("local", 4))
    make_score(60, bars=2).dump_midi(music / "60.mid")
    tokenize_on_cluster(str(music), str(out), ALONE, LOCAL)
    assert "the source is not as it was: the run starts again" in capsys.readouterr().err
    tokenize_corpus(str(music), tmp_path / "plain", ALONE)
    assert_same(tmp_path / "plain", out)


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest)
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tasks 4", "--tasks is for tasks: add --executor local"),
        ("--slurm partition=cpu", "--slurm is for tasks: add --executor slurm"),
        ("--executor local --slurm partition=cpu", "--slurm is for --executor slurm"),
        ("--executor slurm --slurm cpu", "--slurm cpu: write NAME=VALUE"),
        ("--executor slurm --tasks 2", "Add --slurm partition=NAME"),
        ("--executor local --tasks 0", "tasks"),
        ("--executor local --streaming", "leave out --streaming"),
        ("--executor local --work nosuch://x", "nosuch://x cannot be used"),
        ("--executor local --work {music}", "holds something else (00.mid)"),
        ("--executor slurm --slurm partition=cpu", "there is no sbatch here"),
        ("--executor local --out s3x://bucket/x", "s3x://bucket/x cannot be used"),
        ("--executor local --out memory://somewhere/x", "is not a path: name a folder that all tasks see with --work"),
        ("--out memory://somewhere/x", "is not a folder of this machine: add --executor local, slurm or ray"),
        ("--executor local --out {music}", "holds something else"),
        ("--executor local --out {music}/00.mid/x", "is not a folder"),
        ("--executor local --out .", "name a new one"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_leaves_nothing(
    flags: str,
    message: str,
    music: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    words = ["--out", tmp_path / "out", *flags.format(music=music).split()]
    assert command(monkeypatch, "tokenize", music, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("package", "executor"), [("datatrove", "local"), ("ray", "ray")])
def test_a_missing_package_names_its_extra(
    package: str,
    executor: str,
    music: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    without(package, monkeypatch)
    assert command(monkeypatch, "tokenize", music, "--out", tmp_path / "out", "--executor", executor) == 2
    (line,) = capsys.readouterr().err.splitlines()
    extra = {"datatrove": "cluster"}.get(package, package)
    assert f'needs {package}: pip install "midimamba[{extra}]"' in line


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_task_is_one_line(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "music").mkdir()
    (tmp_path / "music" / "a.mid").write_bytes(b"no music")
    flags = ("--out", tmp_path / "out", "--executor", "local", "--num-workers", workers)
    assert command(monkeypatch, "tokenize", tmp_path / "music", *flags) == 2
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith(f"error: no file of {tmp_path / 'music'} can be used: the first, a.mid:")
    assert not (tmp_path / "out").exists()


def write_programs(folder: Path, *, failing: bool = False) -> None:
    """Programs of Slurm that run jobs at once, on this machine, and write down how they were called."""
    folder.mkdir()
    sbatch = f"""#!{sys.executable}
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
with open({str(folder / "calls")!r}, "a") as calls:
    calls.write(" ".join(sys.argv[1:-1]) + "\\n" + script)
if {failing}:
    sys.exit("sbatch: error: invalid partition specified")
first, last = re.search(r"--array=(\\d+)-(\\d+)", script).groups()
export = dict(item.split("=") for item in re.findall(r"--export=ALL,(\\S+)", " ".join(sys.argv)))
for index in range(int(first), int(last) + 1):
    place = {{"SLURM_ARRAY_TASK_ID": str(index), "SLURM_NODELIST": "here"}} if export else {{}}
    done = subprocess.run(["bash", sys.argv[-1]], env=os.environ | export | place, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
print("Submitted batch job", 7)
"""
    srun = '#!/bin/bash\nwhile [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done\nexec "$@"\n'
    programs = {"sbatch": sbatch, "srun": srun, "scontrol": "#!/bin/bash\necho here\n", "squeue": "#!/bin/bash\n"}
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


SLURM = ("--executor", "slurm", "--tasks", "2", "--slurm", "partition=cpu", "--slurm", "mem-per-cpu=3G")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no Slurm on Windows")
def test_jobs_of_slurm_make_the_same_corpus(
    music: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_programs(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    arguments = ("tokenize", "music", "--out", "out", "--vocab-size", "none", *SLURM)
    assert command(monkeypatch, *arguments) == 0
    assert "the last job is 7" in capsys.readouterr().err
    tokenize_corpus("music", tmp_path / "plain", CorpusOptions(vocab_size=None))
    assert_same(tmp_path / "plain", tmp_path / "out")
    calls = (tmp_path / "bin" / "calls").read_text()
    for option in ("partition=cpu", "mem-per-cpu=3G", "time=24:00:00", "array=0-1", "kill-on-invalid-dep=yes"):
        assert f"#SBATCH --{option}\n" in calls
    assert "qos" not in calls
    assert calls.count("RUN_OFFSET=0 --dependency=afterok:7\n") == 3  # each stage waits for the one before
    assert not (tmp_path / ".out.work").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="there is no Slurm on Windows")
def test_jobs_that_slurm_refuses_or_still_has_are_told(
    music: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_programs(tmp_path / "bin", failing=True)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    arguments = ("tokenize", music, "--out", tmp_path / "out", *SLURM)
    assert command(monkeypatch, *arguments) == 2
    assert "sbatch refuses a job (exit code 1)" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / ".out.work" / "submitted.txt").write_text("7")
    (tmp_path / "bin" / "squeue").write_text("#!/bin/bash\necho 7 cpu midimamba\n")
    assert command(monkeypatch, *arguments) == 0
    assert "job 7 is not done yet" in capsys.readouterr().err


@pytest.mark.slow
def test_a_ray_cluster_makes_the_same_corpus_and_tells_why_a_task_fails(
    music: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install -e '.[ray]'")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # or other tests leave its workers no time
    options = CorpusOptions(vocab_size=None)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        tokenize_on_cluster(str(music), str(tmp_path / "out"), options, ClusterOptions("ray", 2))
        (tmp_path / "none").mkdir()
        (tmp_path / "none" / "a.mid").write_bytes(b"no music")
        with pytest.raises(InputError, match=r"1 of 1 tasks failed to merge parts: no file of .*task_00000\.log"):
            tokenize_on_cluster(str(tmp_path / "none"), str(tmp_path / "nothing"), options, ClusterOptions("ray", 2))
    finally:
        ray.shutdown()
    tokenize_corpus(str(music), tmp_path / "plain", options)
    assert_same(tmp_path / "plain", tmp_path / "out")
