"""Fine-tuning as a command: `examples/run_segmentation.py`, and what other scripts share with it.

It needs the extra `examples`, and nothing else in this package imports it. Its loggers have the names of its files
alone, because they write what a user of the command reads.
"""
