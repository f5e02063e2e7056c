"""Small models in memory, as `thetau.testing` makes them, for tests of methods."""

from __future__ import annotations

from thetau.testing import State as State
from thetau.testing import differences as differences
from thetau.testing import merged as merged
from thetau.testing import merged_vector as merged_vector
from thetau.testing import models as models
from thetau.testing import relative as relative
from thetau.testing import site as site
from thetau.testing import vectors_of as vectors_of
