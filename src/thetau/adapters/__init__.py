"""Adapters whole: taken out of a model, added, and merged into one adapter again, without the full weights."""

from thetau.adapters.adding import add as add
from thetau.adapters.clearing import clear_merge as clear_merge
from thetau.adapters.extracting import extract as extract
from thetau.adapters.factors import Cut as Cut
from thetau.adapters.factors import Factors as Factors
from thetau.adapters.merging import merge as merge
from thetau.adapters.reading import Adapter as Adapter
from thetau.adapters.reading import Module as Module
from thetau.adapters.reading import open_adapter as open_adapter
from thetau.adapters.robust import robust_merge as robust_merge
from thetau.adapters.writing import Made as Made
