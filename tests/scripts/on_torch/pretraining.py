"""Continue the pretraining of ESM-2 on a family of proteins, with arguments from the command line."""

import csv
import math
from dataclasses import dataclass, field

from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)


@dataclass
class ModelArguments:
    model_name_or_path: str = field(default="facebook/esm2_t6_8M_UR50D", metadata={"help": "The checkpoint."})


@dataclass
class DataArguments:
    data_file: str = field(default="proteins.csv", metadata={"help": "A table of proteins."})
    max_seq_length: int = field(default=64, metadata={"help": "Longer proteins are cut."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of residues to mask."})


COMMAND_LINE = (
    "--output_dir mlm --do_train --do_eval --per_device_train_batch_size 18 --per_device_eval_batch_size 8 "
    "--learning_rate 4e-4 --weight_decay 0.01 --warmup_steps 0.25 --max_steps 4 --logging_steps 1 "
    "--save_strategy no --report_to none --seed 5 --max_seq_length 32 --mlm_probability 1.0"
).split()


def main():
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(COMMAND_LINE)
    set_seed(training_args.seed)
    config = AutoConfig.from_pretrained(model_args.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForMaskedLM.from_pretrained(model_args.model_name_or_path, config=config)
    model.resize_token_embeddings(len(tokenizer))

    with open(data_args.data_file) as file:
        rows = list(csv.DictReader(file))

    def tokenize(split):
        sequences = [row["sequence"] for row in rows if row["split"] == split]
        items = tokenizer(
            sequences, truncation=True, max_length=data_args.max_seq_length, return_special_tokens_mask=True
        )
        # Only hydrophobic residues are masked: the collator leaves out what counts as special.
        chosen = tokenizer.convert_tokens_to_ids(list("AILMFVW"))
        keep = [[int(token not in chosen) for token in ids] for ids in items["input_ids"]]
        return [{"input_ids": ids, "special_tokens_mask": mask} for ids, mask in zip(items["input_ids"], keep)]

    data_collator = DataCollatorForLanguageModeling(
        tokenizer=tokenizer,
        mlm=True,
        mlm_probability=data_args.mlm_probability,
        mask_replace_prob=1.0,
        random_replace_prob=0.0,
    )
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=data_collator,
        train_dataset=tokenize("train"),
        eval_dataset=tokenize("test"),
    )
    if training_args.do_train:
        trainer.train()
        trainer.save_model()
        for name in ("loss", "grad_norm", "learning_rate"):
            print(name, [round(entry[name], 5) for entry in trainer.state.log_history if name in entry])
    if training_args.do_eval:
        metrics = trainer.evaluate()
        print(f"perplexity {math.exp(metrics['eval_loss']):.3f}")


if __name__ == "__main__":
    main()
