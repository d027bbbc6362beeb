"""What a table of finished runs means: scaling laws with intervals, comparisons, verdicts and a report.

The table is the only interface: nothing here imports the training side, and nothing needs torch.
"""
