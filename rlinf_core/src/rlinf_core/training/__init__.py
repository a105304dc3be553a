"""The FSDP2 trainer and what it is made of."""
