#!/usr/bin/env bash
# One program for CPUs and NVIDIA GPUs, which starts whether or not CUDA is there: target/cuda/release/potstill.
#
#   scripts/build-cuda.sh [cargo build's options]
#
# nvcc is the one that KERNEL_NVCC names, else that of target/cuda-toolkit, which is fetched first where it is missing.
# The result is checked: its size, that it needs no library of NVIDIA's to start, that it holds real kernels, what it says to --device cuda.
set -euo pipefail
cd "$(dirname "$0")/.."

wrong() { printf 'build-cuda.sh: %s\n' "$*" >&2; exit 1; }

readonly MOST_BYTES=62000000
readonly TOOLKIT=target/cuda-toolkit
if [ -z "${KERNEL_NVCC:-}" ]; then
    [ -x $TOOLKIT/bin/nvcc ] || bash scripts/cuda-toolkit.sh $TOOLKIT
    KERNEL_NVCC=$PWD/$TOOLKIT/bin/nvcc
fi
export KERNEL_NVCC
# candle's PTX for 8.0, which every newer GPU compiles for itself; its GGUF kernels are left out.
export NVCC=$PWD/scripts/nvcc-ptx-only CUDA_COMPUTE_CAP=80
export CARGO_TARGET_DIR=target/cuda
cargo build --release --locked --features cuda "$@"

program=$CARGO_TARGET_DIR/release/potstill
size=$(stat -c %s "$program")
[ "$size" -le $MOST_BYTES ] || wrong "$program has $size bytes, expected at most $MOST_BYTES"
needed=$(readelf -d "$program" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' | tr '\n' ' ')
case $needed in
    *cuda* | *cublas* | *curand* | *nvrtc* | *nvidia*) wrong "$program does not start without CUDA, it needs $needed" ;;
esac
! grep -qa 'made by nvcc-stand-in' "$program" || wrong "$program holds no kernels of ours"
modules=$(grep -ca '^\.version 8\.0' "$program" || true)
[ "$modules" -eq 12 ] || wrong "$program holds $modules modules of PTX 8.0, expected candle's 11 and our own"

# A folder and a file that are there: the device is opened before anything in them is read.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
code=0
said=$("$program" precompute --quiet --teacher scripts --data README.md --cache "$scratch/cache" --device cuda 2>&1 > /dev/null) || code=$?
case $said in
    'error: device "cuda": '*)
        [ $code -eq 2 ] || wrong "a missing GPU ends with exit code $code, expected 2"
        [ "$(printf '%s\n' "$said" | wc -l)" -eq 1 ] || wrong "a missing GPU takes more than one sentence"
        ;;
    *scripts/config.json*) said='a GPU answers here' ;;
    *) wrong "--device cuda ends with: $said" ;;
esac

echo "$program: $size bytes, starts with $needed"
printf -- '--device cuda: %s\n' "$said"
