"""Tasks: data splits, a frozen head made from the class names, and suites of tasks.

A task is a folder with `meta.json` and `{train,validation,test}.jsonl.gz`; a new one is added by dropping its folder into a data
folder, or into `tasks/data` to ship it.
"""

from thetau.tasks.encoding import Tokens as Tokens
from thetau.tasks.encoding import encode as encode
from thetau.tasks.encoding import tokenise as tokenise
from thetau.tasks.head import Head as Head
from thetau.tasks.head import head_of as head_of
from thetau.tasks.head import zero_shot_head as zero_shot_head
from thetau.tasks.loading import available_tasks as available_tasks
from thetau.tasks.loading import load_task as load_task
from thetau.tasks.rows import Split as Split
from thetau.tasks.suite import Suite as Suite
from thetau.tasks.suite import load_suite as load_suite
from thetau.tasks.task import Task as Task

__all__ = [
    "Head",
    "Split",
    "Suite",
    "Task",
    "Tokens",
    "available_tasks",
    "encode",
    "head_of",
    "load_suite",
    "load_task",
    "tokenise",
    "zero_shot_head",
]
