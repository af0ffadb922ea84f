"""Twelve configurations as users of other tools write them, scaled to a small model on a CPU.

MODEL, STEPS, SEED and OUT stand for the model's directory, the steps, the seed, and where the tool
writes. Rows are those of `recipe_rows`, beside the file.
"""

from typing import NamedTuple

# axolotl's prompt form of `type: alpaca`, as a chat template
ALPACA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'Below is an instruction that describes a task. Write a response that appropriately"
    " completes the request.\\n\\n### Instruction:\\n' + message['content'] +"
    " '\\n\\n### Response:\\n' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)


class Case(NamedTuple):
    """A configuration.

    tool: Whose it is, and the name of its translation's kind.
    text: The file.
    held_out: The form of the held-out rows.
    told: The options of `lorafold train` by which a user does what the report asks for.
    more: Tokens of a row that the tool labels and lorafold does not, as the report says.
    micro: The tool's micro-batches of a step, where it counts its steps in those.
    """

    tool: str
    text: str
    held_out: str
    told: tuple[str, ...] = ()
    more: int = 0
    micro: int = 1


TRL = """model_name_or_path: MODEL
use_peft: true
dtype: float32
bf16: false
use_cpu: true
gradient_checkpointing: false
max_steps: STEPS
seed: SEED
logging_steps: 1
report_to: none
save_strategy: "no"
output_dir: OUT
"""
LLAMAFACTORY = """model_name_or_path: MODEL
do_train: true
finetuning_type: lora
dataset_dir: .
template: smollm2
preprocessing_num_workers: 1
overwrite_cache: true
max_steps: STEPS
seed: SEED
logging_steps: 1
report_to: none
use_cpu: true
output_dir: OUT
overwrite_output_dir: true
"""
AXOLOTL = """base_model: MODEL
adapter: lora
bf16: false
tf32: false
attn_implementation: sdpa
gradient_checkpointing: false
lora_mlp_kernel: false
lora_qkv_kernel: false
lora_o_kernel: false
val_set_size: 0
max_steps: STEPS
seed: SEED
logging_steps: 1
dataset_prepared_path: OUT.rows
output_dir: OUT
optimizer: adamw_torch
"""
MLX = """model: MODEL
train: true
seed: SEED
max_seq_length: 512
val_batches: 1
steps_per_eval: 1000
save_every: 1000
adapter_path: OUT
"""
UNSLOTH = """from datasets import load_dataset
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel
from unsloth.chat_templates import train_on_responses_only

max_seq_length = 512
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="MODEL", max_seq_length=max_seq_length, load_in_4bit=False
)
model = FastLanguageModel.get_peft_model(
    model,
    r=RANK,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=SEED,
    use_rslora=RSLORA,
    loftq_config=None,
)
dataset = load_dataset("json", data_files="ROWS/train.jsonl", split="train")
"""
PROMPT = '''alpaca_prompt = """Below is an instruction that describes a task. Write a response \
that appropriately completes the request.

### Instruction:
{}

### Response:
{}"""


def formatting_prompts_func(examples):
    pairs = zip(examples["instruction"], examples["output"])
    return {"text": [alpaca_prompt.format(q, a) + tokenizer.eos_token for q, a in pairs]}


dataset = dataset.map(formatting_prompts_func, batched=True)
'''
RENDER = """

def render(examples):
    rows = examples["messages"]
    return {"text": [tokenizer.apply_chat_template(row, tokenize=False) for row in rows]}


dataset = dataset.map(render, batched=True, remove_columns=["messages"])
"""
TRAINER = """trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=dataset,
    args=SFTConfig(
        dataset_text_field="text",
        max_length=max_seq_length,
        packing=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATE,
        warmup_steps=2,
        max_steps=STEPS,
        learning_rate=2e-4,
        logging_steps=1,
        optim="adamw_torch",
        weight_decay=0.01,
        lr_scheduler_type="SCHEDULE",
        seed=SEED,
        output_dir="OUT",
        report_to="none",
        use_cpu=True,
        bf16=False,
    ),
)
"""
RESPONSES = """trainer = train_on_responses_only(
    trainer, instruction_part="<|im_start|>user\\n", response_part="<|im_start|>assistant\\n"
)
"""
TRAIN = 'trainer.train()\nmodel.save_pretrained("OUT")\n'


def _unsloth(rows: str, prepare: str, trainer: str, **given: object) -> str:
    text = UNSLOTH + prepare + trainer + TRAIN
    for key, value in {"ROWS": rows, **given}.items():
        text = text.replace(key, str(value))
    return text


FP32 = ("--set", "storage=fp32")  # of what a tool stores as its files are
AS_LARGE = ("--lr", "5.5e-4", "--lr-b", "5.5e-4")  # what the report of mlx-lm names for 10 steps
LAST_16 = r"model\.layers\.(1[4-9]|2\d)\.self_attn\.[qv]_proj"

CASES = {
    "turns, all-linear, linear, decay": Case("trl-sft", TRL + """dataset_name: turns
lora_r: 16
lora_alpha: 32
lora_target_modules: all-linear
learning_rate: 2.0e-4
weight_decay: 0.01
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
max_length: 512
completion_only_loss: true
""", "turns", more=1),
    "text, packed, rsLoRA, cosine": Case("trl-sft", TRL + """dataset_name: text
use_rslora: true
lora_r: 8
lora_alpha: 16
lora_dropout: 0.0
lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
learning_rate: 1.0e-3
lr_scheduler_type: cosine
warmup_steps: 0.1
per_device_train_batch_size: 1
packing: true
max_length: 128
""", "text", ("--set", "batch=6")),
    "strings, 4 bits, DoRA, constant": Case("trl-sft", TRL + """dataset_name: strings
load_in_4bit: true
use_dora: true
lora_r: 8
lora_alpha: 16
lora_target_modules: [q_proj, v_proj]
learning_rate: 5.0e-4
lr_scheduler_type: constant_with_warmup
warmup_steps: 2
per_device_train_batch_size: 4
completion_only_loss: true
""", "strings", ("--chat-template", "none")),
    "DPO": Case("trl-dpo", TRL + """dataset_name: pairs
loss_type: [sigmoid]
beta: 0.1
lora_r: 8
lora_alpha: 16
lora_target_modules: all-linear
learning_rate: 1.0e-4
per_device_train_batch_size: 4
max_length: 256
""", "pairs"),
    "Alpaca as text, linear, warm-up": Case("unsloth", _unsloth(
        "alpaca", PROMPT, TRAINER, RANK=16, RSLORA=False, ACCUMULATE=2, SCHEDULE="linear",
    ), "alpaca_text", ("--data", "alpaca_text/train.jsonl", *FP32)),
    "responses only, rsLoRA, cosine": Case("unsloth", _unsloth(
        "messages", RENDER, TRAINER + RESPONSES, RANK=32, RSLORA=True, ACCUMULATE=2,
        SCHEDULE="cosine",
    ), "messages", ("--data", "messages/train.jsonl", *FP32), 2),
    "Alpaca, all, cosine, warm-up": Case("llamafactory", LLAMAFACTORY + """stage: sft
dataset: alpaca
cutoff_len: 512
lora_rank: 8
lora_target: all
learning_rate: 2.0e-4
lr_scheduler_type: cosine
warmup_ratio: 0.1
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
""", "messages", FP32, 1),
    "ShareGPT, neat packing, rsLoRA, decay": Case("llamafactory", LLAMAFACTORY + """stage: sft
dataset: shared
cutoff_len: 160
neat_packing: true
lora_rank: 16
lora_alpha: 16
lora_dropout: 0.05
use_rslora: true
lora_target: q_proj,v_proj,gate_proj,up_proj,down_proj
learning_rate: 2.0e-4
weight_decay: 0.1
per_device_train_batch_size: 1
""", "messages", (*FP32, "--set", "batch=4"), 1),
    "DPO, cosine, warm-up": Case("llamafactory", LLAMAFACTORY + """stage: dpo
pref_beta: 0.1
pref_loss: sigmoid
dataset: ranked
cutoff_len: 256
lora_rank: 8
lora_target: all
learning_rate: 1.0e-4
lr_scheduler_type: cosine
warmup_ratio: 0.1
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
""", "pairs", FP32),
    "chat template, cosine, decay": Case("axolotl", AXOLOTL + """lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_linear: true
datasets:
  - path: messages/train.jsonl
    ds_type: json
    type: chat_template
sequence_len: 512
sample_packing: false
micro_batch_size: 2
gradient_accumulation_steps: 2
lr_scheduler: cosine
learning_rate: 0.0002
warmup_ratio: 0.1
weight_decay: 0.01
""", "messages"),
    "Alpaca, packed, rsLoRA, linear": Case("axolotl", AXOLOTL + """lora_r: 8
lora_alpha: 16
peft_use_rslora: true
lora_target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
datasets:
  - path: alpaca/train.jsonl
    ds_type: json
    type: alpaca
sequence_len: 256
sample_packing: true
pad_to_sequence_len: true
micro_batch_size: 1
lr_scheduler: linear
learning_rate: 0.0002
warmup_steps: 2
train_on_inputs: false
""", "alpaca", ("--set", "batch=4", "--chat-template", "alpaca.jinja")),
    "strings, prompt masked, cosine": Case("mlx-lm", MLX + """data: strings
fine_tune_type: lora
num_layers: -1
batch_size: 4
iters: STEPS
steps_per_report: 1
mask_prompt: true
lr_schedule: {name: cosine_decay, warmup: 2, arguments: [1e-4, STEPS]}
lora_parameters: {rank: 8, scale: 2.0, dropout: 0.0}
""", "strings", (*FP32, *AS_LARGE), 2),
    "chat, DoRA, 16 layers, accumulation": Case("mlx-lm", MLX + """data: messages
fine_tune_type: dora
num_layers: 16
batch_size: 2
grad_accumulation_steps: 2
iters: MICRO
steps_per_report: 2
mask_prompt: true
optimizer: adamw
learning_rate: 1e-4
lora_parameters:
  rank: 8
  scale: 10.0
  dropout: 0.0
  keys: [self_attn.q_proj, self_attn.v_proj]
""", "messages", (*FP32, *AS_LARGE, "--set", f"targets={LAST_16}"), 2, 2),
}  # fmt: skip
