#!/usr/bin/env bash
# The Slurm scripts on a real Slurm: a cluster of this one machine in a temporary folder, an array of tasks over the reference models,
# one of them told that its time is nearly up, one killed outright, one cancelled and submitted again; then the parts are combined by a
# dependent job and compared, byte for byte, with the cache of a single run. Needs root and Debian's Slurm:
#
#   apt-get install slurm-wlm munge
#   cargo build && scripts/try_slurm.sh            # some ten minutes, most of them Slurm's two before it starts a task again
#
# Variables: POTSTILL (target/debug/potstill), COPIES (how often the reference chats are repeated, each time as other texts), KEEP (a
# folder for the cluster, logs and caches, which then stay).
set -euo pipefail
cd "$(dirname "$0")/.."

repo=$PWD
POTSTILL=$(realpath "${POTSTILL:-target/debug/potstill}")
COPIES=${COPIES:-200}
golden=$repo/tests/fixtures/golden
began=$SECONDS

say() { printf '[%4d s] %s\n' $((SECONDS - began)) "$*"; }
wrong() { say "wrong: $*" >&2; exit 1; }

[ "$(id -u)" -eq 0 ] || wrong "this needs root, for Slurm runs jobs as other users"
for tool in slurmctld slurmd munged sbatch; do
    command -v $tool > /dev/null || wrong "no $tool: apt-get install slurm-wlm munge"
done
[ -x "$POTSTILL" ] || wrong "no $POTSTILL: cargo build"

if [ -n "${KEEP:-}" ]; then
    [ ! -e "$KEEP" ] || wrong "KEEP=$KEEP is there already"
    mkdir -p "$KEEP"
    home=$(realpath "$KEEP")
else
    home=$(mktemp -d)
fi
mkdir -p "$home"/{state,spool,log,logs}
chmod 755 "$home"
started=()
cleanup() {
    scancel --quiet --user=root 2> /dev/null || true
    for ((i = ${#started[@]} - 1; i >= 0; i--)); do kill "${started[i]}" 2> /dev/null || true; done
    wait 2> /dev/null || true
    [ -n "${KEEP:-}" ] || rm -rf "$home"
}
trap cleanup EXIT

# A cluster of one node, beside any other on this machine: ports, sockets and the key are its own.
host=$(hostname -s)
port=$((20000 + $$ % 10000 * 2))
head -c 128 /dev/urandom > "$home/munge.key"
chmod 600 "$home/munge.key"
chown -R root: "$home"
cat > "$home/slurm.conf" << CONF
ClusterName=try
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$home/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=20
MpiDefault=none
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/slurmd.pid
SlurmctldLogFile=$home/log/slurmctld.log
SlurmdLogFile=$home/log/slurmd.log
SchedulerParameters=batch_sched_delay=0,sched_interval=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$home/slurm.conf
munged --foreground --force --key-file="$home/munge.key" --socket="$home/munge.socket" --pid-file="$home/munge.pid" \
    --log-file="$home/log/munged.log" --seed-file="$home/munge.seed" > /dev/null 2>&1 & started+=($!)
for _ in $(seq 50); do [ -S "$home/munge.socket" ] && break; sleep 0.1; done
slurmctld -D > /dev/null 2>&1 & started+=($!)
slurmd -D > /dev/null 2>&1 & started+=($!)
for _ in $(seq 60); do sinfo --noheader --states=idle 2> /dev/null | grep -q "$host" && break; sleep 0.5; done
sinfo --noheader --states=idle | grep -q "$host" || wrong "the cluster does not start; see $home/log"
say "Slurm $(sinfo --version | cut -d' ' -f2), one node: $(sinfo --noheader --format='%n, %c CPUs')"

# Chats that are no repetitions: each copy opens its first turn with its own number.
for ((i = 1; i <= COPIES; i++)); do sed "s/\"content\": \"/&Version $i. /" "$golden/chats.jsonl"; done > "$home/chats.jsonl"
say "$(wc -l < "$home/chats.jsonl") conversations"

export POTSTILL TEACHER=$golden/teacher-awq DATA=$home/chats.jsonl CACHE=$home/parts OUT=$home/combined RAYON_NUM_THREADS=1
settings=(--max-length 256 --top-k 16 --rows-per-shard 64 --pack-tokens 512 --seal-minutes 0.05)
tasks=5
small=(--chdir="$home" --cpus-per-task=1 --mem=0)
job=$(sbatch --parsable "${small[@]}" --array=0-$((tasks - 1)) "$repo/scripts/slurm/precompute.sbatch" "${settings[@]}")
combine=$(sbatch --parsable "${small[@]}" --dependency=afterok:"$job" "$repo/scripts/slurm/combine.sbatch")
say "array job $job of $tasks tasks, dependent job $combine"

part() { printf '%s/worker-%05d-of-%05d' "$CACHE" "$1" "$tasks"; }
pid_of() { pgrep -f -- "^$POTSTILL precompute .*--cache $CACHE " | while read -r pid; do
    if tr '\0' '\n' < "/proc/$pid/environ" | grep -qx "SLURM_ARRAY_TASK_ID=$1"; then echo "$pid"; fi; done; }
await_shard() { # TASK: until its part has a shard, so that it is in the middle of its work
    for _ in $(seq 3000); do [ -e "$(part "$1")/shard-00000.parquet" ] && return; sleep 0.1; done
    wrong "task $1 makes no shard; see $home/logs"
}
unfinished() { grep -q '"complete": false' "$(part "$1")/manifest.json" || wrong "task $1 was done before it was stopped: raise COPIES"; }
state() { scontrol show job "${job}_$1" | grep -oE 'JobState=[A-Z]+|Restarts=[0-9]+|Reason=[A-Za-z]+' | tr '\n' ' '; }
await_line() { # TASK TEXT: until its log says so
    for _ in $(seq 300); do grep -q -- "$2" "$home/logs/potstill-precompute-${job}_$1.log" && return; sleep 0.2; done
    wrong "the log of task $1 does not say: $2"
}

await_shard 1
unfinished 1
scancel --batch --signal=USR1 "${job}_1"
say "task 1: USR1 to its batch script, as --signal=B:USR1@120 sends it"
await_line 1 'stopped before the time limit (75): queued again'
await_shard 3
unfinished 3
kill -9 "$(pid_of 3)"
say "task 3: kill -9 of its potstill"
await_line 3 'killed (137): queued again'
await_shard 2
unfinished 2
scancel "${job}_2"
say "task 2: scancel"
await_line 2 'cancelled, potstill ended with 75'
sleep 1
say "task 1: $(state 1)"
say "task 3: $(state 3)"
say "task 2: $(state 2)"
"$POTSTILL" combine --out "$home/early" "$CACHE" 2> "$home/early.txt" && wrong "unfinished parts were combined"
say "combined too early: $(cat "$home/early.txt")"
[ ! -e "$home/early" ] || wrong "combining too early left a folder"

# Slurm waits two minutes before it starts a task again that was queued again.
say "waiting for the other tasks"
while squeue --noheader --job="$job" 2> /dev/null | grep -q .; do sleep 1; done
squeue --noheader --job="$combine" --format='dependent job: %T, %r' || true
scancel "$combine"
# Slurm looks at time limits twice a minute: this one sends its USR1 itself, if the task takes long enough.
alone=$(WORKERS=$tasks sbatch --parsable "${small[@]}" --time=1 --signal=B:USR1@30 --array=2 "$repo/scripts/slurm/precompute.sbatch" "${settings[@]}")
combine=$(sbatch --parsable "${small[@]}" --dependency=afterok:"$alone" "$repo/scripts/slurm/combine.sbatch")
say "task 2 alone again, with a time limit of a minute: array job $alone, dependent job $combine"
while squeue --noheader --job="$alone,$combine" 2> /dev/null | grep -q .; do sleep 1; done
[ "$(scontrol show job "$combine" | grep -o 'ExitCode=[0-9:]*')" = ExitCode=0:0 ] || wrong "combining failed; see $home/logs"

say "the logs of the tasks, without tables and settings:"
for log in "$home"/logs/*.log; do
    echo "  ${log##*/}"
    grep -E ' task [0-9]+, start |^worker [0-9]|^error|^conversations|all good' "$log" | sed 's/^/    /'
done

"$POTSTILL" precompute --teacher "$TEACHER" --data "$DATA" --cache "$home/single" "${settings[@]}" --quiet > /dev/null || [ $? -eq 3 ]
diff -r "$home/single" "$home/combined" || wrong "the combined cache differs from that of a single run"
say "$(ls "$home/combined" | wc -l) entries, $(du -sb "$home/combined" | cut -f1) bytes, equal to those of a single run byte for byte"
