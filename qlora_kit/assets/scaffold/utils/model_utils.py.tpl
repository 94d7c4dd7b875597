"""Looking at a model."""
from qlora_kit.model.lora import trainable_table


def print_trainable(model):
    """Which weights train, and how many bytes the rest take."""
    print(trainable_table(model).to_string())
