"""What training needs beside adapters: a base model with heads, rows of text as tokens, and both as one problem."""
