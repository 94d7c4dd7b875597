# Generated from nbs/tools/07_commands.ipynb of qlora_kit; it calls the kit and holds no logic of its own.
import os
import sys
from pathlib import Path

os.chdir(Path(__file__).resolve().parent.parent)

from qlora_kit.tools.commands import inference_script

if __name__ == "__main__":
    sys.exit(inference_script(sys.argv[1:]))
