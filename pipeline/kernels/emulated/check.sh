#!/bin/sh
# Runs every kernel on the CPU against its definition: the emulated driver, all kernels and the checks in one program, once with the address
# and undefined behaviour sanitizers and once without. usage: check.sh [part of a check's name]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
build() {
    "${CXX:-g++}" -std=c++17 -pthread -ffp-contract=off -Wall -Wextra -Wno-sign-compare -Wno-unknown-pragmas -Werror "$@" \
        "$here/driver.cpp" "$here/transfers.cpp" "$here/memory.cpp" "$here/pinned.cpp" "$here/cublas.cpp" "$here/curand.cpp" "$here/nccl.cpp" "$here/fibres.cpp" \
        -include "$here/cuda_emulated.h" "$here"/check/*.cpp -x c++ "$here/../all.cu"
}
build -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -o "$out/sanitized"
# Frames of fibres are not where the sanitizer thinks a stack is; it must not move variables to the heap.
ASAN_OPTIONS=detect_stack_use_after_return=0:detect_leaks=0 "$out/sanitized" "$@"
build -O2 -o "$out/plain"
"$out/plain" "$@"
