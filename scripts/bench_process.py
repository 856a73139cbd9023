"""Runs a program and watches it from outside: peak memory and what it consists of, CPU time, and who else used the machine.

Part of bench_teacher.py, bench_memory.py and bench_memory_train.py. Linux only: everything is read from /proc. The one idea: nothing
is measured inside the programs that are compared, and each runs as a process of its own, so a peak is nobody else's. VmHWM is kept by the kernel and misses
nothing but the last instants; how the peak splits into the program's own memory (RssAnon) and pages of files (RssFile) is sampled.
"""
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SAMPLE_SECONDS = 0.02
QUIET_SECONDS = 1.0  # how long the machine is watched before each measurement
BUSY_CORES = 0.1  # more than this in use by others, and the machine is not quiet
PARTS = {"VmHWM": "peak", "VmRSS": "rss", "RssAnon": "anon", "RssFile": "file"}


class Failed(RuntimeError):
    """A program ended with an error; the text says which and how."""


def busy_seconds():
    """CPU seconds that the whole machine has spent on anything so far, stolen time included."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, fields)
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def quietness():
    """Load average, and cores that others keep busy while we wait; says so on stderr where they are many."""
    busy, start = busy_seconds(), time.monotonic()
    time.sleep(QUIET_SECONDS)
    others = (busy_seconds() - busy) / (time.monotonic() - start)
    state = {"load": os.getloadavg()[0], "others": max(others, 0.0)}
    if state["others"] > BUSY_CORES:
        print(f"warning: the machine is not quiet: others use {others:.1f} cores (load average {state['load']:.1f})", file=sys.stderr)
    return state


def memory(pid):
    """Bytes by name of PARTS; empty where the process is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    lines = (line.split(":") for line in text.splitlines())
    return {PARTS[line[0]]: int(line[1].split()[0]) * 1024 for line in lines if line[0] in PARTS}


def cpu(pid):
    """CPU seconds of a process so far; None where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Watch(threading.Thread):
    """Samples a process until it is told to stop."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.pid, self.over = pid, threading.Event()
        self.highest, self.peak, self.cpu = {"rss": 0, "anon": 0, "file": 0}, 0, [(time.monotonic(), 0.0)]

    def run(self):
        while not self.over.wait(SAMPLE_SECONDS):
            now, spent = memory(self.pid), cpu(self.pid)
            # A process that has ended but was not waited for has no memory any more.
            if now.get("rss"):
                self.peak = max(self.peak, now["peak"])
                self.highest = max(self.highest, now, key=lambda sample: sample["rss"])
            if spent is not None:
                self.cpu.append((time.monotonic(), spent))

    def spent_until(self, moment):
        """CPU seconds spent before `moment`, between the samples beside it."""
        before = max((s for s in self.cpu if s[0] <= moment), default=self.cpu[0])
        after = min((s for s in self.cpu if s[0] > moment), default=before)
        part = (moment - before[0]) / (after[0] - before[0]) if after[0] > before[0] else 0.0
        return before[1] + min(max(part, 0.0), 1.0) * (after[1] - before[1])


def measured(command, environment=None):
    """Runs `command` to its end. What it prints, and in bytes and seconds: peak, anon and file (at the highest sample), wall, cpu,
    others (cores that were busy with something else meanwhile), and quietness before. `cpu_of_last(s)` is the CPU time of its last s
    seconds. Raises Failed where its exit code is not 0."""
    state = quietness()
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as output:
        spent, busy, start = resource.getrusage(resource.RUSAGE_CHILDREN), busy_seconds(), time.monotonic()
        own = sum(os.times()[:2])
        process = subprocess.Popen([str(part) for part in command], stdout=output, stderr=errors, env=environment)
        watch = Watch(process.pid)
        watch.start()
        try:
            process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            end = time.monotonic()
            watch.over.set()
            watch.join()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        total = after.ru_utime + after.ru_stime - spent.ru_utime - spent.ru_stime
        others = (busy_seconds() - busy - total - (sum(os.times()[:2]) - own)) / (end - start)
        for file in (errors, output):
            file.seek(0)
        if process.returncode:
            said = errors.read().decode(errors="replace").strip().splitlines()
            raise Failed(f"{Path(command[0]).name} ended with exit code {process.returncode}: {said[-1] if said else 'no word'}")
        if watch.peak == 0:
            raise Failed(f"{Path(command[0]).name} ended before its memory was seen: give it more to do")
        figures = {"peak": watch.peak, "anon": watch.highest["anon"], "file": watch.highest["file"], "wall": end - start,
                   "cpu": total, "others": max(others, 0.0), "before": state}
        return output.read().decode(), figures, lambda seconds: total - watch.spent_until(end - seconds)
