"""Runs over datasets, as their driver sees them: the plan, the output folder, and what is made of it at the end."""
