"""Names and packages; all other metadata stands in pyproject.toml."""

from setuptools import setup

setup(
    packages=[
        "dilkern",
        "dilkern.backends",
        "dilkern.lm_head",
        "dilkern.integrations",
        "dilkern.cli",
        "dilkern.kernels",
    ],
    # `kernels/` is a top-level folder without __init__.py: a top-level *package* of that name would
    # shadow Hugging Face's `kernels`, which transformers probes.
    package_dir={"dilkern": "dilkern", "dilkern.kernels": "kernels"},
    package_data={"dilkern": ["py.typed"]},
)
