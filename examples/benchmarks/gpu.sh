#!/usr/bin/env bash
# The figures that need a GPU, each part with a time limit of its own.
#
# bash examples/benchmarks/gpu.sh OUTPUT_DIR BRATS_DIR            on a machine with a CUDA device: all parts, 23 minutes
# bash examples/benchmarks/gpu.sh OUTPUT_DIR BRATS_DIR accuracy   one or some of tests, volumes, training, forward, accuracy
# bash examples/benchmarks/gpu.sh --quick OUTPUT_DIR BRATS_DIR    anywhere, at small size, to try the script
#
# Each part writes JSON, and a table beside it, into the output folder; models and logs stay in OUTPUT_DIR/runs, or in
# $WORK_DIR. The runs of `accuracy` train side by side on one card, $STEPS steps each (860; 2 with --quick), after a
# learning rate was chosen on the validation patients.
set -uo pipefail
cd "$(dirname "$0")/../.."

quick=false
if [ "${1:-}" = --quick ]; then quick=true; shift; fi
output_dir=${1:?"usage: gpu.sh [--quick] OUTPUT_DIR BRATS_DIR [PART ...]"}
brats_dir=${2:?"usage: gpu.sh [--quick] OUTPUT_DIR BRATS_DIR [PART ...]"}
shift 2
parts=" ${*:-tests volumes training forward accuracy} "
work_dir=${WORK_DIR:-$output_dir/runs}
mkdir -p "$output_dir" "$work_dir"
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

part() {
    # Run a command with a limit in seconds if its part was asked for, show the end of its output, and go on whatever
    # became of it.
    local part=$1 name=$2 limit=$3 start=$SECONDS
    shift 3
    [[ "$parts" == *" $part "* ]] || return 0
    timeout "$limit" "$@" > "$output_dir/$name.log" 2>&1
    local status=$?
    tail -n 25 "$output_dir/$name.log"
    echo "== $name: exit status $status after $((SECONDS - start)) s of $limit s"
}

first_case=$(find -L "$brats_dir" -mindepth 1 -maxdepth 1 -type d | sort | head -n 1)
if $quick; then
    model=(--presets tiny --image_size 64 --batch_sizes 2 --rounds 1 --device cpu)
    volumes=(--image_size 64 --batch_size 1 --rounds 1) presets=(tiny)
    recipes=(--parallel 2 --num_workers 0 --batch_size 4)
    rates=(5e-4 1e-3) rate_steps=1 steps=2
    arms=(crop batch_iou) options=(--use_cpu true --batch_norm_images 2) large=tiny
    compile=()  # takes minutes on a CPU
else
    model=(--presets large --batch_sizes 64 --rounds 3 --profile)
    volumes=(--batch_size 16 --volume_batch_size 32 --rounds 5 --dtype bfloat16) presets=(tiny large)
    # On an H200 nine runs of the large preset side by side take 2.4 steps a second each.
    recipes=(--parallel 8 --num_workers 2 --num_proc 8 --batch_size 16)
    rates=(1e-4 2.5e-4 5e-4 1e-3) rate_steps=200 steps=${STEPS:-860}
    arms=(tumour crop empty neighbours average augmentation batch_iou)
    options=(--bf16 true) compile=(--compile) large=large
fi

part tests tests 240 python3 -m pytest -q -n 0 -o addopts= -m gpu tests/test_gpu.py
for preset in "${presets[@]}"; do
    part volumes "volumes-$preset" 60 python3 examples/benchmarks/bench_window.py "${volumes[@]}" --preset "$preset" \
        --case "$first_case" --output "$output_dir/volumes-$preset.json"
done
part training training 60 python3 examples/benchmarks/bench_model.py "${model[@]}" --modes training --dtypes bfloat16 \
    --output "$output_dir/training.json"
part forward forward 90 python3 examples/benchmarks/bench_model.py "${model[@]}" --modes forward --dtypes bfloat16 \
    "${compile[@]}" --output "$output_dir/forward.json"

recipe() {
    # Train arms of a preset for some steps, with options behind them, and write what came out under a name.
    local name=$1 limit=$2 steps=$3
    shift 3
    part accuracy "$name" "$limit" python3 examples/benchmarks/bench_recipes.py --brats_dir "$brats_dir" \
        "${recipes[@]}" --steps "$steps" --work "$work_dir/$name" --output "$output_dir/$name.json" "$@" &
}
# The learning rate of the large preset, by the validation patients after few steps.
[[ "$parts" != *" accuracy "* ]] || rm -f "$output_dir"/rate-*.json  # of an earlier run
for rate in "${rates[@]}"; do
    recipe "rate-$rate" 180 $rate_steps --preset "$large" --arms volume --options "${options[@]}" --learning_rate "$rate"
done
wait
rate=$(python3 - "$output_dir" "${rates[@]}" << 'EOF'
import json, pathlib, sys
folder, *rates = sys.argv[1:]
dice = {}
for rate in rates:
    path = pathlib.Path(folder, f"rate-{rate}.json")
    if path.exists():
        dice[rate] = json.loads(path.read_text())["cases"][0]["summary"]["WT"]["volume_dice"]["mean"]
print(max(dice, key=dice.get, default=""))
EOF
)
if [[ "$parts" == *" accuracy "* ]]; then
    echo "== learning rate of the large preset: ${rate:-5e-4, that of the recipe, since none was measured}"
fi
rate=${rate:-5e-4}
rated=("${options[@]}" --learning_rate "$rate")
recipe ingredients 660 "$steps" --preset "$large" --arms "${arms[@]}" --options "${rated[@]}"
recipe large 660 "$steps" --test --preset "$large" --arms volume --options "${rated[@]}"
recipe tiny 660 "$steps" --test --preset tiny --arms volume --options "${options[@]}"
recipe paper 660 "$steps" --test --preset "$large" --arms paper --options "${options[@]}"
wait
