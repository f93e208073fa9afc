"""The experiments, each in one file on the frame of run.py."""

from .addition import Addition
from .control import Control
from .curves import Curves
from .explanations import Explanations
from .facts import Facts
from .instructions import Instructions
from .own import Own
from .sql import Sql
from .sql_long import LongSql
from .task_ids import TaskIds
from .transfer import Transfer

TASKS = {"addition": Addition, "instructions": Instructions, "explanations": Explanations,
         "task_ids": TaskIds, "sql": Sql, "sql_long": LongSql, "transfer": Transfer, "control": Control,
         "facts": Facts, "curves": Curves, "own": Own}
