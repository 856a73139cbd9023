#!/usr/bin/env python3
"""Check that TensorBoard reads what a training run wrote, and shows what metrics.jsonl says: no value more, none less, none twice.

    check_tensorboard.py LOGDIR [METRICS]

LOGDIR is the folder of event files (RUN/tensorboard), METRICS the run's metrics.jsonl (by default beside LOGDIR). The files are read
by TensorBoard's own EventAccumulator, in the order of their names. Of a line {"step": N, "loss": X, …} the tags train/loss, train/kd,
train/ce, train/lr, train/grad_norm and train/tokens_per_second are expected at step N, of {"step": N, "eval": {"loss": X, …}} the
tags eval/NAME. Event files hold f32, so values are compared as such, to the bit. Prints a line a tag; exits with 1 where something
differs. Needs tensorboard.
"""
import json
import math
import struct
import sys
from collections import defaultdict
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

TRAIN = ["loss", "kd", "ce", "lr", "grad_norm", "tokens_per_second"]
EVERY = 0  # what EventAccumulator calls no limit


def f32(value):
    """What is left of a value in an event file; null stands for one that is not finite."""
    return struct.unpack("<f", struct.pack("<f", value))[0] if value is not None else math.nan


def same(a, b):
    return a == b or (not math.isfinite(a) and not math.isfinite(b))


def expected_of(metrics):
    """Tag -> list of (step, value)."""
    expected = defaultdict(list)
    for number, text in enumerate(metrics.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            sys.exit(f"{metrics}:{number}: {error}")
        figures = line.get("eval")
        pairs = [("eval", name, value) for name, value in figures.items()] if figures is not None else [
            ("train", name, line[name]) for name in TRAIN if name in line
        ]
        for group, name, value in pairs:
            expected[f"{group}/{name}"].append((line["step"], f32(value)))
    return expected


def differences(expected, found):
    """What is wrong with a tag, as sentences."""
    if [step for step, _ in expected] != [step for step, _ in found]:
        missing = sorted({step for step, _ in expected} - {step for step, _ in found})
        extra = sorted({step for step, _ in found} - {step for step, _ in expected})
        yield f"{len(expected)} steps in metrics.jsonl, {len(found)} in event files; missing {missing[:5]}, too many {extra[:5]}"
        return
    wrong = [(step, a, b) for (step, a), (_, b) in zip(expected, found) if not same(a, b)]
    if wrong:
        step, a, b = wrong[0]
        yield f"{len(wrong)} values differ, the first at step {step}: metrics.jsonl {a!r}, event file {b!r}"


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    logdir = Path(sys.argv[1])
    metrics = Path(sys.argv[2]) if len(sys.argv) == 3 else logdir.parent / "metrics.jsonl"
    expected = expected_of(metrics)
    reader = EventAccumulator(str(logdir), size_guidance={SCALARS: EVERY})
    reader.Reload()
    found = {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    if not expected:
        sys.exit(f"{metrics}: holds no step")
    bad = 0
    for tag in sorted(expected.keys() | found.keys()):
        sentences = list(differences(expected.get(tag, []), found.get(tag, [])))
        bad += bool(sentences)
        steps = expected.get(tag, [])
        print(f"{tag:<26} {len(steps):>6} values  {'; '.join(sentences) or 'same'}")
    print(f"{len(list(logdir.glob('events.out.tfevents.*')))} event files, {len(expected)} tags, {bad} of them wrong")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
