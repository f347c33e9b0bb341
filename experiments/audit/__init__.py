"""A privacy audit: attacks on the real pipeline, and what they find beside the ledger."""
