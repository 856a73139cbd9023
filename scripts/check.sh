#!/usr/bin/env bash
# Everything a change must pass, cheapest first. Stops at the first thing that is wrong and says what it is.
set -euo pipefail
cd "$(dirname "$0")/.."

step() { printf '\n== %s\n' "$*"; }
wrong() { printf 'check.sh: %s\n' "$*" >&2; exit 1; }

# Lines of code (comments left out) in the given folders or files that match a pattern, less those that match another.
# A path that is not there has nothing to hide.
code_lines() { # PATTERN EXCEPT PATH...
    local pattern=$1 except=$2 path; shift 2
    for path in "$@"; do
        if [ -e "$path" ]; then
            grep -rnE --include='*.rs' -- "$pattern" "$path" /dev/null || true
        fi
    done | grep -vE '^[^:]+:[0-9]+:[[:space:]]*//' | grep -vE -- "$except" || true
}

forbid() { # SENTENCE PATTERN EXCEPT PATH...
    local sentence=$1 found; shift
    found=$(code_lines "$@")
    [ -z "$found" ] || { printf '%s\n' "$found" >&2; wrong "$sentence"; }
}

readonly NOTHING='^$'
readonly P=pipeline/src

step "formatting"
cargo fmt --all --check

step "who may know whom"
for crate in candle-core cudarc tokenizers; do
    if cargo tree --locked -p potstill-cache -e normal --prefix none | grep -q "^$crate "; then
        wrong "the cache crate depends on $crate"
    fi
done
forbid "model knows the cache (its error class apart)" 'potstill_cache' 'potstill_cache::ErrorClass' $P/model $P/model.rs
forbid "data knows tensors" 'candle' "$NOTHING" $P/data $P/data.rs
forbid "teacher knows student" '(crate|super)::(\{[^}]*)?student' "$NOTHING" $P/teacher $P/teacher.rs
forbid "student knows teacher" '(crate|super)::(\{[^}]*)?teacher' "$NOTHING" $P/student $P/student.rs
forbid "precompute knows train" 'crate::(\{[^}]*)?train\b' "$NOTHING" $P/precompute $P/precompute.rs
forbid "train knows precompute (its tests apart)" 'crate::(\{[^}]*)?precompute\b' '_tests\.rs:' $P/train $P/train.rs
forbid "loss knows the model" 'crate::(\{[^}]*)?model\b' "$NOTHING" $P/loss $P/loss.rs
forbid "evaluate knows train or precompute" 'crate::(\{[^}]*)?(train|precompute)\b' "$NOTHING" $P/evaluate
forbid "the judge knows benchmarks" '\b(mt_bench|alpaca_eval)\b' "$NOTHING" $P/evaluate/judge
forbid "the libraries know the command line" '\bclap\b|\bindicatif\b|\banyhow\b' "$NOTHING" $P cache/src
forbid "a library prints" '\be?print(ln)?!' '_tests\.rs:' $P cache/src

step "house rules"
while IFS= read -r file; do
    [ -f "$file" ] || continue
    lines=$(wc -l < "$file")
    [ "$lines" -le 500 ] || wrong "$file has $lines lines; at 500 it is two rooms"
    case $file in
        *.rs) head -n 1 "$file" | grep -q '^//!' || wrong "$file does not open with //!" ;;
    esac
    case $(basename "$file" | tr '[:upper:]' '[:lower:]') in
        util.* | utils.* | common.* | helper.* | helpers.* | manager.* | base.* | misc.*) wrong "$file: a name that says nothing" ;;
    esac
    case /$(dirname "$file")/ in
        */util/* | */utils/* | */common/* | */helper/* | */helpers/* | */manager/* | */base/* | */misc/*) wrong "$file: a folder name that says nothing" ;;
    esac
done < <(git ls-files -- '*.rs' '*.py' '*.sh')

# Outside tests nothing panics on purpose. (unwrap and expect are denied by clippy, below.)
panics=$(git ls-files -- 'src/*.rs' 'cache/src/*.rs' 'pipeline/src/*.rs' | grep -vE '(^|/|_)tests(\.rs$|/)' | while IFS= read -r file; do
    [ -f "$file" ] && awk -v file="$file" '
        /#\[cfg\((all\()?test/ { exit }
        /^[[:space:]]*\/\// { next }
        /(panic|todo|unimplemented|unreachable|dbg)!/ { print file ":" FNR ":" $0 }' "$file"
done || true)
[ -z "$panics" ] || { printf '%s\n' "$panics" >&2; wrong "something panics on purpose outside tests"; }

step "the GPU's kernels, on the CPU"
if command -v "${CXX:-g++}" > /dev/null; then
    said=$(mktemp)
    pipeline/kernels/emulated/check.sh 2> "$said" || { cat "$said" >&2; wrong "a kernel does not agree with its definition"; }
    rm -f "$said"
else
    echo "skipped: no g++"
fi

step "clippy"
cargo clippy --workspace --all-targets --locked -- -D warnings

# A feature; where the library is compiled once more, its tests are run too.
cargo clippy -p potstill-pipeline --features hub --all-targets --locked -- -D warnings
cargo test --locked --quiet -p potstill-pipeline --features hub --test hub

step "the GPU's side"
# The library's code for it is checked everywhere, with a compiler that compiles nothing; the kernels are compiled where there is a real one.
kernels_nvcc=${KERNEL_NVCC:-$PWD/target/cuda-toolkit/bin/nvcc}
if [ ! -x "$kernels_nvcc" ]; then
    echo "skipped: compiling the kernels, no nvcc (scripts/cuda-toolkit.sh fetches one, KERNEL_NVCC names one)"
    kernels_nvcc=$PWD/scripts/nvcc-stand-in
fi
KERNEL_NVCC=$kernels_nvcc NVCC=$PWD/scripts/nvcc-stand-in CUDA_COMPUTE_CAP=75 \
    cargo clippy -p potstill -p potstill-pipeline --features cuda --all-targets --locked -- -D warnings

step "cluster files"
if python3 -c 'import yaml' 2> /dev/null; then
    python3 scripts/kubernetes/check.py
else
    echo "skipped: scripts/kubernetes/check.py needs PyYAML"
fi

step "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked --quiet

step "dependencies"
if command -v cargo-deny > /dev/null; then
    cargo deny --locked --offline check licenses bans sources
    # Advisories are fetched; without a network the rest still holds.
    if cargo deny --locked fetch db > /dev/null 2>&1; then
        cargo deny --locked check advisories
    else
        echo "skipped: advisories, which could not be fetched"
    fi
else
    # Building it takes longer than everything else here, and its advisories must be fetched.
    echo "skipped: cargo-deny is not installed (cargo install cargo-deny --locked)"
fi

step "tests"
# The README's test command, taken from there so that it stays true.
tests=$(grep -m1 -oE '^cargo test .*$' README.md) || wrong "the README names no test command"
echo "$tests"
$tests

step "the GPU's side, on an emulated GPU"
if command -v "${CXX:-g++}" > /dev/null; then
    bash scripts/test-cuda-emulated.sh --quiet
else
    echo "skipped: no g++"
fi
