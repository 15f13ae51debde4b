"""The ladder on two real processes: one rank's trouble, and one rank's wish to stop, are everybody's."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.data.index import load_index
from pipeline.training.checkpoint import newest
from pipeline.training.checkpoint_writer import CheckpointWriter, claim_attempt
from pipeline.training.recovery import agreed
from pipeline.training.state import Training
from pipeline.training.tracking import NullTracker
from pipeline.training.train import train
from pipeline.training.worker import LocalWorker
from tests.injecting import Injecting, break_gradient, stop
from tests.tiny_run import Home

pytestmark = pytest.mark.campaign


class GlooWorker(LocalWorker):
    """One of two processes without Ray."""

    def __init__(self, rank: int) -> None:
        super().__init__(torch.device("cpu"))
        self.rank, self.world_size = rank, 2

    def wrap(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model, broadcast_buffers=False)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        dist.barrier()


def run_rank(rank: int, folder: str, home: Home) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    url = f"{folder}/run"
    settings = ("cadence.checkpoint_images=8", "cadence.evaluate_images=1000", "checkpoint.keep=20")
    config = home.config(f"data.root={home.store}/data/tiny", *settings)
    outcomes = []
    for injections in ({**dict.fromkeys(range(20, 40, 4), break_gradient), 40: stop}, {}):
        # Trouble and the wish to stop are the second rank's alone.
        worker = Injecting(GlooWorker(rank), injections if rank == 1 else {})
        writer = CheckpointWriter(url, claim_attempt(url), config.checkpoint.keep) if rank == 0 else None
        resume = agreed(lambda: newest(url), url, worker)
        training = Training(config, load_index(config.data.root), worker, NullTracker(), writer, url)
        outcomes.append(train(training, resume))
        if writer is not None:
            writer.wait()
        dist.barrier()
    model: nn.Module = worker.model
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    Path(f"{folder}/{rank}.json").write_text(json.dumps(outcomes))
    dist.barrier()
    dist.destroy_process_group()


def test_all_ranks_roll_back_stop_and_go_on_together(shared_home: Home, tmp_path: Path) -> None:
    multiprocessing.spawn(run_rank, args=(str(tmp_path), shared_home), nprocs=2)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == ["stopped", "finished"]
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    last = newest(str(tmp_path / "run"))
    assert last is not None
    assert all(torch.equal(tensor, ours[name]) for name, tensor in last.load("model").items())
    done = last.record["interventions"]
    assert [(each["kind"], each["images_seen"], each["back_to"]) for each in done] == [
        *(("skip", images, None) for images in (24, 28, 32, 36)),
        ("roll_back", 40, 16),
    ]
    # The samples of both ranks.
    assert all(len(set(each["keys"])) == 4 for each in done)
