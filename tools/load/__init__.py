"""Generation under load: prompts, closed loops of clients in this process or over HTTP, and reports."""
