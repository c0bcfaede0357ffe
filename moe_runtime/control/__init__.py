"""The control plane of a running job: one coordinator, an agent in every rank, and views that they agree on.

Nothing here needs torch. DESIGN.md calls a numbered membership a view; docs/survival.md has the whole picture.
"""
