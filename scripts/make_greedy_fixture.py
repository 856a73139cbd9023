#!/usr/bin/env python3
"""Greedy answers of the reference student by transformers, to compare `potstill evaluate generate` with: tests/fixtures/evaluate/greedy.json.

    python scripts/make_greedy_fixture.py

float32, with a key-value cache, `generate` without sampling and without the repetition penalty of generation_config.json, whose stop ids
count. Two-turn dialogues; the second turn sees the model's own first answer. `plain` is the model itself, `adapter` the model under
golden/expected/lora (PEFT). Kept are dialogues in which the likeliest token leads by at least LEAST nats at every step: two correct
float32 forwards differ by 2e-5 here, so no such lead can turn round.
"""
import json
import pathlib

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/fixtures/golden"
OUT = ROOT / "tests/fixtures/evaluate/greedy.json"
MOST, LEAST = 48, 5e-3
DIALOGUES = [[first, second] for first, second in zip(
    ["How do I keep bread fresh?", "Name three rivers.", "Write a short poem about rain.", "What is 12 times 7?", "Why is the sky blue?",
     "Give me a recipe for soup.", "Who wrote this letter?", "Tell me about the moon.", "List some tools for a garden.", "What should I read next?",
     "Explain how a lock works.", "Plan a day in a small town."],
    ["And in summer?", "Which one is the longest?", "Make it shorter.", "Now add 5.", "And at night?", "Without salt, please.",
     "When was it sent?", "How far away is it?", "Which of them is the cheapest?", "Why that one?", "What if the key is lost?", "What about the evening?"])]


def answer(model, tokenizer, messages):
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=MOST, do_sample=False, repetition_penalty=1.0, temperature=None,
            top_p=None, top_k=None, return_dict_in_generate=True, output_logits=True)
    new = out.sequences[0, ids.shape[1]:].tolist()
    leads = [float(z[0].topk(2).values.diff().abs()) for z in out.logits]
    stopped = new[-1] in model.generation_config.eos_token_id
    new = new[:-1] if stopped else new
    text = tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return dict(prompt_tokens=ids.shape[1], ids=new, text=text.strip(), stopped=stopped), min(leads)


def dialogues(model, tokenizer):
    kept, least = [], float("inf")
    for turns in DIALOGUES:
        messages, answers, lead = [], [], float("inf")
        for turn in turns:
            messages.append(dict(role="user", content=turn))
            given, margin = answer(model, tokenizer, messages)
            messages.append(dict(role="assistant", content=given["text"]))
            answers.append(given)
            lead = min(lead, margin)
        if lead >= LEAST:
            kept.append(dict(turns=turns, answers=answers))
            least = min(least, lead)
    print(len(kept), "of", len(DIALOGUES), "dialogues kept, least lead", least, "stopped", sum(a["stopped"] for d in kept for a in d["answers"]))
    return dict(least_lead=least, dialogues=kept)


if __name__ == "__main__":
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "student")
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "student", dtype=torch.float32).eval()
    found = dict(max_new_tokens=MOST, plain=dialogues(model, tokenizer))
    found["adapter"] = dialogues(PeftModel.from_pretrained(model, GOLDEN / "expected/lora").eval(), tokenizer)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n")
    print(OUT.relative_to(ROOT), OUT.stat().st_size, "bytes")
