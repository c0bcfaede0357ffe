"""Engines: what starts a job's agents on its nodes. Each is a thin adapter over a tool that clusters already have."""
