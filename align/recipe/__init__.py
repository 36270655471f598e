"""A recipe: from a YAML file to a checked graph of stages."""

from align.recipe.env import resolve_env
from align.recipe.graph import Graph, Node, build_graph
from align.recipe.load import LoadedRecipe, load_recipe

__all__ = ["Graph", "LoadedRecipe", "Node", "build_graph", "load_recipe", "resolve_env"]
