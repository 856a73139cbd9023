#!/usr/bin/env bash
# Kills stage two at random moments and lets it go on, over and over: each finished adapter must equal, byte for byte, that of a run that
# was never interrupted, and so must the optimiser's last state.
#
#   scripts/kill_train.sh [KILLS [POTSTILL [FLAGS]]]        50 kills of target/release/potstill unless said otherwise
#
# Works on the models of `potstill demo`, with a new checkpoint after every second step. The state is kept in f32 and in 8 bits by turns,
# rows come from the cache and from chats by turns. FLAGS, in one word, are given to the runs from the cache besides:
#
#   scripts/kill_train.sh 20 target/release/potstill "--eval-rows 8 --eval-every 5 --dropout 0.1"
#
# The best adapter is compared too where there is one. Exit 1 at the first difference; the folders are kept then and named.
set -euo pipefail
cd "$(dirname "$0")/.."

kills=${1:-50}
potstill=${2:-target/release/potstill}
read -ra flags <<< "${3:-}"
[ -x "$potstill" ] || { echo "kill_train.sh: $potstill: expected the program (cargo build --release)" >&2; exit 2; }
work=$(mktemp -d)
wrong() { echo "kill_train.sh: $* ($work)" >&2; exit 1; }

"$potstill" demo --quiet --out "$work/demo" > "$work/log" 2>&1 || { tail -3 "$work/log" >&2; wrong "the demo failed"; }
steps=24
fixed=(--quiet --config pipeline/recipes/tiny.toml --student "$work/demo/miniature/student" --steps "$steps" --batch-size 8
    --checkpoint-every 2)
arms=(cache chats)
rows_cache=(--cache "$work/demo/cache" --optimizer adamw "${flags[@]}")
rows_chats=(--objective sft --data "$work/demo/miniature/chats.jsonl" --max-length 256 --optimizer adamw-8bit --schedule wsd)

now() { date +%s%N; }
command_of() { # ARM OUT: sets `command`
    local -n rows=rows_$1
    command=("$potstill" train "${fixed[@]}" "${rows[@]}" --out "$2")
}
train() { command_of "$@"; "${command[@]}"; }
ended_well() { [ "$1" -eq 0 ] || [ "$1" -eq 3 ]; }

declare -A whole
for arm in "${arms[@]}"; do
    start=$(now) code=0
    train "$arm" "$work/reference-$arm" > "$work/log" 2>&1 || code=$?
    ended_well "$code" || { tail -3 "$work/log" >&2; wrong "exit $code of the uninterrupted run"; }
    whole[$arm]=$(( ($(now) - start) / 1000000 ))
    echo "an uninterrupted run from $arm takes ${whole[$arm]} ms"
done

compare() { # ARM
    local file files=(adapter/adapter_model.safetensors adapter/adapter_config.json "checkpoint-$steps/optimizer.safetensors")
    [ ! -e "$work/reference-$1/best" ] || files+=(best/adapter_model.safetensors best/evaluation.json)
    for file in "${files[@]}"; do
        cmp "$work/reference-$1/$file" "$work/run-$1/$file" || wrong "$file of $1 differs after $killed kills"
    done
    rm -rf "$work/run-$1"
}

killed=0 finished=0 resumed=0
while [ "$killed" -lt "$kills" ]; do
    arm=${arms[$((killed % 2))]}
    command_of "$arm" "$work/run-$arm"
    "${command[@]}" > "$work/log" 2>&1 &
    process=$!
    wait_ms=$(( (RANDOM * 32768 + RANDOM) % (whole[$arm] + whole[$arm] / 4) ))
    sleep "$(printf '%d.%03d' $((wait_ms / 1000)) $((wait_ms % 1000)))"
    if kill -KILL "$process" 2> /dev/null; then killed=$((killed + 1)); fi
    code=0; wait "$process" 2> /dev/null || code=$?
    case $code in
        137) ! compgen -G "$work/run-$arm/checkpoint-*" > /dev/null || resumed=$((resumed + 1)) ;;
        0 | 3) finished=$((finished + 1)); compare "$arm" ;;
        *) tail -3 "$work/log" >&2; wrong "exit $code after $killed kills" ;;
    esac
done
for arm in "${arms[@]}"; do
    code=0
    train "$arm" "$work/run-$arm" > "$work/log" 2>&1 || code=$?
    ended_well "$code" || { tail -3 "$work/log" >&2; wrong "exit $code of the last run"; }
    finished=$((finished + 1))
    compare "$arm"
done
echo "$killed kills, $resumed of them with a checkpoint to go on from; $finished finished runs, all equal to the uninterrupted ones"
rm -rf "$work"
