"""From files and hub datasets to chats, tokens, samples and batches."""
