"""Images of chats: where they are, what a processor makes of them, and what sets families of models apart."""
