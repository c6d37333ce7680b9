"""Sweeps for people who run fabrics: what reads and writes cost here, beside the limits that this machine sets.

`run.run_sweep` measures a `plan.Sweep` and gives a document; `results` keeps and reads such documents, `report`,
`plots` and `html` show them, `compare` holds two against each other, `presets` knows the block sizes of common models.
The repository's own benchmarks (`perf/` beside this package) use its parts.
"""
