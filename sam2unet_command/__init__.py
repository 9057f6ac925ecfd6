"""The command `sam2unet`.

It is no part of `sam2unet_hf`, because importing anything of that package imports PyTorch and transformers, for which
neither a list of commands nor the facts of a model should wait.
"""
