#!/usr/bin/env python
"""Fine-tune SAM2-UNet on BraTS, on any image/mask data set, or, with no arguments, on a phantom cohort.

python examples/run_segmentation.py
python examples/run_segmentation.py --brats_dir BraTS2020_TrainingData --sam2_checkpoint facebook/sam2-hiera-large
python examples/run_segmentation.py --dataset_name my_folder --sam2_checkpoint facebook/sam2-hiera-tiny
python examples/run_segmentation.py --brats_dir BraTS2020_TrainingData --folds 5
"""

from sam2unet_hf.finetuning.run_segmentation import run_command


if __name__ == "__main__":
    run_command()
