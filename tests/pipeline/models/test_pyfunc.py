"""The MLflow model, used by a process that knows MLflow and nothing of this project."""

import json
import os
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.models.export import load_directory, write_weights
from pipeline.models.folders import TakenError
from pipeline.models.pyfunc import write_pyfunc
from pipeline.models.sampling import sample_images
from tests.pipeline.models.tiny import tiny_config, tiny_model

USER = """
import base64, json, sys
import mlflow, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
table = pandas.DataFrame({"index": [4, 1]})
answers = [model.predict(table), model.predict(table, params={"seed": 3, "temperature": 0.0})]
import nvae, pipeline
print(json.dumps({
    "code": [nvae.__file__, pipeline.__file__],
    "pictures": [[base64.b64encode(each).decode() for each in answer["png"]] for answer in answers],
}))
"""


def pixels(encoded: str, folder: Path) -> np.ndarray:
    file = folder / "answer.png"
    file.write_bytes(b64decode(encoded))
    return np.asarray(Image.open(file)).astype(int)


def test_any_mlflow_user_can_predict_samples_from_code_and_safetensors_alone(tmp_path):
    model, config = tiny_model(), tiny_config()
    write_weights(str(tmp_path / "source"), model, config)
    exported = tmp_path / "new" / "exported"
    write_pyfunc(load_directory(str(tmp_path / "source")), exported)
    assert [file.name for file in exported.parent.iterdir()] == ["exported"]
    assert [file for file in exported.rglob("*") if file.suffix in {".pkl", ".pickle", ".pt", ".pth"}] == []
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # Isolated from this checkout: only what is in the folder, and the libraries.
    user = [sys.executable, "-I", "-c", USER, str(exported)]
    ran = subprocess.run(user, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout.splitlines()[-1])
    assert all(str(exported) in file for file in answer["code"])
    by_default, cold = [[pixels(each, tmp_path) for each in table] for table in answer["pictures"]]
    drawn = sample_images(model, 5, config.sampling.temperature, seed=0).astype(int)
    assert np.abs(by_default[0] - drawn[4]).max() <= 1
    assert np.abs(by_default[1] - drawn[1]).max() <= 1
    assert np.abs(cold[0] - sample_images(model, 1, 0.0, seed=3)[0]).max() <= 1


def test_a_folder_with_something_in_it_is_refused_and_stays(tmp_path):
    write_weights(str(tmp_path / "source"), tiny_model(), tiny_config())
    loaded = load_directory(str(tmp_path / "source"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("kept")
    with pytest.raises(TakenError, match="mine: is there already"):
        write_pyfunc(loaded, tmp_path / "mine")
    assert (tmp_path / "mine" / "file").read_text() == "kept"
