"""Your own data. The config reaches this through `data.load_dataset: utils.data_utils.load_custom_dataset`."""
from qlora_kit.data.rows import Conversation, load_rows


def load_custom_dataset(path):
    """Whatever `path` names, as conversations. Dicts with the columns of a known format will do as well, and so will a generator."""
    return [
        Conversation(
            messages=[
                {"role": "user", "content": "\n\n".join(t for t in (row["instruction"], row.get("input")) if t)},
                {"role": "assistant", "content": row["output"]},
            ],
            where=row["_where"],
        )
        for row in load_rows(path)
    ]
