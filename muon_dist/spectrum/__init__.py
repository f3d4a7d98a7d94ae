"""What the singular values of momentum look like, and how many Newton–Schulz steps they need. Knows no ranks."""
