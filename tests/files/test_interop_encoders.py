"""PEFT and sentence-transformers compute what an adapted encoder computes."""

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import BertConfig, BertModel

import lorafold as lf
from conftest import make_tokenizer

TEXTS = ["the fox jumps", "a table for two, please", "rain"]


def vectors(model, tokenizer, texts):
    """The normalized mean over the tokens: (texts, hidden)."""
    given = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        hidden = model.eval()(**given).last_hidden_state
    kept = given["attention_mask"][..., None]
    return F.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)


@pytest.fixture
def adapted(tmp_path):
    """(base, tokenizer, model with an adapter whose update is not small, the adapter)."""
    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(tmp_path / "base")
    model = BertModel.from_pretrained(tmp_path / "base")
    adapter = lf.attach(model, lf.LoRA(rank=4, rslora=True), targets=["query", "value"])
    for p in adapter.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return tmp_path / "base", tokenizer, model, adapter


def test_peft_reads_the_adapter_of_an_encoder(adapted, tmp_path):
    base, tokenizer, model, adapter = adapted
    wanted = vectors(model, tokenizer, TEXTS)
    bare = BertModel.from_pretrained(base)
    assert (vectors(bare, tokenizer, TEXTS) - wanted).abs().max() > 0.05
    theirs = PeftModel.from_pretrained(bare, adapter.save(tmp_path / "adapter"))
    torch.testing.assert_close(vectors(theirs, tokenizer, TEXTS), wanted, atol=1e-5, rtol=0)


def test_sentence_transformers_opens_a_merged_encoder(adapted, tmp_path):
    sentences = pytest.importorskip("sentence_transformers")
    _, tokenizer, model, adapter = adapted
    wanted = vectors(model, tokenizer, TEXTS)
    adapter.merge()
    model.save_pretrained(tmp_path / "merged")
    tokenizer.model_max_length = 64
    tokenizer.chat_template = None  # sentence-transformers would render texts as chats
    tokenizer.save_pretrained(tmp_path / "merged")
    theirs = sentences.SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    found = theirs.encode(TEXTS, normalize_embeddings=True, convert_to_tensor=True)
    torch.testing.assert_close(found.cpu(), wanted, atol=1e-5, rtol=0)
