"""The experiments behind the figures: a folder each, with what runs it (`run.py`), its result files, and what draws its page (`page.py`)."""
