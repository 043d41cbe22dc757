"""The networks, a folder for each family, named and laid out as in transformers' `models/`."""
