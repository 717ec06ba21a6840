"""From a user's file to the exact rows of every micro-batch."""
