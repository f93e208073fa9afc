"""The record of edited facts: its table beside Table 5, and how far students are from gradient descent."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...metrics.facts import Points, at_equal_paraphrase, balance
from ..report import Record, pm, seeds_of, table
from .facts_data import Fact
from .facts_eval import HEAD, cells

ROWS = {"before": "before", "teacher": "teacher, new fact in the prompt", "after": "**student after**",
        "after_self_study": "**student after**, inputs by self-study",
        "descent": "gradient descent on the statement", "simultaneous": "all edits at once",
        "sequential": "one after the other, at the end"}
TABLE_5 = {"before": (34, -3, 80, 4), "teacher": (73, 29, 58, 8), "after": (79, 28, 48, -2),
           "rome": (89, 33, 74, 4), "mend": (65, 12, 38, -12)}
CHOSEN = {"shape": "prompt:", "lr": "student, rate", "descent_lr": "gradient descent, rate"}
PROMPTS = {"statement": "the new fact", "nothing_else": "… and that nothing else changes",
           "neighbours": "… and true sentences on other subjects",
           "demonstrated": "… and the new fact in use", "explained": "… and why each holds"}
RESAMPLED = 2000  # times, for the interval of a point beside a curve


def edit_line(fact: Fact, scores: dict[str, Any]) -> str:
    rows = (f"{row} {scores[row][0]:.0f}/{scores[row][2]:.0f}" for row in ROWS if row in scores)
    return f"{fact.name}, {fact.true} → {fact.new}: paraphrase/neighbourhood score {', '.join(rows)}"


def complete(record: Record) -> Record:
    """Adds the neighbourhood score above gradient descent's at equal paraphrase score, over the edits."""
    rows = {row: list(points.values()) for row, points in record["by_edit"].items()}
    curve = [rows["before"], *(list(points.values()) for points in record["descents"].values())]
    return record | {"above_descent": {row: above_curve(rows[row], curve) for row in students(record)}}


def students(record: Record) -> list[str]:
    return [row for row in record["by_edit"] if row.startswith("after")]


def above_curve(student: Points, curve: list[Points]) -> dict[str, float]:
    """`at_equal_paraphrase` with its 95 % interval over the edits."""
    own, others = np.array(student), np.array(curve)
    edits = np.random.default_rng(0).integers(len(own), size=(RESAMPLED, len(own)))
    drawn = [at_equal_paraphrase(own[i], others[:, i]) for i in edits]
    low, high = np.percentile(drawn, [2.5, 97.5])
    points = {"points": at_equal_paraphrase(own, others), "low": low, "high": high}
    return {name: round(float(value), 2) for name, value in points.items()}


def show(record: Record) -> str:
    """Beside Table 5; then gradient descent at each rate, and what was chosen on other edits."""
    edits, descents = record["by_edit"], record["descents"]
    rows = [[title, *cells(list(edits[row].values())), paper_text(row)]
            for row, title in ROWS.items() if row in edits]
    rows += [[row.upper(), "", "", "", "", paper_text(row)] for row in ("rome", "mend")]
    by_rate = [[f"rate {rate}", *cells(list(points.values()))] for rate, points in descents.items()]
    tried = [[f"{CHOSEN[name]} {PROMPTS.get(value, value)}",
              *(f"{x:.1f}" for x in four), f"{balance([four]):.1f}"]
             for name, values in record["on_others"].items() for value, four in values.items()]
    on_others = [table(["on other edits", *HEAD, "harmonic mean of scores"], tried)] if tried else []
    intro = f"{len(edits['before'])} edits, %, with 95 % intervals over them, {seeds_of(record)}"
    return "\n\n".join([intro, table(["", *HEAD, "paper"], rows), sentences(record),
                        table(["gradient descent", *HEAD], by_rate), *on_others])


def paper_text(row: str) -> str:
    return " / ".join(map(str, TABLE_5.get(row, ())))


def sentences(record: Record) -> str:
    """What the rows do not say."""
    found = [f"* Where gradient descent's paraphrase score is that of {ROWS[row].replace('*', '')}, its "
             f"neighbourhood score, interpolated between its rates, is {a['points']:.1f} points lower "
             f"({a['low']:.1f} to {a['high']:.1f})."
             for row, a in record["above_descent"].items()]
    then, end = (pm(record["metrics"][f"first_half_{when}"]) for when in ("then", "at_end"))
    found.append("* One after the other: the first half of the edits has the paraphrase score "
                 f"{then} when it is made, {end} at the end.")
    if left := list(record["left_out"]):
        found.append(f"* Left out, since the model prefers another object: {'; '.join(left)}.")
    return "\n".join(found)


def headline(record: Record) -> str:
    def both(row: str) -> str:
        return " and ".join(pm(record["metrics"][f"{row}_{name}_score"]) for name in (
            "paraphrase", "neighbourhood"))
    return (f"paraphrase and neighbourhood score {both(students(record)[0])} %, teacher {both('teacher')} "
            "(paper: 79 and 48, 73 and 58)")
