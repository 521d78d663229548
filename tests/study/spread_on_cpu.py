"""What the processes of a launch run in tests: Accelerate takes CPUs for GPUs, so that FSDP and DeepSpeed can be tried.

python -m torch.distributed.run --nproc-per-node=2 spread_on_cpu.py JOB
"""

import os
import sys

import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from stopping import stop_at

from crab.study.launch import main

begin = PartialState.__init__


def on_gpus(self, cpu=False, **kwargs):
    begin(self, False, **kwargs)


def set_device(self):
    self.device = torch.device("cpu")


if __name__ == "__main__":
    PartialState.__init__ = on_gpus
    PartialState.set_device = set_device
    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
    with stop_at(int(os.environ.get("STOP_AT", sys.maxsize))):
        main(sys.argv[1])
    print(f"trained by {AcceleratorState._shared_state['distributed_type']}")
