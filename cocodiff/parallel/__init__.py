"""Which rank has which tokens and heads: layouts, the mesh and its process groups."""
