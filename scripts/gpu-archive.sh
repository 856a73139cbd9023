#!/usr/bin/env bash
# Everything that scripts/gpu-check.sh needs on a machine with a GPU, in one archive of 62 MB at most: the program, its GPU tests and the maker
# of models, built here, and small fixtures.
#
#   scripts/gpu-archive.sh [ARCHIVE]          default: target/gpu-check.tar.xz
set -euo pipefail
cd "$(dirname "$0")/.."
archive=${1:-target/gpu-check.tar.xz}
bash scripts/build-cuda.sh
# As build-cuda.sh has it.
export KERNEL_NVCC=${KERNEL_NVCC:-$PWD/target/cuda-toolkit/bin/nvcc} NVCC=$PWD/scripts/nvcc-ptx-only CUDA_COMPUTE_CAP=80 CARGO_TARGET_DIR=target/cuda
cargo build --release --locked -p potstill-pipeline --features cuda --example random_teacher
tests=$(cargo test --release --locked -p potstill-pipeline --features cuda --test cuda --no-run --message-format=json |
    sed -n 's/.*"executable":"\([^"]*cuda-[^"]*\)".*/\1/p' | tail -n 1)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
root=$folder/gpu-check
mkdir -p "$root/bin" "$root/scripts" "$root/fixtures"
install -m 755 target/cuda/release/potstill "$root/bin/potstill"
install -m 755 -s "$CARGO_TARGET_DIR/release/examples/random_teacher" "$root/bin/random_teacher"
install -m 755 -s "$tests" "$root/bin/cuda-tests"
cp scripts/gpu-check.sh scripts/gpu_check.py scripts/gpu_peer.py "$root/scripts/"
cp -r tests/fixtures/golden tests/fixtures/decoders "$root/fixtures/"
tar -C "$folder" -cJf "$archive" gpu-check
bytes=$(stat -c %s "$archive")
echo "$archive: $bytes bytes; there: tar -xf $(basename "$archive") && gpu-check/scripts/gpu-check.sh"
[ "$bytes" -le 62000000 ] || { echo "gpu-archive.sh: more than 62 MB" >&2; exit 1; }
