"""Small models in memory, as `thetau.testing` makes them, for tests of methods."""

from __future__ import annotations

from copy import copy
from typing import Any

from thetau.testing import State as State
from thetau.testing import differences as differences
from thetau.testing import merged as merged
from thetau.testing import merged_vector as merged_vector
from thetau.testing import models as models
from thetau.testing import relative as relative
from thetau.testing import site as site
from thetau.testing import vectors_of as vectors_of


def checked(cls: Any, values: dict[str, Any]) -> None:
    """A method's own checks: the tests' type checker, which users do not have, would speak before them."""
    method = copy(cls())
    for name, value in values.items():
        object.__setattr__(method, name, value)
    method.__post_init__()
