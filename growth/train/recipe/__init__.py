"""Recipes: the schema, what it cannot say, and errors that name the line."""

from .schema import Recipe, load_recipe

__all__ = ["Recipe", "load_recipe"]
