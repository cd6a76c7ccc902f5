"""The report on the quality of compressed models by method, for a model, texts, and a machine."""
