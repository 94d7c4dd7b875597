"""Your own model. The config reaches `create_model` through `model.create_model: models.create_model`."""
from peft import get_peft_model

from qlora_kit.model.loader import load_model


def create_model(base_model_name, lora_config, *, folder, quant_type, double_quant, quant_storage, dtype, device):
    """The base in 4 bits with a LoRA update; change what you like and return a PEFT model.

    `folder` holds what `base_model_name` stands for. The settings after the `*` come from the config; leave out those you don't need.
    """
    base = load_model(folder, quant_type, double_quant, quant_storage=quant_storage, dtype=dtype, device=device)
    return get_peft_model(base, lora_config)
