"""Write data/databases/ and its wide/: generated databases as SPIDER's files have them, with their rows.

    python data/make_databases.py

The first DATABASES are for the experiments, CHOOSING more to choose learning rates on; the base is trained on
others, made on the fly (data/world/databases.py). Those of wide/ have more jargon than four examples: they
are for the experiment with more examples than the window holds. The first third of a database's questions is
for tests. The files do not depend on the machine.
"""

import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minicd.runtime.files import atomic_json  # noqa: E402
from data.world.databases import FULL, WIDE, Database, Level, draw_database  # noqa: E402

DATABASES, CHOOSING = 12, 4
TESTS, PRACTICE = 80, 160  # questions of each


def draw_databases(name: str = "databases", n: int = DATABASES + CHOOSING,
                   level: Level = FULL) -> list[Database]:
    """n of the split for tests, with different names."""
    rng, found = random.Random(f"data/{name}"), {}
    while len(found) < n:
        database = draw_database(rng, "test", level)
        found.setdefault(database.schema["db_id"], database)
    return list(found.values())


def questions_of(database: Database) -> list[dict[str, str]]:
    """As in dev.json: those for tests first."""
    name = database.schema["db_id"]
    found = {**database.questions(TESTS, True, random.Random(f"{name}/tests")),
             **database.questions(PRACTICE, False, random.Random(f"{name}/practice"))}
    return [{"db_id": name, "question": question, "query": query} for question, query in found.items()]


def main(folder: Path = ROOT / "data" / "databases") -> None:
    write(draw_databases(), folder)
    write(draw_databases("databases/wide", DATABASES, WIDE), folder / "wide")


def write(databases: list[Database], folder: Path) -> None:
    """SPIDER's two files, and the rows."""
    atomic_json(folder / "tables.json", [database.schema for database in databases])
    questions = [question for database in databases for question in questions_of(database)]
    atomic_json(folder / "dev.json", questions)
    atomic_json(folder / "rows.json", {database.schema["db_id"]: database.rows for database in databases})


if __name__ == "__main__":
    main()
