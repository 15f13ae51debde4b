"""A trained model as an MLflow `pyfunc`, for programs that know MLflow and not us.

A model that `mlflow.pyfunc.load_model` made of FOLDER gives 16 PNG files for
`predict(pandas.DataFrame({"index": range(16)}))`.
MLflow's models-from-code is used: the folder holds Python files that MLflow executes, and the
weights as safetensors with their manifest. The alternative, a pickled PythonModel, would run
whatever somebody put in its place and break with the next release.

The packages `nvae` and `pipeline` are copied into it (1 MB), since the reader need not have them;
what these need is its requirements. Loading such a folder executes code from it, as any
pyfunc does, which is why we write them and never load them: `registry.load` is our way.
"""

import shutil
import warnings
from importlib import metadata
from pathlib import Path

import mlflow
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

import nvae
import pipeline
from pipeline.models.export import LoadedModel, write_weights
from pipeline.models.folders import new_folder

_DISTRIBUTION = "nvae-cluster"


def write_pyfunc(loaded: LoadedModel, folder: Path) -> None:
    """Writes `loaded` as an MLflow model to `folder`, which must be new or empty; raises TakenError.

    It is whole or not there: the code and weights that it is made of lie beside it meanwhile.
    """
    with new_folder(str(folder)) as place:
        _save(loaded, Path(place))


def _save(loaded: LoadedModel, place: Path) -> None:
    scratch = place.parent
    weights, code = scratch / ".weights", scratch / ".code"
    write_weights(str(weights), loaded.model, loaded.config)
    for package in (nvae, pipeline):
        source = Path(str(package.__file__)).parent
        shutil.copytree(source, code / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    with warnings.catch_warnings():
        # The signature is given; an example would draw images, and be stored.
        warnings.filterwarnings("ignore", message=".*An input example")
        mlflow.pyfunc.save_model(
            place,
            python_model=str(Path(__file__).with_name("served.py")),
            artifacts={"model": str(weights)},
            code_paths=[str(code / "nvae"), str(code / "pipeline")],
            pip_requirements=_requirements(),
            signature=_SIGNATURE,
        )


def _requirements() -> list[str]:
    """What a plain installation of this release needs, and pandas, which `predict` speaks."""
    needed = [each for each in metadata.requires(_DISTRIBUTION) or [] if "extra ==" not in each]
    return [*needed, "pandas"]


_SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.long, "index")]),
    outputs=Schema([ColSpec(DataType.binary, "png")]),
    params=ParamSchema(
        [ParamSpec("seed", DataType.long, 0), ParamSpec("temperature", DataType.double, -1.0)]
    ),
)
