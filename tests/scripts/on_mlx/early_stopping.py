"""Stop a fine-tuning early, keep the best model, and report with a callback."""

import csv

from transformers import AutoTokenizer, DataCollatorWithPadding, EarlyStoppingCallback, TrainerCallback

from mlx_esm_hf import MLXAutoModelForSequenceClassification, MLXTrainer, MLXTrainingArguments

checkpoint = "my-lab/esm2-location"
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = MLXAutoModelForSequenceClassification.from_pretrained(checkpoint)
model.esm.freeze()

with open("proteins.csv") as file:
    rows = list(csv.DictReader(file))
train = [{**tokenizer(row["sequence"]), "label": int(row["location"])} for row in rows if row["split"] == "train"]
test = [{**tokenizer(row["sequence"]), "label": int(row["location"])} for row in rows if row["split"] == "test"]


class PrintingCallback(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        print("steps", state.max_steps)

    def on_epoch_end(self, args, state, control, **kwargs):
        print(f"end of epoch {state.epoch:.0f}, step {state.global_step}")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        print(f"  eval_loss {metrics['eval_loss']:.4f}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            print(f"  loss {logs['loss']:.4f} learning rate {logs['learning_rate']:.5f}")


training_args = MLXTrainingArguments(
    output_dir="stopped",
    num_train_epochs=20,
    per_device_train_batch_size=32,
    learning_rate=0.03,
    eval_strategy="epoch",
    save_strategy="epoch",
    logging_strategy="epoch",
    save_total_limit=1,
    load_best_model_at_end=True,
    metric_for_best_model="eval_loss",
    greater_is_better=False,
    disable_tqdm=True,
    report_to="none",
)
trainer = MLXTrainer(
    model=model,
    args=training_args,
    train_dataset=train,
    eval_dataset=test,
    data_collator=DataCollatorWithPadding(tokenizer=tokenizer, return_tensors="np"),
    callbacks=[EarlyStoppingCallback(early_stopping_patience=2), PrintingCallback()],
)
trainer.train()
print("stopped after", trainer.state.global_step, "best", f"{trainer.state.best_metric:.4f}")
print("best checkpoint", trainer.state.best_model_checkpoint.split("/")[-1])
metrics = trainer.evaluate()
trainer.log_metrics("eval", metrics)
trainer.save_metrics("eval", metrics)
trainer.save_state()
