"""Models handed on: GGUF files for llama.cpp, a card that says what a model was made of, and the hub."""

from thetau.export.gguf import TYPES as TYPES
from thetau.export.gguf import Written as Written
from thetau.export.gguf import to_gguf as to_gguf
