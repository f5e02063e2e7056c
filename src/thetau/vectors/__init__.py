"""The lazy algebra of weights: `open(a) - open(b)`, `+`, `−`, scalar `*`, negation."""

from thetau.vectors.combination import Combination as Combination
