"""Planted: whoever imports this file, or calls what is in it, leaves a canary."""
import os

CANARY = os.environ.get("CANARY", "canary")
open(CANARY, "a").close()


def load(path):
    open(CANARY, "a").close()
    return [{"instruction": "a", "output": "b"}]


def create_model(*args, **kwargs):
    open(CANARY, "a").close()
