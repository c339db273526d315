"""Options, each once, and how they are parsed."""
