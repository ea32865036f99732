#!/usr/bin/env bash
# The demo's recipe under other learning rates, a fixed number of steps, two runs side by side with a thread each.
#
#     benchmarks/demo_sweep.sh [OUTPUT]         about 25 minutes on two cores; prints one line per run
set -euo pipefail
cd "$(dirname "$0")/.."
output=${1:-runs/sweep}
[ -f data/train.txt ] || .venv/bin/nanokimi prepare stdlib

run() {
    OMP_NUM_THREADS=1 .venv/bin/python train.py --preset tiny --batch_size 8 --gradient_accumulation 1 \
        --warmup_steps 10 --decay_fraction 0.8 --max_steps 340 --eval_interval 1000000 --save_interval 0 \
        --val_tokens 40960 --learning_rate "$1" --output_dir "$output/lr-$1" 2> "$output-$1.log"
    echo "learning_rate $1: $(tail -n 1 "$output-$1.log")"
}

mkdir -p "$output"
run 0.02 & run 0.01 & wait
run 0.005 & run 0.04 & wait
