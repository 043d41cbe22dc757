"""Proteins on their way to a model: read, cleaned, made into token ids, cut into windows, put into batches.

The words: a *protein* is an id and a sequence. A *sequence of ids* has one token for each of its positions. A *window*
is a stretch of positions that goes through a model at once: all of a protein, if the model takes it. A *batch* is
windows in one forward pass, padded. No model and no family is known here.
"""
