"""The compiled inner loop. Everything else about the package is in pyproject.toml.

It is optional: where no C compiler is at hand, thetau runs the same chains through torch, with the same bits.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "thetau.engine._kernels",
            sources=["src/thetau/engine/kernels.c"],
            # No contraction of products and sums: every machine and the torch path must agree to the last bit.
            extra_compile_args=["-O3", "-ffp-contract=off", "-fno-math-errno"],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={
        "bdist_wheel": {"py_limited_api": "cp311"}
    },  # the extension keeps to the stable ABI: one wheel for Python 3.11 and later
)
