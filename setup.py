"""Adds the folder experiments/ to the wheel as spmd/experiments; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["spmd*"]), "spmd.experiments"],
    package_dir={"spmd.experiments": "experiments"},
)
