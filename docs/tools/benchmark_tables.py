"""Tables of the pages from the results in benchmarks/results.

A page says `<!-- results: NAME -->` where it wants the table NAME. No figure of a table is written by hand. If a
result is missing or lacks a figure that a table shows, the build ends with one line that names the file.
"""

from pathlib import Path

from result_tables import (
    ADDRESS,
    RESULTS,
    TABLES,
    TIMES,
    Result,
    ResultError,
    Row,
    interval,
    markdown,
    number,
    read_result,
    spread,
    table,
    times,
)


def render(name: str, folder: Path = RESULTS) -> str:
    """
    The Markdown of a table.

    Args:
        name (`str`): one of `TABLES`, or `all` for a list of all results.
        folder (`Path`, *optional*): of the results.

    Raises:
        ResultError: if there is no such table, or a result cannot be used.
    """
    if name == "all":
        return all_results(folder)
    if name not in TABLES:
        raise ResultError(f"there is no table {name!r}: choose one of {', '.join(('all', *sorted(TABLES)))}")
    return TABLES[name].render(folder)


def all_results(folder: Path) -> str:
    """What every result compares, with its command, commit and machine."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ResultError(f"{folder} holds no results: restore benchmarks/results from the history")
    rows = []
    for path in paths:
        result = read_result(path)
        missing = {"compared", "command", "commit"} - result.keys()
        if missing:
            names = ", ".join(sorted(missing))
            raise ResultError(f"benchmarks/results/{path.name} does not say {names}: run its benchmark again")
        command = result["command"]
        command = command if isinstance(command, str) else f"{command[0]} (and {len(command) - 1} more)"
        name = f"[{path.stem}]({ADDRESS}/{path.name})"
        rows.append((name, str(result["compared"]), f"`{command.partition(' --out ')[0]}`", str(result["commit"])))
    return markdown(("result", "what it compares", "command", "commit"), rows, words=4)


@table("scan-512", "scan-512-mambapy", "scan-512-cuda")
def speed(plain: Result, mambapy: Result, cuda: Result) -> str:
    rows = []
    for result in (plain, mambapy, cuda):
        where = "one GPU" if result["gpu"] else "CPU"
        ours, theirs = result["our_seconds"], result["their_seconds"]
        rows.append((result["compared"], where, number(theirs, 2), number(ours, 2), times(result["ratio"])))
    sizes = plain["sizes"]
    shape = f"{sizes['batch']} {TIMES} {sizes['seq_len']} tokens"
    network = f"{sizes['num_hidden_layers']} layers of width {sizes['hidden_size']}"
    caption = f"A training pass of {shape}, {network}, in seconds:\n\n"
    return caption + markdown(("compared with", "on", "theirs", "midimamba", "ratio"), rows, words=2)


@table("training-step")
def layouts(result: Result) -> str:
    names = list(result["parameters"])
    rows = [
        (
            name,
            number(result["parameters"][name] / 1e6, 1),
            *(number(row["tokens_per_second"][name], 0) for row in result["rows"]),
        )
        for name in names
    ]
    lengths = [f"{number(row['length'], 0)} tokens" for row in result["rows"]]
    tokens = number(result["sizes"]["tokens"], 0)
    caption = f"Tokens per second in training, by the length of a sequence ({tokens} tokens at once):\n\n"
    return caption + markdown(("layout", "million parameters", *lengths), rows)


@table("sampling")
def sampling(result: Result) -> str:
    rows = [
        (
            number(row["batch"], 0),
            *(number(row["ms_per_step"][name]) for name in ("ours", "mamba", "llama")),
            times(row["ratio_mamba"], 1),
            times(row["ratio_llama"], 1),
        )
        for row in result["rows"]
    ]
    header = ("sequences", "midimamba", "transformers' Mamba", "a Llama", "against the Mamba", "against the Llama")
    return "Milliseconds for one token of every sequence:\n\n" + markdown(header, rows, words=0)


@table("look-back")
def look_back(result: Result) -> str:
    rows = [(name, number(ms)) for name, ms in result["ms_per_step"].items()]
    batch = number(result["sizes"]["batch"], 0)
    caption = f"Milliseconds for one token of {batch} sequences with the grammar, by the position in the piece:\n\n"
    return caption + markdown(("model", "ms"), rows)


@table("rollout")
def rollouts(result: Result) -> str:
    rows = [
        (
            number(row["positions"], 0),
            number(row["seconds"]["forked"]),
            number(row["seconds"]["reencoded"]),
            times(row["ratio_reencoded"], 2),
        )
        for row in result["rows"]
    ]
    sizes = result["sizes"]
    caption = f"Seconds for {sizes['rollouts']} roll-outs per place of a sequence of {sizes['length']} tokens:\n\n"
    return caption + markdown(("places", "from forked states", "every prefix read again", "ratio"), rows, words=0)


@table("memory")
def memory(result: Result) -> str:
    kinds = {"ours": "midimamba", "naive": "graph kept through sampling, no roll-outs"}
    rows = []
    for row in result["rows"]:
        peak = row["peak_mb"]
        shown = f"over {number(result['limit_gb'] * 1000, 0)}" if peak is None else number(peak, 0)
        rollouts = "none" if row["which"] == "naive" else number(row["rollouts"], 0)
        rows.append((kinds[row["which"]], number(row["length"], 0), rollouts, shown))
    caption = (
        f"Peak memory of an adversarial update of {result['sizes']['batch']} sequences, "
        f"{number(result['generator_parameters'] / 1e6, 0)} million parameters:\n\n"
    )
    return caption + markdown(("update", "tokens", "roll-outs", "MB"), rows)


@table("memory-4096")
def memory_of_long_pieces(result: Result) -> str:
    rows = [
        (
            number(row["length"], 0),
            number(row["rollouts"], 0),
            number(row["micro_batch"], 0),
            number(row["peak_mb"], 0),
        )
        for row in result["rows"]
    ]
    return markdown(("tokens", "roll-outs", "sequences at once", "MB"), rows, words=0)


@table("scan-memory")
def memory_of_training(result: Result) -> str:
    lengths = result["sizes"]["length"]
    ours, theirs = result["peak_mb"]["ours"], result["peak_mb"]["mambapy"]
    rows = [
        (number(length, 0), number(our, 0), number(their, 0))
        for length, our, their in zip(lengths, ours, theirs, strict=True)
    ]
    return markdown(("tokens", "midimamba, MB", "transformers with mambapy, MB"), rows, words=0)


@table("scan-gpu-512", "scan-gpu-2048", "scan-gpu-32768")
def gpu(*results: Result) -> str:
    rows = []
    for result in results:
        sizes, triton, chunked = result["sizes"], result["backends"]["triton"], result["backends"]["chunked"]
        rows.append(
            (
                number(sizes["batch"], 0),
                number(sizes["seq_len"], 0),
                number(triton["seconds"] * 1000, 1),
                number(chunked["seconds"] * 1000, 1),
                times(triton["of_roofline"]),
            )
        )
    header = ("sequences", "steps", "Triton, ms", "plain torch, ms", "Triton over the memory roofline")
    return "Forward and backward pass of the scan:\n\n" + markdown(header, rows, words=0)


@table("repetition-nottingham")
def repetition(result: Result) -> str:
    rows = []
    for name, arm in result["arms"].items():
        rows.append(
            (
                name,
                spread(arm["held_out_nll_per_note"]["value"]),
                interval(arm["held_out_nll_per_note"].get("minus_mamba")),
                spread(arm["bar_self_similarity_4"]["value"], 2),
                spread(arm["bar_self_similarity_8"]["value"], 2),
                f"{number(100 * arm['copied_runs_12']['value'][0], 1)} %",
            )
        )
    real = result["arms"]["mamba"]
    four, eight = (number(real[f"bar_self_similarity_{bars}"]["real"]) for bars in (4, 8))
    rows.append(("real music", "", "", four, eight, f"{number(100 * real['copied_runs_12']['real'], 1)} %"))
    header = ("", "nats per note ↓", "… minus `mamba`", "bars 4 apart", "bars 8 apart", "copied runs of 12 notes")
    return markdown(header, rows)


@table("repetition-pop909", "repetition-chorales")
def repetition_elsewhere(pop909: Result, chorales: Result) -> str:
    rows = []
    for name, result in (("POP909", pop909), ("chorales", chorales)):
        plain, looking = (result["arms"][arm]["held_out_nll_per_note"] for arm in ("mamba", "mamba, look-back"))
        rows.append((name, spread(plain["value"]), spread(looking["value"]), interval(looking["minus_mamba"])))
    return markdown(("nats per note ↓", "mamba", "mamba, look-back", "difference"), rows)


def _changes(result: Result) -> list[Row]:
    return [
        (
            name,
            number(arm["runs"], 0),
            spread(arm["nll_percent"], 2, sign=True),
            spread(arm["self_bleu_4"], 3, sign=True),
            number(arm["rollbacks"], 0),
        )
        for name, arm in result["arms"].items()
    ]


_CHANGES = ("reward", "seeds", "held-out NLL, %", "self-BLEU-4", "roll-backs")


@table("stability-chorales", "controls-chorales")
def stability_chorales(stable: Result, controls: Result) -> str:
    return markdown(_CHANGES, [*_changes(stable), *_changes(controls)])


@table("stability-nottingham", "controls-nottingham")
def stability_nottingham(stable: Result, controls: Result) -> str:
    return markdown(_CHANGES, [*_changes(stable), *_changes(controls)])


@table("ablation-chorales")
def stabilisers(result: Result) -> str:
    settings = result["settings"]
    caption = (
        f"Changes on held-out music in {number(settings['steps'], 0)} steps at a learning rate of "
        f"{float(settings['learning_rate']):g}:\n\n"
    )
    return caption + markdown(("arm", *_CHANGES[1:]), _changes(result))


_ARMS = {
    "oracle": "the oracle itself",
    "mle-lstm-paper": "maximum likelihood, the LSTM of the paper",
    "paper": "… then SeqGAN",
    "constant": "… a constant reward instead",
    "random": "… a random reward instead",
    "mle": "maximum likelihood, a Mamba",
    "stable": "… then `stable`",
    "stable-constant": "… a constant reward instead",
    "stable-random": "… a random reward instead",
}


@table("oracle")
def oracle(result: Result) -> str:
    rows = []
    for name, label in _ARMS.items():
        arm = result["arms"][name]
        figures: list[str] = []
        for figure in ("nll_oracle", "nll_test", "best_sum"):
            figures += [spread(arm[figure]), interval(arm.get(f"{figure}_minus_origin"))]
        rows.append((label, number(arm["runs"], 0), *figures))
    header = ("", "seeds", "NLL_oracle ↓", "change", "NLL_test ↓", "change", "best sum ↓", "change")
    return markdown(header, rows)


_FORMS = {
    "more": "more maximum likelihood",
    "exact": "distilled, exact log-ratio as the reward",
    "distilled": "distilled, two discriminators that saw the same tunes",
    "informed": "… which also know how likely the generator finds a tune",
    "likelihood": "… that likelihood alone",
    "constant": "distilled, a constant reward",
    "random": "distilled, a random reward",
    "shuffled": "distilled, the exact log-ratio shuffled",
}


@table("form-oracle")
def form(result: Result) -> str:
    rows = []
    for name, label in _FORMS.items():
        arm = result["arms"][f"plain/{name}"]
        closed = arm.get("kl_real_closed")
        share = ""
        if closed is not None:
            low, high = (number(100 * end, 0) for end in closed["interval"])
            share = f"{number(100 * closed['mean'], 0)} % ({low} … {high})"
        rows.append((label, spread(arm["kl_real"], 2), share, f"{number(100 * arm['form'][0], 0)} %"))
    return markdown(("", "KL(real ‖ generator) ↓", "of the gap closed ↑", "tunes with a form"), rows)


_TAUGHT = {
    "mle": "maximum likelihood, at its best temperature",
    "more": "… for longer",
    "best of 8": "**best of 8**",
    "best of 8, tokens": "… by the discriminator of tokens alone",
    "best of 8, music": "… by that of musical features alone",
    "best of 8, shuffled": "… by shuffled odds",
    "best of 8, likelihood": "… the likeliest",
    "distilled": "**distilled**, the former recipe",
    "distilled, best of 8": "… and then best of 8",
    "distilled, best of 8, not refitted": "… and then best of 8, by the same discriminators",
    "distilled, constant": "… a constant reward",
    "distilled, shuffled": "… shuffled odds",
    "distilled, more draws": "**distilled from four times the draws**, the recipe",
    "distilled, more draws, best of 8": "… and then best of 8",
    "distilled, more draws, constant": "… a constant reward",
    "distilled, more draws, shuffled": "… shuffled odds",
    "policy gradient": "**policy gradient**",
    "policy gradient, random": "… a random reward",
    "policy gradient, shuffled": "… shuffled odds",
    "paper": "SeqGAN as in the paper",
}


def _taught(result: Result) -> str:
    arms = result["arms"]
    rows = []
    for name in (name for name in _TAUGHT if name in arms):
        arm = arms[name]
        differences = arm.get("minus_mle", {})
        rows.append(
            (
                _TAUGHT[name],
                number(arm["seeds"], 0),
                number(arm["classifier"][0], 3),
                interval(differences.get("classifier")),
                number(arm["token_classifier"][0], 3),
                interval(differences.get("token_classifier")),
                number(arm["overlap"][0], 3),
                number(arm["held_out_nll_per_token"][0], 3),
            )
        )
    change = "minus maximum likelihood"
    header = (
        "",
        "seeds",
        "feature classifier ↓",
        change,
        "token classifier ↓",
        change,
        "overlap ↑",
        "NLL per token ↓",
    )
    return markdown(header, rows)


@table("music-nottingham")
def taught(result: Result) -> str:
    return _taught(result)


@table("music-mammoth")
def taught_elsewhere(result: Result) -> str:
    return _taught(result)


_FIGURES = {
    "classifier_features": "fresh classifier on features ↓",
    "classifier_tokens": "fresh classifier on tokens ↓",
    "mean_overlapping_area": "mean overlapping area ↑",
    "bar_self_similarity_8": "self-similarity, 8 bars apart",
    "held_out_nll_per_token": "held-out NLL per token ↓",
    "copied_runs_12": "copied runs of 12 notes",
    "self_bleu_4": "self-BLEU-4",
}


def _monte_carlo(result: Result) -> str:
    arms = result["arms"]
    rows = []
    for figure, label in _FIGURES.items():
        cells = []
        for arm in arms.values():
            difference = interval(arm[figure].get("minus_mle"))
            cells.append(
                f"{spread(arm[figure]['value'])} {difference[difference.find('(') :] if difference else ''}".strip()
            )
        floor = arms["mle"][figure].get("floor")
        rows.append((label, *cells, "" if floor is None else number(floor, 3)))
    return markdown(("", *(f"`{arm}`" for arm in arms), "real music"), rows)


@table("monte-carlo-nottingham")
def monte_carlo_nottingham(result: Result) -> str:
    return _monte_carlo(result)


@table("monte-carlo-chorales")
def monte_carlo_chorales(result: Result) -> str:
    return _monte_carlo(result)


@table("monte-carlo-pop909")
def monte_carlo_pop909(result: Result) -> str:
    return _monte_carlo(result)


@table("recipe")
def rule_of_train(result: Result) -> str:
    arms = list(next(iter(result["corpora"].values())))
    rows = [
        (corpus, *(number(runs[arm]["nll_per_note"], 3) for arm in arms)) for corpus, runs in result["corpora"].items()
    ]
    return "Nats per note on held-out music after the same processor time:\n\n" + markdown(("corpus", *arms), rows)


@table("corpora")
def real_corpora(result: Result) -> str:
    rows = []
    for row in result["rows"]:
        used = row["files"] - row["refused"]
        same = min(row["identical"].values())
        kept = f"{number(100 * row['notes_kept'], 2)} %"
        rows.append(
            (row["corpus"].removesuffix(".tar.gz"), row["tokenization"], number(used, 0), number(same, 0), kept)
        )
    return markdown(("corpus", "tokenization", "files", "with the same ids as MidiTok", "notes kept"), rows, words=2)


@table("ingestion")
def hostile_files(result: Result) -> str:
    names = ("files", "used", "sanitized", "duplicates", "quarantined", "lost_workers")
    return markdown([name.replace("_", " ") for name in names], [[number(result[name], 0) for name in names]], words=0)


@table("tokenization-memory")
def many_files(result: Result) -> str:
    rows = [(number(row["files"], 0), number(row["seconds"], 0), number(row["peak_mb"], 0)) for row in result["rows"]]
    return markdown(("files", "seconds", "peak MB"), rows, words=0)


@table("tokenization")
def reading(result: Result) -> str:
    names = {
        "miditok": "plain MidiTok, one process",
        "one_worker": "midimamba, one worker",
        "two_workers": "two workers",
    }
    rows = [(label, number(result["tokens_per_second"][name], 0)) for name, label in names.items()]
    return markdown(("", "tokens per second"), rows)


@table("packing")
def packing(result: Result) -> str:
    lost = (("midimamba", result["our_lost_share"]), (result["compared"], result["their_lost_share"]))
    return markdown(("", "music lost"), [(name, f"{number(100 * share, 2)} %") for name, share in lost])
