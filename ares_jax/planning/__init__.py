"""Does a run fit, and how fast is it? Programs compiled ahead of time, their memory, transfers and flops."""
