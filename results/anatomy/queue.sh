#!/usr/bin/env bash
# What each part of GAM is worth: every command of results/anatomy and results/table-1, in the order in which the rows are wanted.
# A command goes on with what is missing, so that this file may be stopped and started at any time:
#
#     nice -n 19 bash results/anatomy/queue.sh swaps        # or table-1, or nothing for all
#
# The primary comparisons and the margin of "no loss" were named here before any row was trained.
set -euo pipefail
cd "$(dirname "$0")/../.."
GAM=${GAM:-.venv/bin/gam}
PRIMARY=(--primary gam:gam-attention --primary gam:llama --primary gam:mamba --margin 0.02)

# Stage A: one part of GAM's block swapped at a time, and the baselines; 1.25 million parameters, 2.5 million tokens, fp32 on every machine.
# The four of the primary comparisons come first, under either optimiser.
SIZE=(--data books --vocab-size 4096 --hidden-size 128 --num-hidden-layers 4 --steps 1200 --batch-size 8 --context 256 --precision fp32 --compile off --workers "${WORKERS:-1}")
FIRST=(gam gam-attention llama mamba)
SWAPS=("${FIRST[@]}" gam-static transformer gated-deltanet gam+fusion=global+keep_gate=true gam-static+fusion=global)

# stage-a OPTIMIZER MODELS…
stage-a() {
  "$GAM" tune "${SIZE[@]}" --optimizer "$1" --models "${@:2}" --trials 5 --widenings 1 --out "results/anatomy/tune-$1"
  "$GAM" bench "${SIZE[@]}" --optimizer "$1" --models "${@:2}" --seeds 0 1 2 --tuned "results/anatomy/tune-$1" --test --no-timing \
    "${PRIMARY[@]}" --out "results/anatomy/swaps-$1"
}

swaps() {
  stage-a muon "${FIRST[@]}"
  stage-a adamw "${FIRST[@]}"
  stage-a muon "${SWAPS[@]}"
  stage-a adamw "${SWAPS[@]}"
}

# Table 1 by the paper's protocol: five epochs at the published sizes, hours a model on two cores.
table-1() {
  "$GAM" bench --preset paper-wikitext2 --data wikitext-2-v1 --test --no-timing --out results/table-1/wikitext-2-v1
  "$GAM" bench --preset paper-tinystories --data tinystories-sample --train-rows 50000 --test --no-timing --out results/table-1/tinystories-sample
}

for part in "${@:-swaps table-1}"; do
  for each in $part; do "$each"; done
done
