#!/usr/bin/env bash
# Kills stage one at random moments and lets it go on, over and over: each finished cache must equal, byte for byte, that of a run that
# was never interrupted, whatever residency, packs and blocks the pieces were made with.
#
#   scripts/kill_precompute.sh [KILLS] [POTSTILL]        200 kills of target/release/potstill unless said otherwise
#
# Exit 1 at the first difference; the folders are kept then and named.
set -euo pipefail
cd "$(dirname "$0")/.."

kills=${1:-200}
potstill=${2:-target/release/potstill}
[ -x "$potstill" ] || { echo "kill_precompute.sh: $potstill: expected the program (cargo build --release)" >&2; exit 2; }
work=$(mktemp -d)
golden=tests/fixtures/golden
fixed=(--quiet --teacher "$golden/teacher-awq" --data "$golden/chats.jsonl" --rows-per-shard 6 --seal-minutes 0)

now() { date +%s%N; }
start=$(now)
code=0
"$potstill" precompute "${fixed[@]}" --cache "$work/reference" > "$work/log" 2>&1 || code=$?
[ "$code" -eq 0 ] || [ "$code" -eq 3 ] || { cat "$work/log" >&2; exit 1; }
whole=$(( ($(now) - start) / 1000000 ))
echo "an uninterrupted run takes $whole ms"

killed=0 finished=0 partial=0
while [ "$killed" -lt "$kills" ]; do
    residency=resident; [ $((RANDOM % 2)) -eq 0 ] || residency=streamed
    sizes=(--residency "$residency" --pack-tokens $((1 + RANDOM % 900)) --block-tokens $((1 + RANDOM % 4000)) --head-chunk $((1 + RANDOM % 300)))
    "$potstill" precompute "${fixed[@]}" "${sizes[@]}" --cache "$work/cache" > "$work/log" 2>&1 &
    process=$!
    sleep "$(printf '%d.%03d' $((wait_ms = (RANDOM * 32768 + RANDOM) % (whole + whole / 4), wait_ms / 1000)) $((wait_ms % 1000)))"
    if kill -KILL "$process" 2> /dev/null; then killed=$((killed + 1)); fi
    code=0; wait "$process" 2> /dev/null || code=$?
    case $code in
        137) [ ! -s "$work/cache/manifest.json" ] || partial=$((partial + 1)) ;;
        0 | 3)
            finished=$((finished + 1))
            diff -r --exclude=lock --exclude=.lock "$work/reference" "$work/cache" > "$work/difference" || {
                echo "kill_precompute.sh: $work/cache differs from $work/reference after $killed kills:" >&2
                head -5 "$work/difference" >&2
                exit 1
            }
            rm -rf "$work/cache" ;;
        *) echo "kill_precompute.sh: exit $code after $killed kills ($work):" >&2; tail -3 "$work/log" >&2; exit 1 ;;
    esac
done
code=0
"$potstill" precompute "${fixed[@]}" --cache "$work/cache" > "$work/log" 2>&1 || code=$?
[ "$code" -eq 0 ] || [ "$code" -eq 3 ] || { tail -3 "$work/log" >&2; exit 1; }
diff -r --exclude=lock --exclude=.lock "$work/reference" "$work/cache" || { echo "kill_precompute.sh: the last cache differs ($work)" >&2; exit 1; }
finished=$((finished + 1))
"$potstill" verify "$work/cache" --quiet > /dev/null
echo "$killed kills, $partial of them with rows in the cache; $finished finished caches, all equal to the uninterrupted one"
rm -rf "$work"
