"""``fastsft bench``: runs the benches beside their rivals, keeps what they measure, compares and renders it."""
