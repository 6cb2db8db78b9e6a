import numpy as np
from numpy.typing import NDArray

FORMAT: int

def predict(code: bytes, matrix: NDArray[np.float64], out: NDArray[np.float64]) -> None: ...
