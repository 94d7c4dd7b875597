import os

open(os.environ.get("CANARY", "canary"), "a").close()  # planted under the name of a library
