"""The old address of `qlora_kit.model.lora`, which projects made by an older kit import."""
from .model.lora import *  # noqa: F403
