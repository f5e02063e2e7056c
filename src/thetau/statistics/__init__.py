"""Streaming statistics: one file each."""

from thetau.statistics.collect import Collect as Collect
from thetau.statistics.columns import ColumnProducts as ColumnProducts
from thetau.statistics.gram import Gram as Gram
from thetau.statistics.masking import MaskedSums as MaskedSums
from thetau.statistics.norms import SquaredNorms as SquaredNorms
from thetau.statistics.overlap import OverlapCounts as OverlapCounts
from thetau.statistics.quantile import DerivedQuantile as DerivedQuantile
from thetau.statistics.quantile import MagnitudeQuantile as MagnitudeQuantile
from thetau.statistics.signs import SignTotals as SignTotals
