"""Live torch models: finding them, loading their weights, running them with other weights.

`locate` finds a model's folder, `load_encoder` makes it run, and `Encoder` takes any weights with the base's names.
"""

from thetau.checkpoint.locate import locate as locate
from thetau.models.encoder import Encoder as Encoder
from thetau.models.encoder import TextEncoder as TextEncoder
from thetau.models.loading import load_encoder as load_encoder
from thetau.models.weights import read_weights as read_weights
from thetau.models.weights import weights_hash as weights_hash

__all__ = ["Encoder", "TextEncoder", "load_encoder", "locate", "read_weights", "weights_hash"]
