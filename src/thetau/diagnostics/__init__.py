"""Looking at checkpoints and task vectors: each returns a frozen result that serialises to JSON; none draws."""

from thetau.diagnostics.comparing import compare as compare
from thetau.diagnostics.comparison import Comparison as Comparison
from thetau.diagnostics.inspection import Inspection as Inspection
from thetau.diagnostics.inspection import inspect as inspect
