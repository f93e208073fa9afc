"""Records → tables. What train.py prints at its end and what README shows are made here, from the same JSON."""

from __future__ import annotations

import json
from pathlib import Path

from ..runtime.files import atomic_bytes

ROWS = {"teacher": "teacher, step by step", "before": "student before", "after": "**student after**",
        "scratchpad_then_direct": "scratchpad → direct", "scratchpad_and_direct": "scratchpad + direct",
        "after_hard": "student after, hard labels", "true_answers": "student on as many true answers"}


def addition_table(record: dict) -> str:
    """Table 3 beside the paper's, then accuracy by digits and by carry run, in Markdown."""
    metrics = record["metrics"]
    lines = [f"Exact match on unseen additions of up to {record['settings']['max_digits']} digits, %, "
             f"{seeds_of(record)}, {record['scale']} scale", "", "| | minicd | paper |", "| --- | ---: | ---: |"]
    for name, title in ROWS.items():
        if name in metrics:
            lines.append(f"| {title} | {spread(metrics[name])} | {record['paper'].get(name, '')} |")
    ratio = spread(metrics["token_ratio"]), record["paper"]["token_ratio"]
    lines.append("| tokens at inference, teacher ÷ student | {} | {} |".format(*ratio))
    lines += ["", f"Of the teacher's practice answers {spread(metrics['practice_true'])} % are true; "
              f"{spread(metrics['practice_dropped'])} % of the questions were dropped, since no answer could be extracted."]
    lines += ["", *breakdown("digits", record["by_digits"]), "", *breakdown("longest carry run", record["by_carry_run"])]
    return "\n".join(lines)


def instructions_table(record: dict) -> str:
    """Hypothesis 1 beside the paper's figures, then task by task."""
    rows = {"teacher": "teacher, instruction in the prompt", "before": "student before", "after": "**student after**",
            "token_ratio": "tokens at inference, teacher ÷ student"}
    lines = [f"Rouge-L, mean of {len(record['by_task'])} tasks, {seeds_of(record)}, {record['scale']} scale", "",
             "| | minicd | paper |", "| --- | ---: | ---: |"]
    lines += [f"| {title} | {spread(record['metrics'][name])} | {record['paper'][name]} |" for name, title in rows.items()]
    lines += ["", "| task | teacher | before | after | tokens ÷ |", "| --- | ---: | ---: | ---: | ---: |"]
    return "\n".join(lines + [f"| {task} | " + " | ".join(f"{row[name]:.1f}" for name in rows) + " |"
                              for task, row in record["by_task"].items()])


def explanations_table(record: dict) -> str:
    """Hypothesis 2: the correlation and its points."""
    mean = record["mean_margins"]
    lines = [f"Correlation of in-context and distillation margin over {len(record['points'])} tasks, margins averaged over "
             f"{seeds_of(record)}, {record['scale']} scale: r = {mean['correlation']:.2f}, p = {mean['p_value']:.5f} "
             f"(one-sided, {mean['shuffles']:,} permutations); each seed by itself: r = "
             f"{spread(record['metrics']['correlation'], 2)}", "",
             "| task | in-context margin | distillation margin |", "| --- | ---: | ---: |"]
    return "\n".join(lines + [f"| {task} | {x:.1f} | {y:.1f} |" for task, (x, y) in record["points"].items()])


def scatter(record: dict, out: Path, publish: bool) -> str:
    """Figure 5 as PNG beside the record, where matplotlib is installed; returns a line that says where."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "No plot was drawn: pip install matplotlib"
    axes = (figure := Figure(figsize=(5, 4), layout="constrained")).add_subplot()
    axes.axline((0, 0), slope=1, color="lightgrey", zorder=0)
    axes.scatter(*zip(*record["points"].values()))
    axes.set(xlabel="in-context margin (Rouge-L)", ylabel="distillation margin (Rouge-L)",
             title=f"{record['scale']} scale, {seeds_of(record)}: r = {record['mean_margins']['correlation']:.2f}")
    results = Path(__file__).parent.parent.parent / "results"
    paths = [folder / f"explanations-{record['scale']}.png" for folder in ([out, results] if publish else [out])]
    for path in paths:
        figure.savefig(path, dpi=120)
    return f"The plot is in {paths[0]}"


def task_ids_table(record: dict) -> str:
    """Hypothesis 3 beside Tables 1 and 6: accuracy with the right number and with a wrong one."""
    metrics, paper = record["metrics"], record["paper"]
    rows = [("teacher", "teacher", None), ("student before", "before_correct", "before_wrong")]
    for variant, title in (("naive", "naive"), ("mixed", "mixed"), ("mixed_recursive", "mixed, recursive")):
        rows += [(f"{title}, round {n}", f"{variant}_correct_{n}", f"{variant}_wrong_{n}") for n in (1, 2)]
    lines = [f"Accuracy on four classification tasks, %, {seeds_of(record)}, {record['scale']} scale", "",
             "| | right number | wrong number | paper, right | paper, wrong |", "| --- | ---: | ---: | ---: | ---: |"]
    for title, *names in rows:
        ours = [spread(metrics[name]) if name else "" for name in names]
        lines.append(f"| {title} | " + " | ".join([*ours, *(str(paper.get(name, "")) for name in names)]) + " |")
    tasks = list(record["by_task"]["teacher"])
    lines += ["", "| right / wrong number | " + " | ".join(tasks) + " |", "| --- |" + " ---: |" * len(tasks)]
    for title, *names in rows:
        pairs = [" / ".join(f"{record['by_task'][name][task]:.0f}" for name in names if name) for task in tasks]
        lines.append(f"| {title} | " + " | ".join(pairs) + " |")
    return "\n".join(lines)


def seeds_of(record: dict) -> str:
    return f"{len(record['seeds'])} seed{'s' * (len(record['seeds']) > 1)}"


def spread(metric: dict, digits: int = 1) -> str:
    return f"{metric['mean']:.{digits}f}" + (f" ± {metric['std']:.{digits}f}" if metric["std"] is not None else "")


def breakdown(title: str, table: dict[str, dict[str, float]]) -> list[str]:
    keys = list(next(iter(table.values())))
    head = [f"| by {title} | " + " | ".join(keys) + " |", "| --- |" + " ---: |" * len(keys)]
    return head + [f"| {ROWS[name]} | " + " | ".join(f"{row[k]:.1f}" for k in keys) + " |"
                   for name, row in table.items() if name in ROWS]


def minutes_line(record: dict) -> str:
    """Minutes of each seed; stages that differ behind a hyphen (score-TASK) are one."""
    stages: dict[str, list[float]] = {}
    for name, values in record["minutes"].items():
        stage = name.split("-")[0]
        stages[stage] = [a + b for a, b in zip(values, stages.get(stage, [0.0] * len(values)))]
    long = {stage: values for stage, values in stages.items() if stage == "total" or max(values) >= 0.1}
    return "Minutes a stage: " + ", ".join(f"{stage} {'/'.join(f'{m:.1f}' for m in values)}" for stage, values in long.items())


def load_record(path: Path) -> dict:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable record: {error}") from None


def addition_section(record: dict) -> str:
    return f"{addition_table(record)}\n\n{run_line(record)}"


def labelled_section(record: dict) -> str:
    """Teacher accuracy by number of labelled scratchpads, from bench/labelled.py."""
    budgets = list(record["metrics"])
    return "\n".join(["| labelled scratchpads | " + " | ".join(budgets) + " |", "| --- |" + " ---: |" * len(budgets),
                      "| teacher, % of 500 validation questions | " + " | ".join(spread(record["metrics"][b]) for b in budgets) + " |",
                      "", "![Teacher accuracy by labelled scratchpads](results/addition-labelled.png)", "",
                      f"({len(record['seeds'])} seeds, {record['hardware']}, commit {record['commit']}, `{record['command']}`.)"])


def speed_section(record: dict) -> str:
    """minicd beside Hugging Face transformers, from bench/train.py."""
    rows = [f"| {row['what']} | {row['median']['minicd']:,.0f} | {row['median']['transformers']:,.0f} | {row['ratio']:.2f} |"
            for row in record["results"]]
    return "\n".join(["| | minicd | transformers | ratio |", "| --- | ---: | ---: | ---: |", *rows, "",
                      bench_line(record)])


def sampling_section(record: dict) -> str:
    """Tokens written per second beside Hugging Face transformers, from bench/sampling.py."""
    lines = ["| model | precision | batch | prompt → new tokens | minicd | transformers | ratio |",
             "| --- | --- | ---: | --- | ---: | ---: | ---: |"]
    for row in record["results"]:
        prompt = "–".join(map(str, row["prompt"])) if isinstance(row["prompt"], list) else row["prompt"]
        speeds = " | ".join(f"{row['median'][side]:,.0f}" for side in ("minicd", "transformers"))
        length = f"{prompt} → {'up to ' * row['stop']}{row['new']}"
        lines.append(f"| {row['shape']} | {row['precision']} | {row['batch']} | {length} | {speeds} | {row['ratio']:.2f} |")
    return "\n".join([*lines, "", bench_line(record)])


def bench_line(record: dict) -> str:
    return (f"(Median of {record['settings']['rounds']} alternating rounds, {record['hardware']}, PyTorch {record['torch']}, "
            f"transformers {record['transformers']}, commit {record['commit']}, `{record['command']}`.)")


def labels_section(record: dict) -> str:
    """What sparse labels save against the dense form, from bench/labels.py."""
    results, settings = record["results"], record["settings"]
    kinds = {"sampled": f"{settings['samples']} samples", "top": f"top-{settings['top']}", "exact": "exact"}
    rows = {f"label of a token in the file: {title}": [saving(r["bytes"]["dense"], r["bytes"][kind], "bytes") for r in results]
            for kind, title in kinds.items()}
    for name in results[0]["losses"]:
        pairs = [(r["losses"]["dense KL"], r["losses"][name]) for r in results]
        rows[f"loss and gradient: {name}"] = [f"{saving(kl['peak_mib'], own['peak_mib'], 'MiB')}, "
                                              f"{saving(kl['ms'], own['ms'], 'ms')}" for kl, own in pairs]
    head = " | ".join(f"vocabulary {r['vocabulary']:,} {r['model']}".rstrip() for r in results)
    image = ["![Error of the gradient by the size of the label](results/bench-labels.png)", ""] if record["plot"] else []
    return "\n".join([f"| times less than dense | {head} |", "| --- |" + " ---: |" * len(results),
                      *(f"| {title} | {' | '.join(cells)} |" for title, cells in rows.items()), "", *image,
                      f"({len(record['seeds'])} seeds, {record['hardware']}, PyTorch {record['torch']}, "
                      f"commit {record['commit']}, `{record['command']}`.)"])


def saving(dense: float, own: float, unit: str) -> str:
    ratio = dense / own
    return f"{ratio:,.{0 if ratio >= 10 else 1 if ratio >= 1 else 2}f}× ({own:,.0f} {unit})"


def run_line(record: dict) -> str:
    return (f"{minutes_line(record)} ({record['hardware']}, PyTorch {record['torch']}, commit {record['commit']}, "
            f"`{record['command']}`).")


def base_section(record: dict) -> str:
    """How good a teacher the pocket base of the experiments on instructions is."""
    titles = {"full": "definition, examples, explanations", "without_explanations": "without explanations", "bare": "bare input"}
    lines = [f"| prompt | Rouge-L of the base, {record['settings']['held_out']} or a few more instances, as many of each task |", "| --- | ---: |"]
    lines += [f"| {title} | {spread(record['metrics'][name])} |" for name, title in titles.items()]
    return "\n".join([*lines, "", run_line(record)])


def instructions_section(record: dict) -> str:
    return f"{instructions_table(record)}\n\n{run_line(record)}"


def explanations_section(record: dict) -> str:
    plot = f"![In-context and distillation margin](results/explanations-{record['scale']}.png)"
    return f"{explanations_table(record)}\n\n{plot}\n\n{run_line(record)}"


def task_ids_section(record: dict) -> str:
    return f"{task_ids_table(record)}\n\n{run_line(record)}"


# A section of README → its record in results/ and the function that shows it.
SECTIONS = {"labelled": ("addition-labelled.json", labelled_section), "speed": ("bench-train.json", speed_section),
            "sampling": ("bench-sampling.json", sampling_section), "labels": ("bench-labels.json", labels_section),
            "base-instructions": ("pocket-instructions.json", base_section)}
EXPERIMENTS = {"addition": addition_section, "instructions": instructions_section, "explanations": explanations_section,
               "task_ids": task_ids_section}
SECTIONS |= {f"{task}-{scale}": (f"{task}-{scale}.json", show) for task, show in EXPERIMENTS.items() for scale in ("pocket", "paper")}


def rebuild_readme(root: Path) -> list[str]:
    """Replace what stands between <!-- NAME --> and <!-- /NAME --> in README.md by the tables of results/; their names."""
    readme = root / "README.md"
    text, done = readme.read_text(), []
    for name, (file, show) in SECTIONS.items():
        start, end, path = f"<!-- {name} -->", f"<!-- /{name} -->", root / "results" / file
        section = show(load_record(path)) if path.exists() else ""
        if section and start in text and end in text:
            head, rest = text.split(start, 1)
            text = head + start + "\n" + section + "\n" + end + rest.split(end, 1)[1]
            done.append(name)
    atomic_bytes(readme, text.encode())
    return done
