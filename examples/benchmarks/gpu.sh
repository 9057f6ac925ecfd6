#!/usr/bin/env bash
# The figures that need a GPU, the most important first, each part with a time limit of its own; ten minutes in all.
#
# bash examples/benchmarks/gpu.sh OUTPUT_DIR [BRATS_DIR]          on a machine with a CUDA device
# bash examples/benchmarks/gpu.sh --quick OUTPUT_DIR [BRATS_DIR]  anywhere, at small size, to try the script
#
# Each part writes JSON, and a table beside it, into the output folder. Without BRATS_DIR accuracy is left out.
set -uo pipefail
cd "$(dirname "$0")/../.."

quick=false
if [ "${1:-}" = --quick ]; then quick=true; shift; fi
output_dir=${1:?"usage: gpu.sh [--quick] OUTPUT_DIR [BRATS_DIR]"}
brats_dir=${2:-}
mkdir -p "$output_dir"
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

part() {
    # Run a command with a limit in seconds, show the end of its output, and go on whatever became of it.
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    timeout "$limit" "$@" > "$output_dir/$name.log" 2>&1
    local status=$?
    tail -n 25 "$output_dir/$name.log"
    echo "== $name: exit status $status after $((SECONDS - start)) s of $limit s"
}

if $quick; then
    model=(--presets tiny --image_size 64 --batch_sizes 2 --rounds 1 --device cpu)
    accuracy=(--minutes 0.1 --calibration_steps 2 --parallel 2 --arms crop batch_iou --num_workers 0)
    options=() compile=()  # compiling takes minutes on a CPU
else
    model=(--presets large --batch_sizes 64 --rounds 3 --profile)
    accuracy=(--minutes 4 --calibration_steps 60 --parallel 8 --num_workers 2 --num_proc 16)
    accuracy+=(--arms tumour crop empty neighbours average augmentation batch_iou large)
    compile=(--compile)
    options=(--options --bf16 true --per_device_train_batch_size 16 --learning_rate 1e-3)
fi

part tests 80 python3 -m pytest -q -n 0 -o addopts= -m gpu tests/test_gpu.py
part training 60 python3 examples/benchmarks/bench_model.py "${model[@]}" --modes training --dtypes bfloat16 \
    --output "$output_dir/training.json"
part forward 90 python3 examples/benchmarks/bench_model.py "${model[@]}" --modes forward --dtypes bfloat16 "${compile[@]}" \
    --output "$output_dir/forward.json"
if [ -n "$brats_dir" ]; then
    part accuracy 450 python3 examples/benchmarks/bench_recipes.py --brats_dir "$brats_dir" "${accuracy[@]}" \
        --work "$output_dir/runs" --output "$output_dir/accuracy.json" "${options[@]}"
fi
