#!/usr/bin/env python3
"""Held-out figures of the reference student in float64, from nothing but numpy, torch and transformers: tests/fixtures/evaluate/held_out.json.

    python scripts/make_held_out_fixture.py

Two parts, each with the names of `potstill evaluate held-out --json`:
  logits   the 49 scored positions of golden/expected/loss_batch.safetensors: student's logits and teacher's top 32 as they stand there,
           so that only the arithmetic of the figures is compared;
  model    the reference student (bf16 weights) run in float64 over the chats of golden/expected/teacher_topk.safetensors, beside the
           teacher's top 64 of that file: model, walk and figures together. Rotary angles are float32, as the models' own code has them.
"""
import json
import pathlib

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/fixtures/golden"
OUT = ROOT / "tests/fixtures/evaluate/held_out.json"
BINS = 15
PERCENTILES = dict(maximum=100, p99_9=99.9, p99=99, p95=95, p90=90, p75=75, median=50, p25=25, p10=10, p5=5, p1=1, p0_1=0.1, minimum=0)


def mean(values, rows):
    n, c, deviations = len(values), len(set(rows)), values - values.mean()
    sums = np.array([deviations[rows == row].sum() for row in dict.fromkeys(rows)])
    by_row = float(np.sqrt(c / (c - 1) * (sums**2).sum()) / n) if c > 1 else None
    return dict(positions=n, mean=float(values.mean()), standard_error=float(values.std() / np.sqrt(n - 1)), standard_error_by_row=by_row)


def spread(values, rows):
    return mean(values, rows) | {name: float(np.percentile(values, p)) for name, p in PERCENTILES.items()}


def estimate(value, error):
    return dict(value=float(value), standard_error=float(error))


def calibration(confidence, hit):
    order = np.argsort(confidence, kind="stable")
    gap = hit.astype(float)[order] - confidence[order]
    edges = [b * len(gap) // BINS for b in range(BINS + 1)]
    return float(sum(abs(gap[a:b].sum()) for a, b in zip(edges, edges[1:])) / len(gap))


def kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1)


def figures(z, labels, ids, logprobs, tail, rows):
    """z f64 [N, V], labels [N], ids and logprobs [N, K], tail [N]; rows: the conversation of each position."""
    n = np.arange(len(z))
    logq = z - np.logaddexp.reduce(z, -1, keepdims=True)
    nll = -logq[n, labels]
    kept_q = np.exp(np.take_along_axis(logq, ids, 1))
    others = np.exp(logq)
    np.put_along_axis(others, ids, 0.0, 1)
    q = np.concatenate([kept_q, others.sum(-1, keepdims=True)], 1)
    p = np.exp(np.concatenate([logprobs, tail[:, None]], 1).astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    m = (p + q) / 2
    least = np.minimum(p, q)
    at = ids == labels[:, None]
    kept = at.any(1)
    teacher_nll = -(logprobs.astype(np.float64) * at).sum(1)[kept]
    difference = np.exp(-nll[kept]) - np.exp(-teacher_nll)
    own, square = nll[kept], difference**2
    k = kept.sum()
    covariance = np.cov(own, teacher_nll, bias=True) / (k - 1)
    a, b = np.exp(own.mean()), np.exp(teacher_nll.mean())
    error = np.sqrt(np.diag(covariance))
    ln_error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    best, rms = z.argmax(-1), np.sqrt(square.mean())
    return dict(
        rows=len(set(rows)), positions=len(z), positions_not_finite=0,
        perplexity=estimate(np.exp(nll.mean()), np.exp(nll.mean()) * nll.std() / np.sqrt(len(z) - 1)),
        nll=mean(nll, rows),
        where_kept=dict(
            positions=int(k), student=estimate(a, a * error[0]), teacher=estimate(b, b * error[1]),
            correlation=float(np.corrcoef(own, teacher_nll)[0, 1]), ln_ratio=estimate(own.mean() - teacher_nll.mean(), ln_error),
            ratio=estimate(a / b, a / b * ln_error),
            difference=estimate(a - b, np.sqrt(np.array([a, -b]) @ covariance @ np.array([a, -b])))),
        kl=spread(kl(p, q), rows), reverse_kl=spread(kl(q, p), rows), jsd=spread((kl(p, m) + kl(q, m)) / 2, rows),
        total_variation=spread(abs(p - q).sum(-1) / 2, rows),
        acceptance=spread(least.sum(-1), rows), acceptance_at_least=mean(least[:, :-1].sum(-1), rows),
        probability_difference=spread(difference, rows[kept]),
        probability_difference_rms=estimate(rms, square.std() / np.sqrt(k - 1) / (2 * rms)),
        same_top_token=mean((best == ids[:, 0]).astype(float), rows),
        calibration_error=dict(
            student=calibration(np.exp(logq.max(-1)), best == labels),
            teacher=calibration(np.exp(logprobs[:, 0].astype(np.float64)), ids[:, 0] == labels)),
        kept_mass=dict(student=float(q[:, :-1].sum(-1).mean()), teacher=float(p[:, :-1].sum(-1).mean())))


def of_logits():
    batch = load_file(GOLDEN / "expected/loss_batch.safetensors")
    mask = batch["loss_mask"].astype(bool)
    return figures(
        batch["student_logits"].astype(np.float64), batch["labels"][mask], batch["teacher_ids"][mask].astype(np.int64),
        batch["teacher_logprobs"][mask], batch["teacher_tail_logprob"][mask], np.nonzero(mask)[0])


def of_model():
    teacher = load_file(GOLDEN / "expected/teacher_topk.safetensors")
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "student", dtype=torch.float64, attn_implementation="eager").eval()
    masks = {}
    for chat in map(json.loads, open(GOLDEN / "expected/chat_template.jsonl")):
        masks[tuple(chat["input_ids"][:256])] = chat["assistant_mask"]
    parts = []
    for row, (start, end) in enumerate(zip(teacher["offsets"], teacher["offsets"][1:])):
        tokens = torch.from_numpy(teacher["input_ids"][start:end].astype(np.int64))
        mask = masks[tuple(tokens.tolist())]
        scored = [i for i in range(len(tokens) - 1) if mask[i + 1]]
        if not scored:
            continue
        with torch.no_grad():
            z = model(tokens[None]).logits[0].numpy()[scored]
        places = np.array(scored) + start
        logprobs = teacher["logprobs"][places]
        tail = np.log1p(-np.exp(logprobs.astype(np.float64)).sum(-1)).astype(np.float32)
        parts.append((z, tokens.numpy()[np.array(scored) + 1], teacher["ids"][places].astype(np.int64), logprobs, tail, np.full(len(scored), row)))
    return figures(*(np.concatenate(part) for part in zip(*parts)))


if __name__ == "__main__":
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(dict(logits=of_logits(), model=of_model()), indent=1) + "\n")
    print(OUT.relative_to(ROOT), OUT.stat().st_size, "bytes")
