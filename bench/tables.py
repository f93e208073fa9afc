"""Records of the benchmarks → Markdown, from the JSON in results/."""

from __future__ import annotations

from typing import Any, Callable

from minicd.tasks.record import spread
from minicd.tasks.report import pm, table

Record = dict[str, Any]
SIDES = ("minicd", "transformers")
FAULTS = ("traceback", "silent", "lost", "hang")


def train_table(record: Record) -> str:
    """Training and labelling beside Hugging Face transformers, from bench/train.py."""
    rows = [[row["what"], *speeds(row)] for row in record["results"]]
    return f"{table(['', *SIDES, 'ratio'], rows)}\n\n{rounds_line(record)}"


def sampling_table(record: Record) -> str:
    """Tokens written per second beside Hugging Face transformers, from bench/sampling.py."""
    head = ["model", "precision", "batch", "prompt → new tokens", *SIDES, "ratio"]
    rows = [[row["shape"], row["precision"], row["batch"], lengths(row), *speeds(row)]
            for row in record["results"]]
    return f"{table(head, rows)}\n\n{rounds_line(record)}"


def speeds(row: Record) -> list[str]:
    """Medians of both sides, small ones with a digit more, and ours ÷ theirs."""
    medians = [row["median"][side] for side in SIDES]
    return [*(f"{x:,.{int(min(medians) < 10)}f}" for x in medians), f"{row['ratio']:.2f}"]


def lengths(row: Record) -> str:
    prompt = "–".join(map(str, row["prompt"])) if isinstance(row["prompt"], list) else row["prompt"]
    return f"{prompt} → {'up to ' * row['stop']}{row['new']}"


def labels_table(record: Record) -> str:
    """What sparse labels save against the dense form, from bench/labels.py."""
    results = record["results"]
    head = [f"vocabulary {result['vocabulary']:,} {result['model']}".rstrip() for result in results]
    rows = label_rows(results, record["settings"]) + loss_rows(results)
    return f"{table(['times less than dense', *head], rows)}\n\n{seeds_line(record)}"


def label_rows(results: list[Record], settings: Record) -> list[list[str]]:
    """A row for each kind of label: its bytes in the file of a practice set."""
    kinds = {"sampled": f"{settings['samples']} samples", "top": f"top-{settings['top']}", "exact": "exact"}
    return [[f"label of a token in the file: {title}",
             *(saving(result["bytes"]["dense"], result["bytes"][kind], "bytes") for result in results)]
            for kind, title in kinds.items()]


def loss_rows(results: list[Record]) -> list[list[str]]:
    """A row for each loss: peak memory and time of its value and gradient."""
    def cell(losses: Record, name: str) -> str:
        dense, own = losses["dense KL"], losses[name]
        return f"{saving(dense['peak_mib'], own['peak_mib'], 'MiB')}, {saving(dense['ms'], own['ms'], 'ms')}"
    return [[f"loss and gradient: {name}", *(cell(result["losses"], name) for result in results)]
            for name in results[0]["losses"]]


def parts_table(record: Record) -> str:
    """Losses whose logits are computed by parts beside whole ones, from bench/parts.py."""
    head = ["loss", "whole", "by parts", "memory", "whole", "by parts", "time"]
    rows = [[name, f"{own['whole_mib']:,.0f} MiB", f"{own['parts_mib']:,.0f} MiB", f"{own['memory']:.3f}",
             f"{own['whole_ms']:,.0f} ms", f"{own['parts_ms']:,.0f} ms", f"{own['time']:.2f}"]
            for result in record["results"] for name, own in result["losses"].items()]
    how, vocabularies = record["settings"], [f"{result['vocabulary']:,}" for result in record["results"]]
    what = (f"{how['tokens']} tokens of a vocabulary of {' and '.join(vocabularies)}, states of width "
            f"{how['width']}, {how['part']:,} logits at a time")
    return f"{table(head, rows)}\n\n({what}; {machine(record)}.)"


def saving(dense: float, own: float, unit: str) -> str:
    ratio = dense / own
    return f"{ratio:,.{0 if ratio >= 10 else 1 if ratio >= 1 else 2}f}× ({own:,.0f} {unit})"


def parity_table(record: Record) -> str:
    """The largest differences from Hugging Face transformers, from bench/parity.py."""
    head = ["family", "models", "logits, absolute", "÷ their spread", "saved and read back",
            "equal completions", "ties", "mismatches"]
    differences = ("absolute", "relative", "saved")
    rows = [[row["family"], row["configurations"],
             *(f"{row[key]:.1e}" if row[key] else "0" for key in differences),
             f"{row['equal']} of {row['completions']}", row["ties"], row["mismatches"]]
            for row in record["results"]]
    tolerance = f"tolerance {record['settings']['tolerance']:.0e} of the spread"
    return f"{table(head, rows)}\n\n(Largest differences of random models, {tolerance}, {machine(record)}.)"


def practice_table(record: Record) -> str:
    """Ways to practise, from bench/practice.py."""
    keys = ("quality", "kl", "forgotten", "thousand_tokens", "minutes")
    head = ["context", "way", "right, %", "KL(teacher ‖ student)", "forgetting: KL(before ‖ now)",
            "tokens of the teacher, thousands", "minutes"]
    rows = []
    for result in record["results"]:
        for way, seeds in result["ways"].items():
            spreads = {key: spread([one[key] for one in seeds]) for key in keys if key in seeds[0]}
            cells = (pm(spreads[key]) if key in spreads else "" for key in keys)
            rows.append([result["context"], way, *cells])
    how = record["settings"]
    what = (f"KL a token in 1/1000 nat; {how['steps']} steps with batches of {how['batch_size']}, "
            f"{how['inputs']:,} inputs where the teacher writes; {len(record['seeds'])} seeds, pocket scale")
    return f"{table(head, rows)}\n\n({what}; {machine(record)}.)"


def trade_table(record: Record) -> str:
    """Gained against forgotten at the last step of each student, from bench/trade.py."""
    how = record["settings"]
    head = ["what learns", "learning rate", "steps", "KL(teacher ‖ student)", "gained, %", "KL(before ‖ now)"]
    rows = [[f"adapters of rank {row['rank']}" if row["rank"] else "all weights", f"{row['lr']:g}",
             point["step"], f"{point['kl']:,.1f}", f"{100 * (1 - point['kl'] / how['before']):.1f}",
             f"{point['forgotten']:,.1f}"]
            for row in record["results"] for point in row["points"]]
    what = (f"KL a token in 1/1000 nat, {how['before']:,.1f} before; data/contexts/{how['scale']}.toml, "
            f"{how['items']:,} practice items, {how['epochs']} passes, seed {how['seed']}")
    return f"{table(head, rows)}\n\n({what}; {machine(record)}.)"


def damage_table(record: Record) -> str:
    """What became of trials under damage, from bench/damage.py."""
    names = ("refused", "same", "another valid file", *FAULTS)
    head = ["what was done", "trials", "refused in one sentence", "same files", *names[2:]]
    rows = [[row["what"], row["trials"], *(row[name] for name in names)] for row in record["results"]]
    total = ["all", *(sum(row[i] for row in rows) for i in range(1, len(head)))]
    caption = (
        "The same command is given after each; where it is refused, once more after what the sentence says "
        "to delete, which must give the same files, too. *Traceback*: also a sentence that names no file; "
        "*silent*: other files than in an undisturbed run; *lost*: finished work that is made anew, or "
        "cannot go on. A model's config and tokenizer and task files have no checksums: damage can make "
        "*another valid file* of them.")
    run = f"({machine(record)}, seed {record['settings']['seed']}.)"
    return f"{table(head, [*rows, total])}\n\n{caption}\n\n{run}"


def rounds_line(record: Record) -> str:
    return f"(Median of {record['settings']['rounds']} alternating rounds, {machine(record)}.)"


def seeds_line(record: Record) -> str:
    return f"({len(record['seeds'])} seeds, {machine(record)}.)"


def machine(record: Record) -> str:
    """What ran where."""
    names = {"torch": "PyTorch", "transformers": "transformers"}
    libraries = [f"{name} {record[key]}" for key, name in names.items() if record.get(key)]
    commit, command = f"commit {record['commit']}", f"`{record['command']}`"
    return ", ".join([record["hardware"], *libraries, commit, command])


# A record's name in results/ → its title and the function that shows it.
TABLES: dict[str, tuple[str, Callable[[Record], str]]] = {
    "bench-parity": ("The same numbers as transformers", parity_table),
    "bench-train": ("Training and labelling speed", train_table),
    "bench-real": ("The real model beside transformers", train_table),
    "bench-real-cuda": ("The real model beside transformers, on CUDA", train_table),
    "bench-sampling": ("Decoding speed, tokens per second", sampling_table),
    "bench-labels": ("Cost of soft labels", labels_table),
    "bench-parts": ("Losses by parts of the logits", parts_table),
    "bench-practice": ("Ways to practise", practice_table),
    "bench-trade": ("One's own prompt: gained against forgotten", trade_table),
    "bench-damage": ("Under damage", damage_table)}
