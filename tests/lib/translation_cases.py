"""Configurations of other tools, translated, and what is remarked of them."""

from pathlib import Path

import yaml

from lorafold.config_import.run import Translation, translate


def translated(tmp_path: Path, text: str, kind: str | None = None) -> Translation:
    path = tmp_path / "theirs.yml"
    path.write_text(text)
    return translate(path, kind)


def axolotl_of(tmp_path: Path, **settings) -> Translation:
    """A least axolotl file of LoRA, with these settings over it."""
    least = {
        "base_model": "m", "adapter": "lora", "lora_r": 8, "lora_alpha": 16,
        "lora_target_linear": True, "learning_rate": 1e-4,
    }  # fmt: skip
    return translated(tmp_path, yaml.safe_dump(least | settings), "axolotl")


def llamafactory_of(tmp_path: Path, **settings) -> Translation:
    return translated(tmp_path, yaml.safe_dump({"stage": "sft"} | settings), "llamafactory")


def trl_of(tmp_path: Path, kind: str = "trl-grpo", **settings) -> Translation:
    """A least file of TRL with these settings over it."""
    least = {"model_name_or_path": "m", "use_peft": True, "reward_funcs": ["rewards.score"]}
    return translated(tmp_path, yaml.safe_dump(least | settings), kind)


def grpo_of(tmp_path: Path, outside: dict | None = None, **block) -> Translation:
    """A least file of axolotl that trains a policy, with these settings in its block."""
    least = {"reward_funcs": ["rewards.score"], "max_completion_length": 64}
    return axolotl_of(tmp_path, rl="grpo", trl=least | block, **(outside or {}))


def keys(translation: Translation, how: str) -> set[str]:
    return {e.key for e in getattr(translation, how) if e.given}


def remark(translation: Translation, key: str) -> str:
    return next(e.outcome.remark for e in translation.entries if e.key == key)
