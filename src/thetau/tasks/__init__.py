"""Tasks: data splits, a frozen head made from the class names, and suites of tasks.

A task is a folder with `meta.json` and its examples (`FileSource` lists the layouts), or with the name of a data set of the hub; a new
one is added by dropping its folder into a data folder, or into `tasks/data` to ship it.
"""

from thetau.tasks.encoding import Tokens as Tokens
from thetau.tasks.encoding import encode as encode
from thetau.tasks.encoding import tokenise as tokenise
from thetau.tasks.head import Head as Head
from thetau.tasks.head import zero_shot_head as zero_shot_head
from thetau.tasks.heads import make_head as make_head
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
    "load_suite",
    "load_task",
    "make_head",
    "tokenise",
    "zero_shot_head",
]
