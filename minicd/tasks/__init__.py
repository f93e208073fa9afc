"""The experiments, each in one file on the frame of run.py."""

from .addition import Addition
from .curves import Curves
from .explanations import Explanations
from .instructions import Instructions
from .sql import Sql
from .sql_long import LongSql
from .task_ids import TaskIds

TASKS = {"addition": Addition, "instructions": Instructions, "explanations": Explanations,
         "task_ids": TaskIds, "curves": Curves, "sql": Sql, "sql_long": LongSql}
