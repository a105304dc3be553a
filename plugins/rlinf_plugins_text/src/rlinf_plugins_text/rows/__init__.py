"""Files and hub datasets to conversations to tokens."""
