"""Packages; everything else about the build stands in pyproject.toml.

configs/ at the top of the checkout becomes the package moe_train._configs of a wheel, so that an installed command
line knows the shipped experiments.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["moe_train", "moe_train.*"]), "moe_train._configs"],
    package_dir={"moe_train._configs": "configs"},
    package_data={"moe_train._configs": ["*/*.yaml"]},
)
