"""How many tokens a row may have, against transformers, and sequences beyond a table."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from rich.console import Console

import lorafold as lf
from conftest import make_tokenizer, refused
from lorafold.data.examples import NO_LOSS, Example
from lorafold.data.preference_examples import BranchedRow
from lorafold.errors import LorafoldError
from lorafold.models.positions import (
    Positions,
    max_sequence_tokens,
    positions_in,
    positions_of,
    trained_positions,
)
from lorafold.resolve import Base
from lorafold.training.checkpoint import RunDirectory
from lorafold.training.inputs import RunRequest, with_max_length
from lorafold.training_step.losses import CompletionLoss
from lorafold.training_step.packed_attention import packed
from lorafold.training_step.preference_algorithms import Simpo
from lorafold.training_step.preference_loss import Preferences
from lorafold.training_step.shared_prefixes import sharing_prefixes
from typed_commands import done, run, write_rows

pytestmark = pytest.mark.usefixtures("unestimated")

N = 24
SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": N, "pad_token_id": 1, "type_vocab_size": 2,
}  # fmt: skip
GPT: dict[str, Any] = {
    "vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": N,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 300, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": N, "is_decoder": True,
    "is_encoder_decoder": False,
}  # fmt: skip
NOT_SAID = {k: v for k, v in SMALL.items() if k != "type_vocab_size"}

TINY: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
CAUSAL: dict[str, tuple[Any, dict[str, Any], int | None]] = {
    "gpt2": (tf.GPT2Config, GPT, N),
    "gpt-bigcode": (tf.GPTBigCodeConfig, GPT, N),
    "openai-gpt": (tf.OpenAIGPTConfig, GPT, N),
    "gptj": (tf.GPTJConfig, GPT | {"rotary_dim": 8}, N),
    "codegen": (tf.CodeGenConfig, GPT | {"rotary_dim": 8}, N),
    "ctrl": (tf.CTRLConfig, GPT | {"dff": 48}, N),
    "opt": (tf.OPTConfig, NOT_SAID | {"ffn_dim": 48, "word_embed_proj_dim": 32}, N),
    "biogpt": (tf.BioGptConfig, NOT_SAID, N),
    "bart": (tf.BartConfig, BART, N),
    "pegasus": (tf.PegasusConfig, BART, N),
    "roberta-decoder": (tf.RobertaConfig, SMALL | {"is_decoder": True}, N - 2),
    # its table grows as rows do
    "xglm": (tf.XGLMConfig, {"vocab_size": 300, "d_model": 32, "ffn_dim": 48, "num_layers": 2,
                             "attention_heads": 2, "max_position_embeddings": N}, None),
    "bloom": (tf.BloomConfig, TINY | {"n_layer": 2, "n_head": 2}, None),
    "falcon-alibi": (tf.FalconConfig, TINY | {
        "num_attention_heads": 2, "alibi": True, "max_position_embeddings": N,
        "new_decoder_architecture": False}, None),
    "llama": (tf.LlamaConfig, NOT_SAID, None),
    "mamba": (tf.MambaConfig, TINY, None),
}
ESM = NOT_SAID | {"mask_token_id": 2}
CLASSIFIERS: dict[str, tuple[Any, dict[str, Any], int | None]] = {
    "bert": (tf.BertConfig, SMALL, N),
    "roberta": (tf.RobertaConfig, SMALL, N - 2),
    "xlm-roberta": (tf.XLMRobertaConfig, SMALL, N - 2),
    "camembert": (tf.CamembertConfig, SMALL, N - 2),
    "mpnet": (tf.MPNetConfig, NOT_SAID, N - 2),
    "esm": (tf.EsmConfig, ESM | {"position_embedding_type": "absolute"}, N - 2),
    "esm-rotary": (tf.EsmConfig, ESM | {"position_embedding_type": "rotary"}, None),
    "longformer": (tf.LongformerConfig, SMALL | {"attention_window": 4}, N - 2),
    "electra": (tf.ElectraConfig, SMALL | {"embedding_size": 32}, N),
    "albert": (tf.AlbertConfig, SMALL | {"embedding_size": 16}, N),
    "distilbert": (tf.DistilBertConfig, {
        "vocab_size": 300, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2,
        "max_position_embeddings": N}, N),
    "nystromformer": (tf.NystromformerConfig,
                      SMALL | {"num_landmarks": N, "segment_means_seq_len": N}, N),
    "rembert": (tf.RemBertConfig,
                SMALL | {"input_embedding_size": 16, "output_embedding_size": 16}, N),
    "deberta": (tf.DebertaConfig, SMALL, N),
    "deberta-relative": (tf.DebertaV2Config, SMALL | {
        "relative_attention": True, "position_biased_input": False}, None),
    "xlm": (tf.XLMConfig, {"vocab_size": 300, "emb_dim": 32, "n_layers": 2, "n_heads": 2,
                           "max_position_embeddings": N}, N),
    "roformer": (tf.RoFormerConfig, SMALL | {"embedding_size": 32}, N),
    "xlnet": (tf.XLNetConfig, {"vocab_size": 300, "d_model": 32, "n_layer": 2, "n_head": 2}, None),
    "modernbert": (tf.ModernBertConfig, NOT_SAID | {"sep_token_id": 2, "cls_token_id": 3}, None),
}


def runs(model: Any, tokens: int) -> bool:
    ids = torch.randint(5, 290, (1, tokens), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("name", [*CAUSAL, *CLASSIFIERS])
def test_a_row_of_so_many_tokens_runs_and_one_more_does_not(name: str) -> None:
    classifies = name in CLASSIFIERS
    config, fields, expected = (CAUSAL | CLASSIFIERS)[name]
    auto = tf.AutoModelForSequenceClassification if classifies else tf.AutoModelForCausalLM
    model = auto.from_config(config(**fields)).eval()
    assert positions_of(model).table == expected
    assert positions_in(config(**fields), classifies).table == expected
    if expected is None:
        assert runs(model, 2 * N)
    else:
        assert runs(model, expected)
        assert not runs(model, expected + 1)


STRETCHED = {"factor": 4.0, "rope_type": "yarn"}
LLAMA3 = {"original_max_position_embeddings": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE: dict[str, tuple[dict[str, Any] | None, int]] = {
    "none": (None, 64),
    "linear": ({"rope_type": "linear", "factor": 4.0}, 256),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, 128),
    # as configurations are released: with the positions after stretching, and before
    "yarn-after": (STRETCHED | {"original_max_position_embeddings": 16}, 64),
    "yarn-before": (STRETCHED | {"original_max_position_embeddings": 64}, 256),
    "llama3": (LLAMA3 | {"rope_type": "llama3", "factor": 8.0}, 64),
}


@pytest.mark.parametrize("kind", ROPE)
def test_rotary_positions_are_those_it_was_trained_on(kind: str) -> None:
    scaling, expected = ROPE[kind]
    rope = {} if scaling is None else {"rope_parameters": {"rope_theta": 1e4, **scaling}}
    config = tf.LlamaConfig(**NOT_SAID | {"max_position_embeddings": 64}, **rope)
    assert positions_in(config, False) == Positions("llama", None, expected)


def test_positions_of_parts_and_of_what_has_none() -> None:
    assert trained_positions(tf.MistralConfig(**NOT_SAID, sliding_window=8)) == N
    assert trained_positions(tf.ModernBertConfig(**NOT_SAID, sep_token_id=2, cls_token_id=3)) == N
    assert trained_positions(tf.MambaConfig()) is None
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
             "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**NOT_SAID), vision_config=tf.CLIPVisionConfig(**tower)
    )
    assert positions_in(config, False) == Positions("llava", None, N)


def test_a_length_is_fitted_refused_or_told() -> None:
    table, rotary = Positions("A", 512, None), Positions("B", None, 2048)
    limited = "max_length 512 instead of 1024: A allows rows of 512 positions"
    assert table.fitted(None, 1024) == (512, limited)
    assert table.fitted(512, 1024) == (512, None)
    with pytest.raises(LorafoldError, match="max_length 513: expected at most 512, the positions"):
        table.fitted(513, 1024)
    assert table.after(20).fitted(None, 1024)[0] == 492
    with pytest.raises(LorafoldError, match="512 positions, and virtual tokens take 511"):
        table.after(511)
    assert rotary.fitted(None, 1024) == (1024, None)
    assert rotary.fitted(None, 4096)[0] == 2048
    length, told = rotary.fitted(4096, 1024)
    assert length == 4096
    assert told is not None
    assert "was trained on 2048 positions" in told
    assert Positions("C", None, None).fitted(10**6, 1024) == (10**6, None)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 64 positions, with a classifier's head."""
    path, tokenizer = tmp_path_factory.mktemp("bert"), make_tokenizer()
    torch.manual_seed(0)
    config = tf.BertConfig(**SMALL | {"max_position_embeddings": 64, "pad_token_id": 0})
    config.id2label = {0: "a", 1: "b"}
    tf.BertForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


LONG = [{"text": "fox " * 200, "label": "a"}, {"text": "rain", "label": "b"}] * 2


def test_a_classifier_is_trained_and_measured_within_its_positions(bert, tmp_path) -> None:
    """The default length is beyond its positions."""
    data = write_rows(tmp_path / "rows.jsonl", LONG)
    told = "max_length 64 instead of 1024: BertForSequenceClassification allows rows of 64"
    on = f"--model {bert} --data {data}"
    train = f"train {on} --objective classify --steps 2 --batch 2 --storage fp32 --out {tmp_path}"
    said = done(f"{train}/a").stderr
    assert told in said
    assert "2 rows were cut at 64 tokens" in said
    measure = f"eval {on} --adapter {tmp_path}/a"
    assert told in done(measure).stderr
    beyond = "error: max_length 65: expected at most 64, the positions per row of BertForSequence"
    for command in (f"{train}/b", measure):
        assert refused(*command.split(), "--max-length", "65").startswith(beyond)
    assert not (tmp_path / "b").exists()


def test_virtual_tokens_take_positions(tiny_model_dir: Any, tmp_path: Path) -> None:
    """GPT-2 has 512: with 20 before each row there are 492 left."""
    model, data = tiny_model_dir("gpt2"), [{"prompt": "a", "completion": " fox" * 600}]
    recipe = lf.Recipe(method="prompt", steps=1, batch=1, storage="fp32")
    lf.train(recipe, model=model, data=data, out=tmp_path / "a")
    assert '"max_length": 492' in (tmp_path / "a" / "lorafold.json").read_text()
    found = lf.evaluate(model, data, adapters=tmp_path / "a", completions=False)
    assert found.loss > 0
    with pytest.raises(LorafoldError, match="expected at most 492"):
        lf.evaluate(model, data, adapters=tmp_path / "a", max_length=512)


def test_rotary_positions_bound_the_default_not_what_is_asked_for(tiny_model_dir, tmp_path) -> None:
    data = [{"prompt": "a", "completion": " fox" * 600}]
    model = tiny_model_dir("llama")
    cut = run(f"estimate --model {model} --mode lora --json").stderr
    assert "max_length 512 instead of 1024: LlamaForCausalLM was trained on 512" in cut
    recipe = lf.Recipe(steps=1, batch=1, storage="fp32", max_length=700)
    lf.train(recipe, model=model, data=data, out=tmp_path / "a")
    assert '"max_length": 700' in (tmp_path / "a" / "lorafold.json").read_text()
    told = "max_length 700: LlamaForCausalLM was trained on 512 positions"
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": " fox"}])
    on = f"eval --model {model} --data {rows}"
    assert told in done(f"{on} --max-length 700 --no-completions").stderr


def test_a_run_is_resumed_with_the_length_that_it_began_with(tiny_model_dir, tmp_path) -> None:
    """Also one of an earlier version, which began with more than the model has positions."""
    rows = [{"prompt": "a", "completion": " fox"}]
    request = RunRequest(
        Base(tiny_model_dir("gpt2")), tmp_path / "a", lf.Recipe(), rows, "rows", resume=True
    )
    quiet = Console(quiet=True)
    assert with_max_length(request, [], quiet).recipe.max_length == 512
    RunDirectory(tmp_path / "a").start({"max_length": 1024})
    assert with_max_length(request, [], quiet).recipe.max_length == 1024


WIDTHS = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48}


def gpt_neo(positions: int = 24) -> Any:
    torch.manual_seed(0)
    config = tf.GPTNeoConfig(
        **WIDTHS, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
        window_size=6, max_position_embeddings=positions, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return tf.GPTNeoForCausalLM(config).eval()


def llama4(chunk: int) -> Any:
    torch.manual_seed(0)
    config = tf.Llama4TextConfig(
        **WIDTHS, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=chunk, pad_token_id=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return tf.Llama4ForCausalLM(config).eval()


def drawn(*lengths: int) -> list[Example]:
    draw = torch.Generator().manual_seed(1)
    drawn = (tuple(torch.randint(1, 300, (n,), generator=draw).tolist()) for n in lengths)
    return [Example(ids, ids) for ids in drawn]


def total_loss(loss: Any, batches: list[Any]) -> float:
    with torch.no_grad():
        return sum(float(loss(**loss.collate(batch, loss.device))) for batch in batches)


@pytest.mark.parametrize("make", [gpt_neo, lambda: llama4(18)], ids=["gpt-neo", "llama4"])
def test_packed_rows_beyond_tables_and_chunks_are_as_they_are_padded(make: Any) -> None:
    """GPT-Neo reads its mask from a buffer of 24 x 24; Llama 4 has chunks of 18."""
    model = make()
    examples = drawn(20, 5, 21, 9, 22, 7)
    alone = CompletionLoss(model, False, 0)
    expected = total_loss(alone, [[example] for example in examples])
    with packed(model) as apart:
        assert apart
        loss = CompletionLoss(model, apart, 0)
        parts = loss.micro_batches(examples, 1, 1024)
        batches = [[examples[i] for i in part] for part in parts]
        assert total_loss(loss, batches) == pytest.approx(expected, rel=1e-4)
    assert len(parts) == (1 if max_sequence_tokens(model) is None else 4)


def test_completions_beyond_a_chunk_have_a_prompt_each() -> None:
    model = llama4(18)
    draw = iter(drawn(15, 5, 4, 6, 5, 4))

    def example() -> BranchedRow:
        shared, *branches = (next(draw).ids for _ in range(3))
        return BranchedRow(shared, tuple(Example(b, (NO_LOSS, *b[1:])) for b in branches))

    examples = [example(), example()]  # 20 and 19 tokens with their prompt, then 11 and 10
    law = Simpo()
    plain = Preferences(model, law, None, 0)
    expected = [total_loss(plain, [[e]]) for e in examples]
    with sharing_prefixes(model) as how:
        assert (how.shares, how.max_tokens) == (True, 18)
        loss = Preferences(model, law, how, 0)
        assert ["lens" in loss.collate([e], loss.device) for e in examples] == [False, True]
        assert [loss.size(e) for e in examples] == [39, 15]
        found = [total_loss(loss, [[e]]) for e in examples]
        assert total_loss(loss, [examples]) == pytest.approx(sum(expected), rel=1e-4)
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_mask_in_a_buffer_bounds_rows_and_sequences() -> None:
    assert positions_of(gpt_neo(40)).table == max_sequence_tokens(gpt_neo(40)) == 40


def test_a_row_beyond_the_positions_is_refused_before_training(tiny_model_dir, tmp_path) -> None:
    """Of a run that an earlier version began with more than the positions of its model."""
    model = tiny_model_dir("gpt2")
    data = [{"prompt": "a", "completion": " fox" * n} for n in (3, 1024)]
    recipe = lf.Recipe(steps=1, batch=2, storage="fp32")
    RunDirectory(tmp_path / "a").start({"max_length": 1024})
    with pytest.raises(LorafoldError, match="tokens, expected at most the 512 positions of"):
        lf.train(recipe, model=model, data=data, out=tmp_path / "a", resume=True)
