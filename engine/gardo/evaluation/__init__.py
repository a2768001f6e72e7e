"""Measuring a policy on fixed prompts and noise: rewards with intervals, change, diversity."""
