"""Your own data. The config reaches this through `data.load_dataset: utils.data_utils.load_custom_dataset`."""
from qlora_kit.data import Conversation, load_rows


def load_custom_dataset(path):
    """Rows with a question and an answer under names of your own become conversations."""
    return [
        Conversation(
            messages=[
                {"role": "user", "content": "\n\n".join(t for t in (row["instruction"], row.get("input")) if t)},
                {"role": "assistant", "content": row["output"]},
            ],
            where=f"{path} row {i}",
        )
        for i, row in enumerate(load_rows(path), 1)
    ]
