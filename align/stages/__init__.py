"""Executes one stage of a recipe in a process of its own; `worker` is that process's entry."""
