"""Where adapters come from: one file per kind of source."""
