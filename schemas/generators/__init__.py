"""Derived from the vocabulary: JSON Schema, AsyncAPI, the reference page, the form of models files, fixtures."""
