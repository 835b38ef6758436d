"""``fastsft demo``: from raw source files to a tuned, executed and sampled code model, on this machine alone."""
