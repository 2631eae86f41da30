"""What training carries from step to step: the state, its optimizer and schedule, and the
checkpoints of it.
"""
