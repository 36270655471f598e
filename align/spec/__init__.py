"""What a recipe may say: pydantic only, nothing heavy."""
