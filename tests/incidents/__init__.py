"""One file for each known failure: what happened, the fault made to appear, and MuonDist in the same place.

Where DeepSpeed 0.19.8 still has a fault it is shown there; where it was repaired since, a variant marked BROKEN shows it.
"""
