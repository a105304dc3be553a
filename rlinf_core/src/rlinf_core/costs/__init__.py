"""Operations, bytes and GPU peaks: what a step takes, counted without computing it."""
