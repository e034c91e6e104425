#!/usr/bin/env bash
# What each part of GAM is worth: every command of results/anatomy and results/table-1, in the order in which the rows are wanted.
# A command goes on with what is missing, so that this file may be stopped and started at any time:
#
#     nice -n 19 bash results/anatomy/queue.sh swaps        # or llama-adamw, longer, sizes, recall, table-1, corrected, horizon, downstream, recall-blank, or nothing for all
#
# The primary comparisons and the margin of "no loss" were named here before any row was trained. The others that are tested are those of gam with each other
# model, with Holm's correction (`gam compare FOLDER:gam FOLDER`), named before the rows of gated-deltanet, gam-static, transformer and the two of global paths alone.
set -euo pipefail
cd "$(dirname "$0")/../.."
GAM=${GAM:-.venv/bin/gam}

# The primary comparisons, of gam with those of the models named that they are about.
primary() {
  for other in gam-attention llama mamba; do
    [[ " $* " == *" $other "* ]] && echo "--primary gam:$other"
  done
  echo "--margin 0.02"
}
PRIMARY=($(primary gam-attention llama mamba))

# Stage A: one part of GAM's block swapped at a time, and the baselines; 1.25 million parameters, 2.5 million tokens, fp32 on every machine, compiled.
# The three that answer most come first, under either optimiser; then the attention of llama in GAM's block, the fourth of the primary comparisons,
# the delta memory in a plain block, and the static memory in GAM's; then the rest.
SIZE=(--data books --vocab-size 4096 --hidden-size 128 --num-hidden-layers 4 --batch-size 8 --context 256 --precision fp32 --compile on --clip 0.1 --workers "${WORKERS:-1}")
CORE=(gam gam-attention llama)
BLOCK=("${CORE[@]}" gam-self-attention)
FIRST=("${BLOCK[@]}" mamba)
SECOND=("${FIRST[@]}" gated-deltanet gam-static)
SWAPS=("${SECOND[@]}" transformer gam+fusion=global+keep_gate=true gam-static+fusion=global)

# stage-a OPTIMIZER MODELS…
stage-a() {
  local search=(learning_rate=1e-3:1.6e-2)
  [[ $1 == muon ]] && search=(muon_learning_rate=5e-3:8e-2 "${search[@]}")
  "$GAM" tune "${SIZE[@]}" --steps 1200 --optimizer "$1" --models "${@:2}" --search "${search[@]}" --trials 5 --widenings 3 --out "results/anatomy/tune-$1"
  "$GAM" bench "${SIZE[@]}" --steps 1200 --optimizer "$1" --models "${@:2}" --seeds 0 1 2 --tuned "results/anatomy/tune-$1" --test --no-timing \
    $(primary "${@:2}") --out "results/anatomy/swaps-$1"
}

swaps() {
  stage-a muon "${CORE[@]}"
  stage-a adamw "${CORE[@]}"
  stage-a muon "${BLOCK[@]}"
  stage-a muon "${FIRST[@]}"
  stage-a adamw "${FIRST[@]}"
  stage-a muon "${SECOND[@]}"
  stage-a adamw "${SECOND[@]}"
  stage-a muon "${SWAPS[@]}"
  stage-a adamw "${SWAPS[@]}"
}

# Whether the clip that all have is what AdamW trains the Llama block worse by.
llama-adamw() {
  "$GAM" tune "${SIZE[@]}" --steps 1200 --optimizer adamw --models gam llama --search learning_rate=4e-3:1.6e-2 clip=0.1:2 --trials 6 --widenings 1 \
    --out results/anatomy/tune-llama-adamw
}

# The four of the primary comparisons once more, four times as long, at stage A's rates.
longer() {
  for optimizer in muon adamw; do
    "$GAM" bench "${SIZE[@]}" --steps 4800 --optimizer "$optimizer" --models "${CORE[@]}" mamba --seeds 0 1 2 --tuned "results/anatomy/tune-$optimizer" --test --no-timing \
      "${PRIMARY[@]}" --out "results/anatomy/longer-$optimizer"
  done
}

# Three sizes by three horizons of gam and llama at stage A's rates: whether their lines cross, and the law of each.
sizes() {
  "$GAM" bench --data books --vocab-size 4096 --num-hidden-layers 4 --batch-size 8 --context 256 --precision fp32 --compile on --clip 0.1 --optimizer muon \
    --hidden-size 64 128 256 --steps 300 1200 4800 --models gam llama --tuned results/anatomy/tune-muon --workers "${WORKERS:-1}" --test --no-timing \
    --out results/anatomy/sizes
}

# Table 1 by the paper's protocol: five epochs at the published sizes. GAM and the Transformer with products in bf16, less than two hours each on two cores with a matrix
# unit for it (much longer without); mamba-paper as published, in fp32: in bf16 its gradient is mostly rounding, and it diverges (the row is kept).
table-1() {
  "$GAM" bench --preset paper-wikitext2 --data wikitext-2-v1 --precision bf16 --test --no-timing --out results/table-1/wikitext-2-v1
  "$GAM" bench --preset paper-wikitext2 --data wikitext-2-v1 --models mamba-paper --test --no-timing --out results/table-1/wikitext-2-v1-fp32
  "$GAM" bench --preset paper-tinystories --data tinystories-sample --train-rows 50000 --models gam-paper transformer-paper --precision bf16 --test --no-timing --out results/table-1/tinystories-sample
}

# Table 1 as it would be made today: the recommended models at equal parameters, tuned alike with Muon over one epoch, then five.
corrected() {
  local table=(--data wikitext-2-v1 --tokenizer paper --vocab-size 10000 --hidden-size 512 --num-hidden-layers 6 --batch-size 32 --context 256 --dropout 0.1
    --optimizer muon --clip 0.1 --precision bf16 --models gam llama mamba --workers 1)
  "$GAM" tune "${table[@]}" --epochs 1 --trials 3 --widenings 1 --out results/table-1/tune-corrected
  "$GAM" bench "${table[@]}" --epochs 5 --tuned results/table-1/tune-corrected --test --no-timing $(primary llama mamba) --out results/table-1/corrected
}

# Recall, at equal trials for every model: pairs as Zoology draws them and among filler that looks like pairs, keys bound twice,
# copying, and states to track. Two layers, 64 wide, equal parameters; a training stops when 99 % are right, as Zoology's do. Where a state is constant it is of
# equal size: mamba has its authors' 27,360 bytes, so gam has 204 slots (27,136 bytes) and the heads of gated-deltanet are wider (25,344).
ASKED=(gam+num_memory_slots=204 gam-attention gated-deltanet+expand_v=3 mamba llama)

# asked FOLDER PAIRS LENGTH FLAGS…: 4,096 tokens a step at every length
asked() {
  "$GAM" recall --precision fp32 --initialization fan_in --models "${ASKED[@]}" --trials 3 --seeds 0 1 2 --steps 2000 --stop-at 0.99 --workers "${WORKERS:-1}" \
    --pairs "$2" --length "$3" --batch-size "$((4096 / $3))" --out "results/anatomy/recall-$1" "${@:4}"
}

# sizes-asked FOLDER FLAGS…
sizes-asked() {
  asked "$1" 8 64 "${@:2}"
  asked "$1" 16 128 "${@:2}"
  asked "$1" 32 256 "${@:2}"
  asked "$1" 64 512 "${@:2}"
}

recall() {
  sizes-asked zoology --task zoology
  sizes-asked filler
  asked forgetting 8 64 --task forgetting
  asked forgetting 16 128 --task forgetting
  asked copying 16 128 --task copying
  local ASKED=(gam gam+max_write=2 gated-deltanet gated-deltanet+max_write=2 mamba llama)
  asked parity 1 64 --task parity --test-lengths 128 256
  asked permutations 1 32 --task permutations --test-lengths 64 128
}

# The easier filler, whose ids are no keys.
recall-blank() {
  sizes-asked pairs --filler blank
}

# Stage B: 5.5 million parameters over 5 and 20 million tokens in one pass, then gam and llama over 100 million. Learning rates around stage A's best,
# three trials at 5 million tokens. Measured on texts of five other kinds as well.
LARGE=(--data books --vocab-size 4096 --hidden-size 256 --num-hidden-layers 6 --batch-size 16 --context 256 --precision fp32 --optimizer muon --clip 0.1
  --workers "${WORKERS:-1}")
TEXTS=(--texts wikitext-2-v1 tinystories-sample tinyshakespeare lambada stdlib)

horizon() {
  "$GAM" tune "${LARGE[@]}" --steps 1221 --models gam gam-attention gam-hybrid llama mamba --trials 3 --widenings 1 --out results/anatomy/tune-5.5M
  "$GAM" bench "${LARGE[@]}" --steps 1221 --models gam gam-attention gam-hybrid llama mamba --tuned results/anatomy/tune-5.5M --test --no-timing \
    "${PRIMARY[@]}" --out results/anatomy/horizon-5M
  "$GAM" bench "${LARGE[@]}" --steps 4883 --models gam gam-attention gam-hybrid llama mamba --tuned results/anatomy/tune-5.5M --test --no-timing \
    "${PRIMARY[@]}" "${TEXTS[@]}" --out results/anatomy/horizon-20M
  "$GAM" bench "${LARGE[@]}" --steps 4883 --models gam llama mamba --seeds 0 1 --tuned results/anatomy/tune-5.5M --test --no-timing \
    "${PRIMARY[@]}" "${TEXTS[@]}" --out results/anatomy/horizon-20M
  "$GAM" bench "${LARGE[@]}" --steps 24414 --models gam llama --tuned results/anatomy/tune-5.5M --test --no-timing \
    --primary gam:llama "${TEXTS[@]}" --out results/anatomy/horizon-100M
}

# The models of 20 million tokens on tasks, beside counts of the training text.
downstream() {
  "$GAM" eval results/anatomy/horizon-20M/runs/*-seed[01] --tasks blimp lambada --data books --out results/anatomy/downstream
}

for part in "${@:-swaps llama-adamw longer sizes recall table-1 corrected horizon downstream recall-blank}"; do
  for each in $part; do "$each"; done
done
