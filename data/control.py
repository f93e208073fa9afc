"""`python -m data.control`: 400 beginnings of reviews, by the model of data/smollm2 after ours.

From the file that is in the repository, lines that nobody should have to read were taken out by hand.
"""

import sys
from pathlib import Path

from minicd.hf.checkpoint import load
from minicd.tasks.control import write_beginnings
from minicd.tasks.parts.instruction_eval import end_with_line
from minicd.tasks.parts.reviews import write_reviews
from minicd.tasks.settings import beside, guarded

FILE = Path(__file__).resolve().with_suffix("") / "beginnings.txt"


def main() -> None:
    """Writes the same file every time on the same kind of machine."""
    model, tokenizer = load(beside(sys.argv[1] if len(sys.argv) > 1 else "data/smollm2"))
    end_with_line(model, tokenizer)
    write_reviews(FILE, write_beginnings(model, tokenizer, 200, seed=0, precision="fp32"))
    print(f"written: {FILE}")


if __name__ == "__main__":
    guarded(main)
