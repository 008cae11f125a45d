"""One file a claim: what the paper or we state, checked live. `dblend verify` runs them all."""
