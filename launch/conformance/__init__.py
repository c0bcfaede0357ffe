"""`moe-launch check`: what is claimed of a vendor's device and library, beside what is seen where it runs.

`command` decides what to run and shows the report, `suite` runs the probes on every rank, `claims` reads the vendor
table, `verdicts` compares. Owns no facts about vendors: those are comm/vendors.py's.
"""
