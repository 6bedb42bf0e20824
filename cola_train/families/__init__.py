"""Kinds of models, one or two per folder; the rest of the program asks the registry for them."""
