"""The Hugging Face tokenizer of ESMC, handed on: `<cls>` and `<eos>` around a sequence, `|` between its chains."""

from transformers import EsmcTokenizer

__all__ = ["EsmcTokenizer"]
