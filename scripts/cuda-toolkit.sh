#!/usr/bin/env bash
# What compiling for NVIDIA GPUs needs: nvcc 13.0 with its headers, from NVIDIA's wheels on PyPI, into one folder; no root, no GPU, no driver.
#
#   scripts/cuda-toolkit.sh [FOLDER]      default target/cuda-toolkit; 105 MB are fetched, 270 MB stay
#
# Needs Python 3 with pip (PYTHON names one), g++, Linux on x86-64. The wheels are under NVIDIA's licence (FOLDER/licenses): they are fetched
# to build with; neither they nor the folder may be committed or passed on.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-target/cuda-toolkit}
python=${PYTHON:-python3}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
scratch=$(mktemp -d "$folder.XXXX")
trap 'rm -rf "$scratch"' EXIT

cat > "$scratch/wheels.txt" << 'END'
nvidia-cuda-nvcc==13.0.88 --hash=sha256:56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03
nvidia-nvvm==13.0.88 --hash=sha256:c5f41ffeb6466944a026dfa5317d7d85355c119bbec279205d22f1869d1054e0
nvidia-cuda-crt==13.0.88 --hash=sha256:2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4
nvidia-cuda-runtime==13.0.96 --hash=sha256:7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548
nvidia-cuda-cccl==13.0.85 --hash=sha256:e0da7ad981f3a8aff08241b5bfc1af868742a63e2762f53a5171c492ef242649
END
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes \
    --dest "$scratch/wheels" --requirement "$scratch/wheels.txt"
for wheel in "$scratch"/wheels/*.whl; do
    "$python" -m zipfile -e "$wheel" "$scratch/unpacked"
done

rm -rf "$folder"
mv "$scratch/unpacked/nvidia/cu13" "$folder"
mkdir "$folder/licenses"
for package in "$scratch"/unpacked/*.dist-info; do
    find "$package" -iname '*license*' -type f -exec cp {} "$folder/licenses/$(basename "$package" .dist-info).txt" \;
done
# Unpacking loses the right to execute; nvcc looks for libraries in lib64.
chmod -R u+rwX,go+rX "$folder"
chmod a+x "$folder"/bin/* "$folder"/nvvm/bin/*
ln -s lib "$folder/lib64"

# It compiles for both targets, headers and C++ library included.
cat > "$scratch/try.cu" << 'END'
#include <cub/cub.cuh>
#include <cuda_bf16.h>
extern "C" __global__ void twice(__nv_bfloat16 *x) { x[threadIdx.x] *= __float2bfloat16(2.f); }
END
"$folder/bin/nvcc" -fatbin -std=c++17 -gencode=arch=compute_80,code=compute_80 -gencode=arch=compute_90a,code=sm_90a \
    -o "$scratch/try.fatbin" "$scratch/try.cu"
echo "$folder ($(du -sh "$folder" | cut -f1)): $("$folder/bin/nvcc" --version | grep -o 'release.*')"
