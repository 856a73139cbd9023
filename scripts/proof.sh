#!/usr/bin/env bash
# Does distillation beat fine-tuning on the same data? The proof in miniature, from nothing, on a CPU: builds the program, makes tiny models
# for several seeds, trains the three arms under four conditions from their caches, sweeps one cache, and prints tables with intervals.
#
#   scripts/proof.sh [FOLDER] [SEEDS]          defaults: potstill-proof, 3; FOLDER/proof.json has every number
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --locked
exec target/release/potstill demo --proof --sweep --seeds "${2:-3}" --out "${1:-potstill-proof}"
