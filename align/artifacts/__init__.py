"""What stages make: written whole or not at all, verified before use, found by fingerprint."""
