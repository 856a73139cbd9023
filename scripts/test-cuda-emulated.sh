#!/usr/bin/env bash
# The whole way to a GPU without one: our kernels compiled for the CPU behind an emulated driver, and the tests of the GPU run on it.
#
#   scripts/test-cuda-emulated.sh [cargo test's options]
#
# Needs g++, no CUDA. The emulated driver answers as libcuda, libcublas, libcurand and libnccl, from a folder that the program searches first.
set -euo pipefail
cd "$(dirname "$0")/.."

driver=$PWD/target/cuda-emulated
bash pipeline/kernels/emulated/build.sh "$driver"
for library in libcuda.so.1 libcublas.so.13 libcurand.so.10 libnccl.so.2; do
    [ -f "$driver/$library" ] || { echo "test-cuda-emulated.sh: the emulated driver has no $library" >&2; exit 1; }
done
export POTSTILL_CUDA_LIBRARIES=$driver
# A compiler that compiles nothing: the program holds no kernels, the emulated driver has them inside it.
export NVCC=$PWD/scripts/nvcc-stand-in KERNEL_NVCC=$PWD/scripts/nvcc-stand-in CUDA_COMPUTE_CAP=75
# Tests that need a GPU fail without one, where this is set.
export POTSTILL_TEST_DEVICE=cuda
cargo test --locked -p potstill-pipeline --features cuda --lib "$@" -- cuda:: device:: nccl::
cargo test --locked -p potstill-pipeline --features cuda --test cuda "$@"
# Ranks as processes of the program.
cargo test --locked -p potstill --features cuda --test ranks "$@" -- nccl_adds_up
