import numpy as np
from numpy.typing import NDArray


def portrait(seed: int, size: int = 256) -> NDArray[np.uint8]:
    return np.zeros((size, size, 3), np.uint8)
