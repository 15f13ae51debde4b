"""What an exported MLflow model runs: `predict` for samples. MLflow executes this file.

pyfunc.py copies it beside the weights; it is read as code when the model is loaded, and there is
no pickle. It loads weights as everything here does, verified against the manifest.
"""

from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from pipeline.models.export import load_directory
from pipeline.models.sampling import Drawing, grid, png, samples


class Sampler(PythonModel):
    """A row with `index` for each image that is wanted; answered by a row with `png`, the file's bytes."""

    def load_context(self, context: Any) -> None:
        loaded = load_directory(context.artifacts["model"])
        self._model, self._sampling = loaded.model, loaded.config.sampling

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Image number `index` of a seed is the picture that `nvae sample` draws.

        `params` are `seed` and `temperature`; the model's own temperature is used if that is negative.
        """
        given = params or {}
        temperature = float(given.get("temperature", -1.0))
        drawing = Drawing(
            temperature=temperature if temperature >= 0 else self._sampling.temperature,
            seed=int(given.get("seed", 0)),
        )
        indices = [int(index) for index in model_input["index"]]
        pictures = [
            png(grid(image[None])) for _, images in samples(self._model, indices, drawing) for image in images
        ]
        return pd.DataFrame({"png": pictures})


set_model(Sampler())
