"""Charts, one function a result. The only place that imports matplotlib; nothing here computes."""

from thetau.plots.suite import suite_bars as suite_bars

__all__ = ["suite_bars"]
