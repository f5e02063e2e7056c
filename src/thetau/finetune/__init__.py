"""Fine-tuning: one loop, whose paradigms differ by data, and an output that is an ordinary checkpoint."""

from thetau.finetune.config import FinetuneConfig as FinetuneConfig
from thetau.finetune.run import FinetuneResult as FinetuneResult
from thetau.finetune.run import finetune as finetune

__all__ = ["FinetuneConfig", "FinetuneResult", "finetune"]
