"""Fine-tune ESM-2 with LoRA, save the adapter, and load it again."""

import csv

import numpy as np
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

base = "my-lab/esm2-location"
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForSequenceClassification.from_pretrained(base)
peft_config = LoraConfig(
    task_type=TaskType.SEQ_CLS,
    inference_mode=False,
    r=4,
    lora_alpha=16,
    lora_dropout=0.0,
    bias="none",
    target_modules=["query", "key", "value"],
)
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()

with open("proteins.csv") as file:
    rows = list(csv.DictReader(file))
train = [{**tokenizer(row["sequence"]), "labels": int(row["location"])} for row in rows if row["split"] == "train"]
test = [{**tokenizer(row["sequence"]), "labels": int(row["location"])} for row in rows if row["split"] == "test"]

# LoRA's B is zero at first and A is random: the same A on every machine.
random = np.random.default_rng(0)
state = model.state_dict()
for name in sorted(state):
    if "lora_A" in name:
        state[name] = torch.tensor(random.normal(size=state[name].shape) / 4, dtype=torch.float32)
model.load_state_dict(state)

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="lora",
        learning_rate=5e-3,
        per_device_train_batch_size=18,
        num_train_epochs=5,
        logging_steps=1,
        save_strategy="no",
        label_names=["labels"],
        report_to="none",
    ),
    train_dataset=train,
    eval_dataset=test,
    data_collator=DataCollatorWithPadding(tokenizer),
)
trainer.train()
print([round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry])
print(f"eval_loss {trainer.evaluate()['eval_loss']:.4f}")
model.save_pretrained("my-adapter")

loaded = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), "my-adapter")
loaded.eval()
inputs = tokenizer("MQIFVKTLTGKTITLEVEPS", return_tensors="pt")
with torch.no_grad():
    print(loaded(**inputs).logits.numpy().round(4))
