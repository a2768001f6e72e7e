"""`gardo rewards fit`: a reward of one's own from pairs of pictures with verdicts."""
