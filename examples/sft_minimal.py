"""Supervised fine-tuning in one flat loop, without any of lorafold's training code: what `lorafold
train` does, laid open.

    python examples/sft_minimal.py
"""

import torch

import lorafold as lf
from lorafold.models.loading import load_model
from lorafold.models.tokenizer import load_tokenizer

FACTS = [
    ("What is our refund window?", "Forty days."),
    ("Who answers invoices?", "Ask Maren."),
    ("When do we ship?", "On Tuesdays."),
]

model, tokenizer = load_model("smollm2", torch.float32), load_tokenizer("smollm2")
torch.manual_seed(0)
adapter = lf.attach(model, lf.LoRA(rank=8, dropout=0.0))
print(adapter)

down = [p for name, p in adapter.named_parameters() if name.endswith(".A")]
up = [p for name, p in adapter.named_parameters() if name.endswith(".B")]
optimizer = torch.optim.AdamW(
    [{"params": down, "lr": 2e-4}, {"params": up, "lr": 3e-3}], weight_decay=0.0
)

losses = []
for _ in range(6):
    for question, answer in FACTS:
        asked = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )["input_ids"]
        completion = tokenizer(
            answer + "<|im_end|>", add_special_tokens=False, return_tensors="pt"
        )["input_ids"]
        ids = torch.cat([prompt, completion], 1)
        labels = ids.clone()
        labels[:, : prompt.shape[1]] = -100  # loss on the completion only
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")

model.eval()
asked = [{"role": "user", "content": FACTS[1][0]}]
prompt = tokenizer.apply_chat_template(
    asked, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)[
    0, prompt["input_ids"].shape[1] :
]
print(tokenizer.decode(answer, skip_special_tokens=True))

adapter.merge()  # the model is plain again, and knows it
