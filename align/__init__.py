"""align: one YAML recipe in; an aligned language model and an honest comparison of how it got there out."""

__version__ = "0.1.0"
