from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ._observation import Image

version: str

class Policy:
    @staticmethod
    def open(
        checkpoint: str,
        device: str,
        precision: str,
        threads: int,
        tokenizer: str,
        robot: str,
        assets: str,
        max_batch: int,
        progress: Callable[[int, int], object] | None,
    ) -> Policy: ...
    def new_session(self, robot: str, seed: int) -> Session: ...
    def info(self) -> dict[str, Any]: ...

class Session:
    def infer(
        self,
        images: list[Image],
        state: npt.NDArray[np.float64],
        prompt: str | None,
        tokens: npt.NDArray[np.int32] | None,
        steps: int,
        noise: npt.NDArray[np.float32] | None,
    ) -> dict[str, Any]: ...
    def reset(self) -> None: ...
    def contract_json(self) -> str: ...
    def contract_hash(self) -> str: ...
    def device(self) -> str: ...

def infer_batch(
    requests: list[
        tuple[
            Session,
            list[Image],
            npt.NDArray[np.float64],
            str | None,
            npt.NDArray[np.int32] | None,
        ]
    ],
    steps: int,
    noise: npt.NDArray[np.float32] | None,
) -> list[dict[str, Any]]: ...
def describe(checkpoint: str, robot: str, assets: str) -> dict[str, Any]: ...
