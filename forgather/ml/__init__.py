"""Import paths that the documentation of models promises; each leads to the real thing elsewhere in Forgather."""
