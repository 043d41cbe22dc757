"""transformers' tokenizer of ESMC: `<cls>` and `<eos>` around a sequence, `|` between its chains."""

from transformers import EsmcTokenizer

__all__ = ["EsmcTokenizer"]
