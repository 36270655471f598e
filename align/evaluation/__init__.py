"""What is measured on finished policies, and how sure one can be of it."""
