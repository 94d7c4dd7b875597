from pathlib import Path

from setuptools import setup

lines = Path(__file__).with_name("requirements.txt").read_text().splitlines()
setup(
    name="deepspeed_train",
    version="0.1.0",
    packages=["models", "utils"],
    install_requires=[line for line in lines if line and not line.startswith("#")],
)
