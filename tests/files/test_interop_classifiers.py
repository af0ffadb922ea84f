"""PEFT reads the adapters of classifiers, whose head it saves as a whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import lorafold as lf
from adapter_files import change
from conftest import make_tokenizer
from lorafold.errors import LorafoldError
from lorafold.memory.trace import MemorySetting, trace
from lorafold.models.classifier import head_paths, load_classifier
from lorafold.models.quantizations import Storage
from lorafold.models.sources import resolve_model
from lorafold.objectives.classify import head_to_save
from peft_cases import gap, ids, load_theirs, moved

CLASSES = ("a", "b", "c")
SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 24, "pad_token_id": 1,
}  # fmt: skip
# two modules in one head: a dense and a projection
PARTS: dict[str, Callable[[], Any]] = {
    "roberta": lambda: tf.RobertaConfig(**SMALL),
    "electra": lambda: tf.ElectraConfig(**SMALL, embedding_size=32),
    "esm": lambda: tf.EsmConfig(**SMALL, mask_token_id=2),
    "xlm-roberta": lambda: tf.XLMRobertaConfig(**SMALL),
    "longformer": lambda: tf.LongformerConfig(**SMALL, attention_window=4),
    "bigbird": lambda: tf.BigBirdConfig(**SMALL),
}
OTHERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: tf.BertConfig(**SMALL),
    "deberta": lambda: tf.DebertaConfig(**SMALL),
    "modernbert": lambda: tf.ModernBertConfig(**SMALL, sep_token_id=2, cls_token_id=3),
    "xlnet": lambda: tf.XLNetConfig(vocab_size=300, d_model=32, n_layer=2, n_head=2),
    "distilbert": lambda: tf.DistilBertConfig(
        vocab_size=300, dim=32, hidden_dim=48, n_layers=2, n_heads=2, max_position_embeddings=24
    ),
}  # fmt: skip
DRAWN = {"bert": tf.BertForMaskedLM, "mobilebert": tf.MobileBertForMaskedLM}


def written(path: Path, config: Any, cls: Any = tf.AutoModelForSequenceClassification) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config.num_labels = len(CLASSES)
        made = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
        made.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def opened(base: Path) -> Any:
    return load_classifier(resolve_model(base), CLASSES, 1, torch.float32)


def adapted(model: Any) -> lf.Adapter:
    spec = lf.LoRA(rank=2, dropout=0.0)
    return moved(model, spec, modules_to_save=head_to_save(model, spec, None))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=ids(), attention_mask=torch.ones_like(ids())).logits
    return found


def both_read(base: Path, model: Any, path: Path) -> Any:
    """PEFT's model with the saved adapter, when PEFT and lorafold read the same from it."""
    theirs = tf.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    wrapped, again = load_theirs(theirs, path), opened(base)
    assert gap(logits(wrapped), logits(model)) < 1e-5
    lf.load(again, path)
    assert torch.equal(logits(again), logits(model))
    return wrapped


@pytest.mark.few(3)
@pytest.mark.parametrize("name", [*PARTS, *OTHERS])
def test_peft_reads_the_head_of_a_classifier(name: str, tmp_path: Path) -> None:
    base = written(tmp_path / "base", (PARTS | OTHERS)[name]())
    model = opened(base)
    adapted(model).save(tmp_path / "adapter")
    wrapped = both_read(base, model, tmp_path / "adapter")
    if name in PARTS:
        assert wrapped.peft_config["default"].modules_to_save[0] == "classifier"


def test_a_part_of_a_head_alone_is_no_classifier_of_peft(tmp_path: Path) -> None:
    """PEFT would look for the whole head, which the files do not have."""
    base = written(tmp_path / "base", PARTS["roberta"]())
    model = opened(base)
    saved = ["classifier.out_proj"]
    moved(model, lf.LoRA(rank=2), modules_to_save=saved).save(tmp_path / "adapter")
    theirs = tf.AutoModelForSequenceClassification.from_pretrained(base)
    assert load_theirs(theirs, tmp_path / "adapter").peft_config["default"].task_type is None
    assert gap(logits(theirs), logits(model)) < 1e-5


@pytest.mark.parametrize("name", DRAWN)
def test_a_pooler_that_the_files_lack_is_a_part_of_the_head(name: str, tmp_path: Path) -> None:
    config = {
        "bert": tf.BertConfig(**SMALL),
        "mobilebert": tf.MobileBertConfig(
            **SMALL | {"hidden_size": 128}, intra_bottleneck_size=128, classifier_activation=True
        ),
    }[name]
    base = written(tmp_path / "base", config, DRAWN[name])
    model = opened(base)
    adapted(model).save(tmp_path / "adapter")
    both_read(base, model, tmp_path / "adapter")


@pytest.mark.parametrize("method", ["lora", "linear-probe"])
def test_a_masked_model_is_trained_as_a_classifier(method: str, tmp_path: Path) -> None:
    """The pooler is drawn from the seed, which only the run knows."""
    config = tf.BertConfig(**SMALL | {"pad_token_id": 0})
    base = written(tmp_path / "base", config, tf.BertForMaskedLM)
    assert head_paths(opened(base)) == ("bert.pooler.dense", "classifier")
    rows = [{"text": text, "label": label} for text, label in (("fox", "a"), ("rain", "b"))]
    recipe = lf.Recipe(
        method=method, objective="classify", steps=2, batch=2, storage="fp32", seed=3, eval_every=2
    )
    trained = lf.train(recipe, model=base, data=rows, out=tmp_path / "adapter", eval_data=rows)
    found = lf.evaluate(base, rows, adapters=tmp_path / "adapter", storage="fp32")
    assert found.loss == pytest.approx(trained.eval_loss, rel=1e-5)


def test_other_weights_of_the_body_may_not_be_missing(tmp_path: Path) -> None:
    base = written(tmp_path / "base", tf.BertConfig(**SMALL), tf.BertForMaskedLM)
    lost = "bert.encoder.layer.0.output.dense.weight"
    change(base, lambda tensors: tensors.pop(lost), "model.safetensors")
    with pytest.raises(LorafoldError, match=r"weights missing in the files \(1\): bert\.encoder"):
        opened(base)


@pytest.mark.parametrize("files", [tf.BertForMaskedLM, tf.BertModel, tf.MobileBertForMaskedLM])
def test_the_estimate_counts_a_new_pooler(files: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128} if files is tf.MobileBertForMaskedLM else {}
    own = {"intra_bottleneck_size": 128, "classifier_activation": True} if sizes else {}
    model = opened(written(tmp_path / "base", files.config_class(**SMALL | sizes, **own), files))
    spec = lf.LoRA(rank=2)
    lf.attach(model, spec, modules_to_save=head_to_save(model, spec, None))
    setting = MemorySetting(
        Storage(torch.float32), spec, rows=(5,), packed=False, classes=len(CLASSES),
        beside=lambda model: {"modules_to_save": head_to_save(model, spec, None)},
    )  # fmt: skip
    config = tf.AutoConfig.from_pretrained(tmp_path / "base")
    expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trace(config, setting, config.num_hidden_layers).gradients == 4 * expected


@pytest.mark.parametrize("kind", [tf.T5Config, tf.BartConfig])
def test_the_encoder_of_an_encoder_decoder_is_no_head(kind):
    layers = {"encoder_layers": 1, "decoder_layers": 1, "num_layers": 1}
    config = kind(d_model=32, vocab_size=64, **layers)
    model = tf.AutoModelForSequenceClassification.from_config(config)
    assert head_paths(model) == ("classification_head.dense", "classification_head.out_proj")
