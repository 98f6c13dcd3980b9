"""Lists the packages: pyproject.toml, where all else is, cannot combine a search with an extra name."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["cocodiff", "cocodiff.*"]),
        "cocodiff.kernels",
        *(f"cocodiff.kernels.{name}" for name in find_packages("kernels/src")),
    ]
)
