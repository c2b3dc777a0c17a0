"""A comparison of allocation rules that was fixed before it was run: launch/proof.sh."""
