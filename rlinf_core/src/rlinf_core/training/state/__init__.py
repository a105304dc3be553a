"""The training state: the sharded module with its weights and adapters, its optimizer and moving average."""
