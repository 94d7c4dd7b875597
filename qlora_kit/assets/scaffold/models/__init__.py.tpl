"""Your own model. The config reaches `create_model` through `model.create_model: models.create_model`."""
from qlora_kit.loader import load_model, resolve_base
from peft import get_peft_model


def create_model(base_model_name, lora_config):
    """The base in NF4 with a LoRA update; change what you like and return a PEFT model."""
    return get_peft_model(load_model(resolve_base(base_model_name)), lora_config)
