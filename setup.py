"""Packaging of far_scale.

Version ranges end before the next version that may break something: DeepSpeed's at the last series tested with
far_scale's adapter. Torch's is wide, since it must fit the machine's GPU. requirements/ has one tested version of each
package.
"""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "far_scale" / "__init__.py").read_text(), re.MULTILINE).group(1)


class BuildWithRecipes(build_py):
    """Copies recipes/, which users edit at the top level of a checkout, into the package of a wheel."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # an editable install reads the checkout's
            shutil.copytree(HERE / "recipes", Path(self.build_lib) / "far_scale" / "recipes", dirs_exist_ok=True)


setup(
    name="far_scale",
    version=VERSION,
    description="Training of frame-autoregressive video models (FAR), from one laptop to a SLURM cluster",
    license_expression="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.10",
    packages=find_packages(include=["far_scale", "far_scale.*"]),
    cmdclass={"build_py": BuildWithRecipes},
    entry_points={"console_scripts": ["far-scale = far_scale.cli.main:main"]},
    package_data={"far_scale": ["py.typed"], "far_scale.autoencoder": ["weights/*"], "far_scale.play": ["static/*"]},
    install_requires=[
        "torch>=2.9,<2.16",
        "deepspeed>=0.19,<0.20",
        "webdataset>=0.2,<2",
        "braceexpand>=0.1.7,<1",
        "safetensors>=0.4.5,<1",
        "pydantic>=2.8,<3",
        "pyyaml>=6.0,<7",
        "numpy>=1.26,<3",
        "tqdm>=4.66,<5",
        "av>=15.0,<20",
        "pillow>=10.1,<14",
        "matplotlib>=3.8,<4",
        "torchmetrics>=1.4,<2",
    ],
    extras_require={
        "flash": ["flash-attn>=2.7"],
        "flash4": ["flash-attn-4>=4.0.0b10"],  # only pre-releases exist; pip takes them when named
        "xformers": ["xformers>=0.0.33"],
        "mds": ["cramjam>=2.8"],
        "slurm": ["submitit>=1.5", "cloudpickle>=2.0"],
        "wandb": ["wandb>=0.18"],
        "tensorboard": ["tensorboard>=2.15"],
        "dcae": ["diffusers>=0.33"],
        "hub": ["huggingface_hub>=1.0,<3"],
        "demo": ["vizdoom>=1.2.4"],
        "play": ["aiohttp>=3.10,<4"],
        "dev": [
            "aiohttp>=3.10,<4",
            "diffusers>=0.33",
            "huggingface_hub>=1.0,<3",
            "pytest>=8.0",
            "pytest-xdist>=3.5",
            "ruff>=0.9",
            "mypy>=1.13",
            "types-PyYAML",
        ],
    },
)
