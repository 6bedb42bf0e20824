"""Kinds of models. A folder is a family or two that share networks; all else asks the registry and
knows none by name.
"""
