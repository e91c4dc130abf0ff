"""Running merges: what is to be done (plan), one piece of it (task), who does it (executor), and what survives (workflow)."""
