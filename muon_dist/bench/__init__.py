"""Paired measurements against peers. Ratios are quoted, from medians of pairs in one run; absolute times are not claims."""
