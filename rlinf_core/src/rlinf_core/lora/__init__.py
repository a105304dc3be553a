"""Low-rank adapters (LoRA) of a policy's linear layers: `[policy.lora]`, the layers, and files in PEFT's layout."""
