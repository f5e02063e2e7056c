"""Adapters as task vectors: PEFT's folders, and the LoRA files of kohya's scripts and of diffusers."""

from thetau.checkpoint.lora.config import CONFIG as CONFIG
from thetau.checkpoint.lora.config import PREFIX as PREFIX
from thetau.checkpoint.lora.config import Settings as Settings
from thetau.checkpoint.lora.config import is_adapter as is_adapter
from thetau.checkpoint.lora.layout import is_flat as is_flat
from thetau.checkpoint.lora.layout import lacks_config as lacks_config
from thetau.checkpoint.lora.source import BLOCK as BLOCK
from thetau.checkpoint.lora.source import LoraSource as LoraSource
