"""Models handed on: GGUF files for llama.cpp, a card that says what a model was made of, and the hub."""

from thetau.export.card import Card as Card
from thetau.export.card import card_of as card_of
from thetau.export.card import write_card as write_card
from thetau.export.gguf import TYPES as TYPES
from thetau.export.gguf import Written as Written
from thetau.export.gguf import to_gguf as to_gguf
from thetau.export.licences import Licence as Licence
from thetau.export.licences import inherited as inherited
from thetau.export.push import push as push
