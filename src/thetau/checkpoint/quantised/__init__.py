"""Quantised checkpoints, read as if they were not: a form a file, and what is refused by name.

A weight that is stored as codes and scales comes out under its usual name, in the shape that the model has it, as the library that runs it
reads it; row by row, in bounded memory. Nothing of a quantised weight is ever taken for a buffer: what no form explains is refused.
"""

from thetau.checkpoint.quantised.recognise import FORMS as FORMS
from thetau.checkpoint.quantised.recognise import dequantised as dequantised
from thetau.checkpoint.quantised.source import QuantisedSource as QuantisedSource
