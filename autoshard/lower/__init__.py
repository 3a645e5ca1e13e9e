"""compile(graph, plan) → Program: partition, differentiate, bind."""

from .build import compile

__all__ = ["compile"]
