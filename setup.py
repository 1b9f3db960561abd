"""Everything is declared in pyproject.toml; this file is where the native build hooks in."""

from setuptools import setup

setup()
