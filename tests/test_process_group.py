"""The end of a distributed run: destroying the process group while DistributedDataParallel is there must not hang."""

import subprocess
import sys

import pytest
import torch

from hf_robust.trainers import CATConfig, CATTrainer
from hf_robust.trainers.process_group import _kept, keep_process_group
from tests.helpers import tiny_model
from tests.trainer_data import adversarial_rows, settings, tiny_tokenizer, utility_rows

# Two thousand collectives under way are sure to have a thread in need of Python's lock; without the line that keeps the
# group, this script stands still in `del model`, every time
SCRIPT = """
import sys, time, torch
from hf_robust.trainers.process_group import keep_process_group
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
keep_process_group()
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
for _ in range(2000):
    torch.distributed.all_reduce(torch.ones(1), async_op=True)
torch.distributed.destroy_process_group()
del model
time.sleep(1)
print("ended")
"""


def test_the_group_is_freed_without_the_lock(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "store")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout == "ended\n", done.stderr[-2000:]


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_each_trainer_keeps_it_once(group, tmp_path):
    before = len(_kept)
    rows = {"train_dataset": utility_rows(), "adversarial_dataset": adversarial_rows()}
    for _ in range(2):
        CATTrainer(tiny_model(), CATConfig(**settings(tmp_path)), **rows, processing_class=tiny_tokenizer())
    assert [kept is group for kept in _kept[before:]] == [True]


def test_without_a_group_nothing_is_kept():
    before = len(_kept)
    keep_process_group()
    assert len(_kept) == before
