"""What extraction needs beside adapters: a request for it made a recipe, and two stored models side by side."""
