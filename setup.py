"""Requirements, version and console scripts come from settings.ini; everything else from pyproject.toml."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

cfg = ConfigParser(delimiters=["="])
cfg.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
kit = cfg["DEFAULT"]

setup(
    version=kit["version"],
    python_requires=f">={kit['min_python']}",
    install_requires=kit["requirements"].split(),
    extras_require={
        "lab": kit["lab_requirements"].split(),
        "dev": kit["dev_requirements"].split() + kit["lab_requirements"].split(),
        "deepspeed": kit["deepspeed_requirements"].split(),
    },
    entry_points={"console_scripts": kit["console_scripts"].split("\n"), "nbdev": ["qlora_kit=qlora_kit._modidx:d"]},
)
