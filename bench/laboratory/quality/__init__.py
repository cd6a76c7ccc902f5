"""How good compressed models are, method by method: a report on a model, some texts, and a machine."""
