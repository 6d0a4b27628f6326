"""Prompt injection and jailbreaks. `family` is what a policy says; `detector` judges, by the embedded model `fast`
(n-grams and a linear model in NumPy) or by a classifier of one's own.
"""
