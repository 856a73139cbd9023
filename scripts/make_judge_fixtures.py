#!/usr/bin/env python3
"""Makes tests/fixtures/judge: an invented benchmark in the schemas of MT-Bench and AlpacaEval, and what its figures are in NumPy's float64.

Nothing here is taken from either benchmark. The judge of the tests reads marks such as `<q=7>` in the answers it is shown, and this script
works out from the same marks, by itself, what has to come out.

    python3 scripts/make_judge_fixtures.py        (needs numpy)
"""

import json
import math
from pathlib import Path

import numpy as np

OUT = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "judge"
CATEGORIES = ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"]
REFERENCE = {"reasoning", "math", "coding"}
# How much the tests' judge of pairs likes whatever stands first.
FIRST = 0.75


def save(name, rows):
    lines = name.endswith(".jsonl")
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows) if lines else json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    (OUT / name).parent.mkdir(parents=True, exist_ok=True)
    (OUT / name).write_text(text, encoding="utf-8")


def sem(x):
    x = np.asarray(x, dtype=np.float64)
    if len(x) < 2:
        return None
    return float(x.std(ddof=1) / math.sqrt(len(x)))


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-np.asarray(x, dtype=np.float64)))


def mt_bench():
    questions, references, answers, grades = [], [], [], {}
    for i in range(16):
        qid, category = 901 + i, CATEGORIES[i % 8]
        questions.append({"question_id": qid, "category": category, "turns": [f"Invented task {qid}, first part?", f"And its second part, {{turn}} of {qid}?"]})
        if category in REFERENCE:
            turns = [f"Right is {qid}.", f"Right is twice {qid}."]
            references.append({"question_id": qid, "answer_id": f"r{qid}", "model_id": "oracle", "choices": [{"index": 0, "turns": turns}], "tstamp": 1.0})
        marks = [1 + (7 * i + 3) % 10, 1 + (3 * i + 5) % 10 - (0.5 if i % 3 == 1 and i != 7 else 0.0)]
        marks = [max(1.0, float(m)) for m in marks]
        if i == 5:
            marks[1] = 11.0  # no grade: outside 1 to 10
        if i == 9:
            marks[0] = -1.0  # no grade: the judge says none
        turns = [f"An answer to {qid}, naïve but fine. <q={m:g}>" for m in marks]
        answers.append({"question_id": qid, "answer_id": f"a{qid}", "model_id": "tiny-student", "choices": [{"index": 0, "turns": turns}], "tstamp": 2.0})
        for turn, m in enumerate(marks, 1):
            if 1.0 <= m <= 10.0:
                grades[(qid, category, turn)] = m
    save("mt_bench/question.jsonl", questions)
    save("mt_bench/reference_answer/gpt-4.jsonl", references)
    save("mt_bench/answers.jsonl", answers)
    single = {
        "single-v1": ("You help.", "Grade this.\nQ: {question}\nA: {answer}\nSay [[n]]."),
        "single-math-v1": ("You help.", "Grade this beside what is right.\nQ: {question}\nR: {ref_answer_1}\nA: {answer}\nSay [[n]]."),
        "single-v1-multi-turn": ("Grade the second answer. Say [[n]].", "Q1: {question_1}\nA1: {answer_1}\nQ2: {question_2}\nA2: {answer_2}"),
        "single-math-v1-multi-turn": (
            "Grade the second answer beside what is right. Say [[n]].",
            "Q1: {question_1}\nR1: {ref_answer_1}\nQ2: {question_2}\nR2: {ref_answer_2}\n\nQ1: {question_1}\nA1: {answer_1}\nQ2: {question_2}\nA2: {answer_2}",
        ),
    }
    prompts = [{"name": "pair-v2", "type": "pairwise", "system_prompt": "", "prompt_template": "{question}", "output_format": "[[A]]"}]
    prompts += [{"name": n, "type": "single", "system_prompt": s, "prompt_template": t, "output_format": "[[rating]]"} for n, (s, t) in single.items()]
    save("mt_bench/judge_prompts.jsonl", prompts)

    def score(category=None, turn=None):
        chosen = {k: v for k, v in grades.items() if category in (None, k[1]) and turn in (None, k[2])}
        values = np.array(list(chosen.values()), dtype=np.float64)
        mean = float(values.mean())
        if turn is None:
            sums = {}
            for (qid, _, _), v in chosen.items():
                sums[qid] = sums.get(qid, 0.0) + v - mean
            g = len(sums)
            error = None if g < 2 else math.sqrt(g / (g - 1) * sum(s * s for s in sums.values())) / len(values)
        else:
            error = sem(values)
        return {"graded": len(values), "mean": mean, "standard_error": error}

    three = lambda c=None: {"first": score(c, 1), "second": score(c, 2), "both": score(c)}
    return {"overall": three(), "categories": {c: three(c) for c in CATEGORIES}}


def figures(rows, coefficients, gammas):
    """rows: (dataset, share or None, baseline's text, model's text)."""
    shares = np.array([s for _, s, _, _ in rows if s is not None], dtype=np.float64)
    lengths = np.array([[len(a), len(b)] for _, _, a, b in rows], dtype=np.float64)
    wins, losses, draws = int((shares > 0.5).sum()), int((shares < 0.5).sum()), int((shares == 0.5).sum())
    delta = lengths[:, 0] - lengths[:, 1]
    plain = coefficients[2] + coefficients[1] * np.array(gammas, dtype=np.float64)
    controlled = sigmoid(plain)
    fitted = sigmoid(plain + coefficients[0] * np.tanh(delta / delta.std(ddof=1)))
    datasets = {}
    for name in sorted({r[0] for r in rows}):
        some = np.array([s for d, s, _, _ in rows if d == name and s is not None], dtype=np.float64)
        datasets[name] = {"judged": len(some), "win_rate": float(100 * some.mean()), "above": int((some > 0.5).sum()), "ties": int((some == 0.5).sum())}
    return {
        "judged": len(shares), "left_out": len(rows) - len(shares),
        "win_rate": float(100 * shares.mean()), "standard_error": 100 * sem(shares),
        "discrete_win_rate": 100 * (wins + draws / 2) / len(shares), "wins": wins, "losses": losses, "draws": draws,
        "baseline_length": float(lengths[:, 0].mean()), "model_length": float(lengths[:, 1].mean()), "datasets": datasets,
        "length_controlled": float(100 * controlled.mean()), "length_controlled_error": 100 * sem(controlled), "with_lengths": float(100 * fitted.mean()),
    }


def alpaca_eval():
    coefficients = [-1.2673261, 0.8917766, -1.4423447]
    names = ["helpful", "oasst", "vicuna"]
    gammas = [round(2.5 * math.sin(1.7 * i) + 0.3 * (i % 4), 6) for i in range(24)]
    (OUT / "alpaca_eval").mkdir(parents=True, exist_ok=True)
    table = "index,instruction_difficulty\n" + "".join(f"{i},{g}\n" for i, g in enumerate(gammas))
    (OUT / "alpaca_eval" / "instruction_difficulty.csv").write_text(table)
    (OUT / "alpaca_eval" / "prompt.txt").write_text(
        "<|im_start|>system\nYou compare.\n<|im_end|>\n<|im_start|>user\nTo:\n{\n    \"instruction\": \"\"\"{instruction}\"\"\",\n}\n"
        "m:\n{output_1}\n\nM:\n{output_2}\n\nWhich is better, m or M?\n<|im_end|>\n"
    )
    baseline, model, shares, flips, first = [], [], [], 0, [0, 0]
    for i in range(24):
        q = [round(2 + math.sin(2.3 * i), 3), round(2 + math.cos(1.1 * i) * 1.2, 3)]
        texts = [f"Réponse {i} of the baseline" + " and more" * (i % 5) + f" <q={q[0]:g}>", f"A student's answer {i} 中文" + " indeed" * (i % 7) + f" <q={q[1]:g}>"]
        if i == 11:
            texts[1] = texts[0]
        asked = f"Invented instruction {i}: {{output_1}}?"
        baseline.append({"dataset": names[i % 3], "instruction": asked, "output": texts[0], "generator": "baseline-x"})
        model.append({"dataset": names[i % 3], "instruction": asked, "output": texts[1], "generator": "tiny-student"})
        if i == 11:
            shares.append(0.5)
            continue
        straight, swapped = 1 - sigmoid(q[0] - q[1] + FIRST), sigmoid(q[1] - q[0] + FIRST)
        flips += int((straight - 0.5) * (swapped - 0.5) < 0)
        for p in (1 - straight, swapped):
            first[0 if p > 0.5 else 1] += 1
        shares.append(float((straight + swapped) / 2))
    save("alpaca_eval/baseline.json", baseline)
    save("alpaca_eval/outputs.json", list(reversed(model)))
    rows = [(b["dataset"], s, b["output"], m["output"]) for b, s, m in zip(baseline, shares, model)]
    judged = figures(rows, coefficients, gammas)
    judged |= {"flips": flips, "first_wins": first[0], "second_wins": first[1], "preferences": [1 + s for s in shares]}

    preferences = [1 + round(float(sigmoid(3 * math.sin(4.1 * i) + 0.4)), 10) for i in range(24)]
    for i, p in {2: 1.5, 5: 0, 6: 0.0, 9: None, 13: 1, 14: 2, 17: 3.5, 20: 1.5, 23: 0.5}.items():
        preferences[i] = p
    annotations = [
        {"dataset": b["dataset"], "instruction": b["instruction"], "output_1": b["output"], "generator_1": b["generator"], "output_2": m["output"],
         "generator_2": m["generator"], "annotator": "invented-judge", "preference": p, "price_per_example": 0.1}
        for b, m, p in zip(baseline, model, preferences)
    ]
    save("alpaca_eval/annotations.json", annotations)
    share = lambda p: None if p is None or not (p == 0 or 1 <= p <= 2) else (0.5 if p == 0 else p - 1)
    scored = figures([(b["dataset"], share(p), b["output"], m["output"]) for b, p, m in zip(baseline, preferences, model)], coefficients, gammas)
    return {"coefficients": coefficients, "judged": judged, "scored": scored}


def main():
    expected = {"mt_bench": mt_bench(), "alpaca_eval": alpaca_eval()}
    save("expected.json", expected)


if __name__ == "__main__":
    main()
