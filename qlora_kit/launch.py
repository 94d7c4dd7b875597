"""The old address of the commands and of its processes, which projects made by an older kit import."""
from .tools.commands import *  # noqa: F403
from .tools.processes import *  # noqa: F403
from .tools.commands import inference_script, main, train_script

if __name__ == "__main__":
    main()
