"""How the embedded prompt-injection model is made and judged: `make train-injection`, `make eval-injection`.

Not part of any image. Its data are texts inside PyPI packages (`packages.txt`) and grammars of our own (`*.yaml`).
"""
