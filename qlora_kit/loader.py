"""The old address of `qlora_kit.model.base` and `qlora_kit.model.loader`, which projects made by an older kit import."""
from .model.base import *  # noqa: F403
from .model.loader import *  # noqa: F403
