"""Evaluate a checkpoint on what its training did not show it, ask it one question, or rebuild README's tables from results/."""

from __future__ import annotations

from pathlib import Path

from minicd.hf.checkpoint import load
from minicd.tasks.commands import Parser, choose, count, guarded
from minicd.runtime.device import pick_device
from minicd.tasks.report import rebuild_readme
from minicd.tasks import addition, instructions

TASKS = {"addition": addition, "instructions": instructions}


def add_flags(parser: Parser) -> None:
    parser.add_argument("--task", default="addition", help=f"the experiment: {', '.join(TASKS)}")
    parser.add_argument("--model", help="folder (or hub id) of the checkpoint")
    parser.add_argument("--ask", metavar="QUESTION", help='answer one question, for example "12345678 + 87654321", or a prompt')
    parser.add_argument("--step-by-step", action="store_true", help="addition: ask for a scratchpad, as of the teacher")
    parser.add_argument("--questions", type=count, default=10_000, help="addition: unseen questions (default: 10000)")
    parser.add_argument("--max-digits", type=count, default=8, help="addition: longest operands (default: 8)")
    parser.add_argument("--data", type=Path, default=instructions.DATA, help="instructions: a task file, or a folder of them "
                        f"(default: {instructions.DATA})")
    parser.add_argument("--test-instances", type=count, default=100, help="instructions: so many of each task (default: 100)")
    parser.add_argument("--max-new-tokens", type=count, help="longest completion (default: 256; for instructions 12)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto (default): cuda where there is one")
    parser.add_argument("--report", action="store_true", help="rebuild README's tables from results/*.json")


def main() -> None:
    parser = Parser(__doc__)
    add_flags(parser)
    arguments = parser.parse_args()
    if arguments.report:
        print("rebuilt in README.md: " + ", ".join(rebuild_readme(Path(__file__).parent)))
        return
    if not arguments.model:
        parser.error("--model is missing: the folder of a checkpoint, for example runs/addition/student")
    task = choose(arguments.task, TASKS)
    model, tokenizer = load(arguments.model, pick_device(arguments.device))
    if arguments.ask is not None:
        print(task.ask(model, tokenizer, arguments))
    else:
        task.test(model, tokenizer, arguments)


if __name__ == "__main__":
    guarded(main)
