#!/bin/sh
# Builds the emulated driver with every kernel of ../all.cu: OUTDIR/libcuda.so.1, and the same file as libcublas.so.13, libcurand.so.10
# and libnccl.so.2.
# usage: build.sh OUTDIR [flags for the compiler ...]
set -eu
[ $# -ge 1 ] || { echo "usage: $0 OUTDIR [flags ...]" >&2; exit 2; }
out=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
# Products and sums are rounded one by one, as the kernels' _rn functions promise, on processors with fused instructions too.
"${CXX:-g++}" -std=c++17 -pthread -O3 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Wno-sign-compare -Wno-unknown-pragmas "$@" -shared -o "$out/libcuda.so.1" \
    "$here/driver.cpp" "$here/transfers.cpp" "$here/memory.cpp" "$here/pinned.cpp" "$here/cublas.cpp" "$here/curand.cpp" "$here/nccl.cpp" "$here/fibres.cpp" \
    -include "$here/cuda_emulated.h" -x c++ "$here/../all.cu"
for name in libcublas.so.13 libcurand.so.10 libnccl.so.2; do
    ln -sf libcuda.so.1 "$out/$name"
done
