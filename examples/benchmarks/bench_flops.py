#!/usr/bin/env python
"""Count the floating-point operations of a forward pass, and report which share of the matmul rate it reaches.

python examples/benchmarks/bench_flops.py

The rate is the best that `torch.mm` reaches here on matrices of the encoder's sizes. A share of 1 would be a model
that does nothing but multiply matrices at that rate.
"""

import copy
import statistics
from typing import Any

import torch
from bench_model import build, forward_pass
from timing import DTYPES, count_flops, make_parser, report, time_in_turn

from sam2unet_hf.configuration_sam2unet import PRESETS


def matmul_rate(preset: str, tokens: int, dtype: torch.dtype, device: str, rounds: int) -> float:
    """Return the best rate of `torch.mm`, in operations per second, over the shapes of the encoder's MLPs."""
    hidden_size = PRESETS[preset]["hidden_size"]
    best = 0.0
    for stage in range(4):
        dim = hidden_size * 2**stage
        for rows in (tokens // 4**stage, 4 * tokens // 4**stage):
            first = torch.randn(rows, dim, dtype=dtype, device=device)
            second = torch.randn(dim, 4 * dim, dtype=dtype, device=device)
            seconds = time_in_turn({"mm": lambda a=first, b=second: torch.mm(a, b)}, rounds, device, warmup=2)["mm"]
            best = max(best, 2 * rows * dim * 4 * dim / min(seconds))
    return best


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = make_parser(__doc__, rounds=10)
    parser.add_argument("--presets", nargs="+", default=["large"], choices=list(PRESETS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--image_size", type=int, default=352)
    args = parser.parse_args(argv)
    cases, rows = [], []
    for preset in args.presets:
        models = build(preset, args.image_size)
        shape = (args.batch_size, 3, args.image_size, args.image_size)
        flops = {name: count_flops(model, torch.zeros(shape)) for name, model in models.items()}
        for dtype in args.dtypes:
            model = copy.deepcopy(models["ours"]).to(args.device, DTYPES[dtype])
            run = forward_pass(model, torch.randn(shape, device=args.device, dtype=DTYPES[dtype]))
            seconds = statistics.median(time_in_turn({"ours": run}, args.rounds, args.device)["ours"])
            tokens = args.batch_size * (args.image_size // 4) ** 2
            rate = matmul_rate(preset, tokens, DTYPES[dtype], args.device, args.rounds)
            case = {"preset": preset, "dtype": dtype, "flops": flops, "seconds": seconds, "matmul_flops_per_s": rate}
            case["share"] = flops["ours"] / rate / seconds
            cases.append(case)
            billions = f"{flops['ours'] / 1e9:.1f} (padded {flops['padded'] / 1e9:.1f})"
            row = {"preset": preset, "dtype": dtype, "GFLOP": billions, "time": f"{seconds:.3f} s"}
            rows.append({**row, "matmul rate": f"{rate / 1e9:.0f} GFLOP/s", "share": f"{case['share']:.2f}"})
    return report(__file__, argv, args, {"cases": cases}, rows)


if __name__ == "__main__":
    main()
