"""A hunt over whole calls: what a case is, how it is run, and what it is held against.

`cases.py` draws conversations with small models of the LLaVA kind, `talk.py` has them, `reference.py`
has the unmodified model say what each row must give, `verdict.py` compares, or knows why a case is
refused. `beasts.py` does the same with a call of any model type of the zoo.
"""
