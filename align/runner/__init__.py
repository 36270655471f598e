"""Executes a recipe's plan: one worker process per stage, watched from here. No model is loaded in this process."""
