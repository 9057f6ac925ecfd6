"""Runs `run_segmentation.py` with FSDP on the CPU; run by test_distributed.py.

PyTorch shards over gloo as well, but accelerate turns FSDP on for GPUs alone and would train without it.
"""

import sys
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import run_segmentation  # noqa: E402 - the scripts are no package


def shard_on_cpu() -> None:
    """Let accelerate take FSDP for several CPU processes as it does for several GPUs."""
    init = AcceleratorState.__init__

    def init_with_fsdp(state, *args, fsdp_plugin=None, **kwargs):
        init(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init_with_fsdp


if __name__ == "__main__":
    shard_on_cpu()
    run_segmentation.main()
