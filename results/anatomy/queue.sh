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

# Stage A: one part of GAM's block swapped at a time, and the baselines; 1.25 million parameters, 2.5 million tokens.
SIZE=(--data books --vocab-size 4096 --hidden-size 128 --num-hidden-layers 4 --steps 1200 --batch-size 8 --context 256)
SWAPS=(gam gam-attention llama mamba gam-static transformer gated-deltanet gam+fusion=global+keep_gate=true gam-static+fusion=global)

swaps() {
  for optimizer in muon adamw; do
    "$GAM" tune "${SIZE[@]}" --optimizer "$optimizer" --models "${SWAPS[@]}" --trials 5 --widenings 1 --out "results/anatomy/tune-$optimizer"
    "$GAM" bench "${SIZE[@]}" --optimizer "$optimizer" --models "${SWAPS[@]}" --seeds 0 1 2 --tuned "results/anatomy/tune-$optimizer" --test --no-timing \
      "${PRIMARY[@]}" --out "results/anatomy/swaps-$optimizer"
  done
}

# Table 1 by the paper's protocol: five epochs at the published sizes, hours a model on two cores.
table-1() {
  "$GAM" bench --preset paper-wikitext2 --data wikitext-2-v1 --test --no-timing --out results/table-1/wikitext-2-v1
  "$GAM" bench --preset paper-tinystories --data tinystories-sample --train-rows 50000 --test --no-timing --out results/table-1/tinystories-sample
}

for part in "${@:-swaps table-1}"; do
  for each in $part; do "$each"; done
done
