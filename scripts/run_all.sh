#!/usr/bin/env bash
# The whole product in one page: chats -> teacher -> cache -> three students -> merged model.
# Set the variables for your models and data; the defaults are the real case.
set -euo pipefail

TEACHER=${TEACHER:-models/Qwen1.5-32B-Chat-AWQ}          # Hugging Face folder, AWQ int4
STUDENT=${STUDENT:-models/Qwen1.5-14B}                   # Hugging Face folder, dense
DATA=${DATA:-ultrachat_200k/data/train_sft-*.parquet}    # files, folders or globs; quoted globs are fine
OUT=${OUT:-work}                                         # everything is written below this folder
TOP_K=${TOP_K:-64}                                       # entries kept at each scored position
MAX_LENGTH=${MAX_LENGTH:-1024}                           # tokens of a conversation
STEPS=${STEPS:-500}                                      # optimiser steps of each student
LR=${LR:-2e-4}
RANK=${RANK:-64}
WARMUP=${WARMUP:-100}
DEVICE=${DEVICE:-auto}
POTSTILL=${POTSTILL:-target/release/potstill}

if [ ! -x "$POTSTILL" ]; then cargo build --release --locked; fi

# Stage one, once. Exit code 3 says that some conversations were skipped; they are counted in the output.
"$POTSTILL" precompute --teacher "$TEACHER" --data "$DATA" --cache "$OUT/cache" \
    --top-k "$TOP_K" --max-length "$MAX_LENGTH" --device "$DEVICE" || [ $? -eq 3 ]
"$POTSTILL" verify "$OUT/cache"
"$POTSTILL" inspect "$OUT/cache"

# Stage two, as often as you like, from the same cache.
for objective in sft distill distill+sft; do
    "$POTSTILL" train --student "$STUDENT" --cache "$OUT/cache" --out "$OUT/$objective" --objective "$objective" \
        --steps "$STEPS" --lr "$LR" --rank "$RANK" --warmup-steps "$WARMUP" --device "$DEVICE"
    "$POTSTILL" merge --student "$STUDENT" --adapter "$OUT/$objective/adapter" --out "$OUT/$objective/merged"
done
