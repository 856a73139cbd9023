#!/usr/bin/env bash
# The campaigns against the cache, at full size. `cargo test` does a small share of each.
#
#   scripts/campaign.sh                 failing calls, cuts of power, kills, mutations, races, readers, a full disk
#                                       (some 5 minutes on two cores)
#   scripts/campaign.sh kills faults    only these
#   scripts/campaign.sh fuzz            the fuzz targets, one after another, MINUTES each
#
# Sizes, from the environment:
#   KILLS=1000  CUTS=10000  MUTATIONS=20000  RACES=100  READERS=50  VANDALS=50  SEED=1  MINUTES=10
#
# Fuzzing needs a nightly compiler and cargo-fuzz:
#   rustup toolchain install nightly --profile minimal
#   cargo +nightly install cargo-fuzz --locked
# Inputs that were found worth keeping gather in cache/fuzz/corpus, inputs that end the target in cache/fuzz/artifacts.
set -euo pipefail
cd "$(dirname "$0")/.."

export POTSTILL_CAMPAIGN_KILLS=${KILLS:-1000}
export POTSTILL_CAMPAIGN_MUTATIONS=${MUTATIONS:-20000}
export POTSTILL_CAMPAIGN_RACES=${RACES:-100}
export POTSTILL_CAMPAIGN_READERS=${READERS:-50}
export POTSTILL_CAMPAIGN_VANDALS=${VANDALS:-50}
export POTSTILL_CAMPAIGN_SEED=${SEED:-1}
export POTSTILL_CAMPAIGN_FAULTS=all
export POTSTILL_CAMPAIGN_CUTS=${CUTS:-10000}
readonly MINUTES=${MINUTES:-10}
campaign() { # NAME FILTER
    local since=$SECONDS
    printf '\n== %s\n' "$1"
    cargo test -p potstill-cache --test campaign -- --nocapture --test-threads=1 "$2"
    printf '== %s: %d s\n' "$1" $((SECONDS - since))
}

faults() {
    local since=$SECONDS
    printf '\n== faults\n'
    cargo test -p potstill-cache --lib -- --nocapture --test-threads=1 faults::
    printf '== faults: %d s\n' $((SECONDS - since))
}

fuzz() {
    POTSTILL_FUZZ_CORPUS=$PWD/cache/fuzz/corpus \
        cargo test -p potstill-cache --test campaign -- --ignored --exact seeds::write_fuzz_seeds
    # The shard target writes a shard for every input.
    scratch=$(mktemp -d -p /dev/shm 2> /dev/null || mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    cd cache
    local target
    for target in manifest page shard; do
        printf '\n== fuzz %s, %s minutes\n' "$target" "$MINUTES"
        # At most 512 MiB, no single allocation above 256 MiB, no input that takes longer than 10 seconds.
        TMPDIR=$scratch cargo +nightly fuzz run "$target" -- -max_total_time=$((MINUTES * 60)) -rss_limit_mb=512 -malloc_limit_mb=256 \
            -timeout=10 -max_len=65536 -print_final_stats=1
    done
    cd ..
}

if [ $# -eq 0 ]; then
    set -- faults kills mutations races vandals disk golden
fi
for part in "$@"; do
    case $part in
        faults | fuzz) "$part" ;;
        kills | mutations | races | vandals | disk | golden) campaign "$part" "$part::" ;;
        *) printf 'campaign.sh: %s is no campaign; there are faults, kills, mutations, races, vandals, disk, golden, fuzz\n' "$part" >&2; exit 2 ;;
    esac
done
