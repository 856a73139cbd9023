#!/usr/bin/env bash
# The full-size proof on one NVIDIA GPU, within ten minutes, without network or Rust: parity tests, both stages at the sizes this is made for.
#
#   scripts/gpu-check.sh [--tiny] [--work FOLDER] [--only PART]...      from the archive that scripts/gpu-archive.sh makes, or a checkout
#
# Prints one table and both stages' profiles by kernel (standard output) and progress (standard error); exit code 1 where something failed. Needs python3, NVIDIA's driver, cuBLAS and
# cuRAND (PyTorch's will do; its NCCL is tried too, with one rank) and 64 GB of disk under --work. `--tiny` takes small models: it tries the script itself, on any GPU or an emulated one.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
command -v python3 > /dev/null || { echo "gpu-check.sh: python3 is needed" >&2; exit 2; }
exec python3 "$here/gpu_check.py" "$@"
