"""Names and flags in an adapter file <-> low-rank factors. One file per naming."""
