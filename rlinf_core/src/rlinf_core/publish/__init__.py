"""The model card of an exported folder, and what `rlinf push` checks and uploads."""
