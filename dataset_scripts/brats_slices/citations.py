"""What to cite for the scans."""

CITATION = """\
@article{menze2015brats,
  author  = {Menze, Bjoern H. and others},
  title   = {The Multimodal Brain Tumor Image Segmentation Benchmark ({BRATS})},
  journal = {IEEE Transactions on Medical Imaging},
  volume  = {34},
  number  = {10},
  pages   = {1993--2024},
  year    = {2015},
  doi     = {10.1109/TMI.2014.2377694},
}
@article{bakas2017advancing,
  author  = {Bakas, Spyridon and others},
  title   = {Advancing The Cancer Genome Atlas glioma {MRI} collections with expert segmentation labels and radiomic
             features},
  journal = {Scientific Data},
  volume  = {4},
  pages   = {170117},
  year    = {2017},
  doi     = {10.1038/sdata.2017.117},
}
@article{bakas2018identifying,
  author  = {Bakas, Spyridon and others},
  title   = {Identifying the Best Machine Learning Algorithms for Brain Tumor Segmentation, Progression Assessment,
             and Overall Survival Prediction in the {BRATS} Challenge},
  journal = {arXiv preprint arXiv:1811.02629},
  year    = {2018},
}
"""
DECATHLON_CITATION = """\
@article{antonelli2022decathlon,
  author  = {Antonelli, Michela and others},
  title   = {The Medical Segmentation Decathlon},
  journal = {Nature Communications},
  volume  = {13},
  pages   = {4128},
  year    = {2022},
  doi     = {10.1038/s41467-022-30695-9},
}
"""
