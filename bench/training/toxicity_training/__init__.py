"""How the embedded toxicity model is made and judged: `make convert-toxicity`, `make eval-toxicity`.

Not part of any image. The model is another's, inside a PyPI package (`packages.txt`); nothing of that package is run.
"""
