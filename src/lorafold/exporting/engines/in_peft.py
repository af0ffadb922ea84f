"""PEFT's answers, by its own defaults but for fp32. The job has `adapter` too, a directory."""

import warnings
from typing import Any


def answers(job: dict[str, Any]) -> dict[str, Any]:
    """The answers, as `program` describes them."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    bare = auto.from_pretrained(job["base"], dtype=torch.float32)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model: Any = peft.PeftModel.from_pretrained(bare, job["adapter"]).eval()
    adapted, base, greedy = [], [], []
    with torch.inference_mode():
        for ids in job["ids"]:
            given = torch.tensor([ids])
            adapted.append(model(input_ids=given).logits[0, -1].log_softmax(-1).numpy())
            with model.disable_adapter():
                base.append(model(input_ids=given).logits[0, -1].log_softmax(-1).numpy())
            made = model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), do_sample=False,
                max_new_tokens=job["greedy"], eos_token_id=job["ends"], pad_token_id=0,
            )[0, len(ids) :].tolist()  # fmt: skip
            ended = [n for n, token in enumerate(made) if token in job["ends"]]
            greedy.append(made[: ended[0]] if ended else made)
    return {
        "adapted": adapted,
        "base": base,
        "greedy": greedy,
        "version": peft.__version__,
        "unused": [str(one.message) for one in told if "keys" in str(one.message)],
    }
