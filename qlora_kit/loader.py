"""The old address of the chapter *model*'s pages base and loader, which projects made by an older kit import."""
from ._positional import positional
from .model import loader
from .model.base import *  # noqa: F403
from .model.loader import *  # noqa: F403

load_model = positional(loader.load_model)
