"""openpi's own LoRA: its settings, its layers, and its JAX checkpoints."""
