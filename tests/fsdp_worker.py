"""Runs `run_segmentation.py` with FSDP on the CPU; run by test_distributed.py.

PyTorch shards over gloo as well, but accelerate turns FSDP on for GPUs alone and would train without it.
"""

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from sam2unet_hf.finetuning import run_segmentation


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
