"""The old address of the chapter *model*'s page lora, which hooks written for an older kit import."""
from ._positional import positional
from .model import lora
from .model.lora import *  # noqa: F403

add_lora, save_adapter = positional(lora.add_lora), positional(lora.save_adapter)
