"""The networks, one folder per family, named and laid out as in transformers' `models/`."""
