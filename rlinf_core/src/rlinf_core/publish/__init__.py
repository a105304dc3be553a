"""Model cards of exported policies, and what `rlinf push` uploads."""
