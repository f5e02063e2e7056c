"""Tasks of causal language models: what is asked, how it is put to a model, and how what the model says is judged."""
