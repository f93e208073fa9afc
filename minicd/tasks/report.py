"""Records → Markdown: the last lines of train.py, results/README.md, and the tables of README.md."""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

from ..runtime.files import atomic_bytes, read_json

Record = dict[str, Any]
COLUMNS = {"pocket": "pocket", "smollm2": "SmolLM2-135M", "paper": "the paper's model"}  # titles by scale


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def against_paper(record: Record, titles: dict[str, str]) -> str:
    """A row for each metric that the record has, beside the paper's figure."""
    rows = [[title, pm(record["metrics"][name]), record["paper"].get(name, "")]
            for name, title in titles.items() if name in record["metrics"]]
    return table(["", "minicd", "paper"], rows)


def columns(records: Sequence[Record], titles: dict[str, str], unit: str = "") -> str:
    """The paper's figures beside those of several records, and how each was made."""
    names = [COLUMNS.get(record["scale"], record["scale"]) for record in records]
    rows = [[title, records[0]["paper"].get(name, ""),
             *(pm(record["metrics"][name]) if name in record["metrics"] else "" for record in records)]
            for name, title in titles.items() if any(name in record["metrics"] for record in records)]
    minutes = [least_to_most(record["minutes"]["total"]) for record in records]
    runs = "\n".join(f"* {name}: {made_by(record)}" for name, record in zip(names, records))
    rows.append(["minutes a seed, all stages", "", *minutes])
    return f"{table([unit, 'paper', *names], rows)}\n\n{runs}"


def made_by(record: Record) -> str:
    """Seeds, hardware and command without --publish; of several commands the first: results/ has them all."""
    first, *others = record["command"].replace(" --publish", "").split("; ")
    on = re.sub(r"\(R\)| Processor|(?<= 1 thread)s", "", record["hardware"]).split("; ")
    machines = on if len(on) == 1 else dict.fromkeys(machine.split(",")[0] for machine in on)
    return f"{count_seeds(record)}{', the first' * bool(others)} by `{first}` on {'; '.join(machines)}"


def least_to_most(minutes: Sequence[float]) -> str:
    """Seeds of a record may be from different machines: their mean would say nothing."""
    least, most = min(minutes), max(minutes)
    return f"{least:.0f}–{most:.0f}" if most > 2 * least else f"{most:.0f}"


def pm(metric: dict[str, Any], digits: int = 1) -> str:
    """Mean ± standard deviation."""
    std = "" if metric["std"] is None else f" ± {metric['std']:.{digits}f}"
    return f"{metric['mean']:.{digits}f}{std}"


def count_seeds(record: Record) -> str:
    return f"{len(record['seeds'])} seed{'s' * (len(record['seeds']) > 1)}"


def seeds_of(record: Record) -> str:
    return f"{count_seeds(record)}, {record['scale']} scale"


def minutes_line(record: Record) -> str:
    """Minutes of each seed by kind of stage: score-TASK (and TASK--student) of all tasks are one kind."""
    minutes, stages = record["minutes"], {}
    for name, values in minutes.items():
        if name not in ("total", "wall"):
            kind = name.split(".parts")[0].split("--")[-1].split("-")[0]
            stages[kind] = [a + b for a, b in zip(values, stages.get(kind, [0.0] * len(values)))]
    parts = {"all stages": minutes["total"], **{k: v for k, v in stages.items() if max(v) >= 0.1}}
    wall = f"{minutes['wall']:.1f} minutes from start to end; " if "wall" in minutes else ""
    each = (f"{name} {'/'.join(f'{m:.1f}' for m in values)}" for name, values in parts.items())
    return f"{wall}minutes a seed: {', '.join(each)}"


def run_line(record: Record) -> str:
    commits = record.get("commits") or record["commit"]
    precision = f", {record['precision']}" if record.get("precision") else ""
    return (f"{minutes_line(record)} ({record['hardware']}, PyTorch {record['torch']}{precision}, "
            f"commit {commits}).\n\n    {record['command']}")


def scatter(points: dict[str, Sequence[float]], path: Path, title: str, x: str, y: str) -> bool:
    """A PNG of the points. Whether it was drawn, as in `picture`."""
    def draw(axes: Any) -> None:
        axes.axline((0, 0), slope=1, color="lightgrey", zorder=0)
        axes.scatter(*zip(*points.values()))
        axes.set(xlabel=x, ylabel=y, title=title)
    return picture(path, (5, 4), draw)


def line_plot(lines: dict[str, dict[int, Any]], path: Path, title: str, x: str, y: str) -> bool:
    """A PNG of curves, number → metric, with the spread over the seeds. Whether it was drawn."""
    def draw(axes: Any) -> None:
        for name, points in lines.items():
            means, spreads = zip(*((metric["mean"], metric["std"] or 0.0) for metric in points.values()))
            axes.errorbar(list(points), means, yerr=spreads, marker="o", capsize=3, label=name)
        ticks = sorted({n for points in lines.values() for n in points})
        axes.set(xlabel=x, ylabel=y, title=title, xscale="log", xticks=ticks, ylim=(-2, 102))
        axes.set_xticks([], minor=True)
        axes.set_xticklabels([f"{n:,}" for n in ticks], rotation=45, ha="right")
        axes.grid(alpha=0.3)
        axes.legend()
    return picture(path, (6, 4.5), draw)


def bars(columns: dict[str, list[float]], names: Sequence[str], path: Path, title: str, y: str) -> bool:
    """A PNG: for each of the names a group with a bar of each column. Whether it was drawn."""
    def draw(axes: Any) -> None:
        width = 0.8 / len(columns)
        for i, (column, values) in enumerate(columns.items()):
            shown = axes.bar([place + i * width for place in range(len(names))], values, width, label=column)
            axes.bar_label(shown, fmt="%.0f", fontsize=8)
        axes.set(ylabel=y, title=title, xticks=[place + 0.4 - width / 2 for place in range(len(names))])
        axes.set_xticklabels(names, rotation=20, ha="right")
        axes.legend()
    return picture(path, (7, 4), draw)


def beneath(parts: dict[str, str]) -> str:
    """Texts with their titles, one beneath the other."""
    return "\n".join(f"  {title:18}" + text.replace("\n", "\n" + 20 * " ") for title, text in parts.items())


def picture(path: Path, size: tuple[float, float], draw: Callable[[Any], None]) -> bool:
    """A PNG of what `draw(axes)` draws, where matplotlib is installed. Whether it was drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("No plot was drawn: pip install matplotlib")
        return False
    draw((figure := Figure(figsize=size, layout="constrained")).add_subplot())
    figure.savefig(drawn := BytesIO(), dpi=120, format="png")
    atomic_bytes(path, drawn.getvalue())
    return True


# --- the pages ---

HEAD = """# Results

Made by `python eval.py --report` from the records beside this page; no figure in a table is typed by hand.
**Pocket scale** means the small models of `data/`, which stand in for the paper's: read these figures as the
paper's effects, not as its figures. ± is the standard deviation over the seeds, which vary practice and
training; base model and test set are the same for all, unless the section says otherwise. What was tried
and did not work is in [LOG.md](LOG.md).
"""


def results_page(results: Path, sections: dict[str, tuple[str, Callable[[Record], str], str]]) -> str:
    """results/README.md. `sections`: a record's name → title, function that shows it, what differs."""
    parts, titles = [HEAD], [title for title, *_ in sections.values()]
    for stem, (title, show, differs) in sections.items():
        if (results / f"{stem}.json").exists():
            title += f": {stem.partition('-')[2]}" * (titles.count(title) > 1)
            image = f"![{title}]({stem}.png)" if (results / f"{stem}.png").exists() else ""
            differs = f"What differs from the paper:\n\n{differs.strip()}" if differs else ""
            path = results / f"{stem}.json"
            text, item, line = (shown_record(path, how) for how in (show, item_of, last_line))
            parts += [f"## {title}", *filter(None, [text, image, item, line, differs])]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def shown_record(path: Path, show: Callable[[Record], Any]) -> Any:
    """What `show` makes of a record. Raises ValueError where the file is damaged or no record of its kind."""
    record = read_json(path)
    try:
        return show(record)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{path} is not a record that can be shown ({type(error).__name__}: {error}); "
                         "make it anew, or take it back from git") from None


def item_of(record: Record) -> str:
    """One practice item of the run."""
    return "\n".join(["```", record["item"].strip("\n"), "```"]) if record.get("item") else ""


def last_line(record: Record) -> str:
    minutes = record.get("minutes")
    return run_line(record) if isinstance(minutes, dict) and "total" in minutes else ""


def fill_regions(text: str, regions: dict[str, str]) -> str:
    """Replace what stands between <!-- NAME --> and <!-- /NAME -->, unless the new content is empty."""
    for name, content in regions.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if content and start in text and end in text:
            head, rest = text.split(start, 1)
            text = f"{head}{start}\n{content}\n{end}{rest.split(end, 1)[1]}"
    return text


def records_for(kind: Any, paths: list[Path]) -> list[Record]:
    """The records that are there. Raises ValueError where README could not show one of them."""
    def checked(record: Record) -> Record:
        kind.front([record]), kind.headline(record)
        return record
    return [shown_record(path, checked) for path in paths if path.exists()]


def bullet(name: str, kind: Any, records: list[Record]) -> str:
    """The records of an experiment in a line of README, where it has one."""
    parts = []
    for record in records:
        line, how = kind.headline(record), f"--scale {record['scale']}"
        if record["scale"] == next(iter(kind.SCALES)):
            how = f"--task {name}"
        elif not parts:
            how = f"--task {name} {how}"
        seed = {1: ", one seed", 2: ", two seeds"}.get(len(record["seeds"]), "")
        if (paper := re.search(r" \(paper: .*?\)", line)) and paper[0] in "".join(parts):
            line = line.replace(paper[0], "")  # said once
        parts += [f"`{how}`{seed}: {line}"] * bool(line)
    return f"* **{kind.TITLE.split(' (')[0]}**, {'; '.join(parts)}" if parts else ""


def rebuild(root: Path, tasks: dict[str, Any], bench: dict[str, tuple[str, Callable[[Record], str]]]) -> None:
    """Write results/README.md and the regions of README.md from the records of experiments and benchmarks."""
    sections = {f"{name}-{scale}": (kind.TITLE, kind.table, kind.DIFFERS)
                for name, kind in tasks.items() for scale in kind.RECORDS}
    sections |= {stem: (title, show, "") for stem, (title, show) in bench.items()}
    results, readme = root / "results", root / "README.md"
    atomic_bytes(results / "README.md", results_page(results, sections).encode())
    bullets, regions = [], {}
    for name, kind in tasks.items():
        records = records_for(kind, [results / f"{name}-{scale}.json" for scale in kind.RECORDS])
        regions[name] = kind.front(records) if records else ""
        bullets += [] if regions[name] else filter(None, [bullet(name, kind, records)])
    regions["others"] = "\n".join(bullets)
    atomic_bytes(readme, fill_regions(readme.read_text(encoding="utf-8"), regions).encode())
