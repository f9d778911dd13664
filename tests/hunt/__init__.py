"""A hunt over whole calls: what a case is, how it is run, and what it is held against.

`draw.py` draws conversations (`cases.py`) with small models of the LLaVA kind (`pictures.py`),
`talk.py` has them, `reference.py` says by the unmodified model what each row must give, and
`verdict.py` compares. Some are had in other ways as well: `packed.py` puts rows end to end,
`replayed.py` records prefills as graphs. `beasts.py` draws calls of any model type of the zoo,
which `cage.py` checks.
"""
