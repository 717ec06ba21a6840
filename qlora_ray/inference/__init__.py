"""What is done with a trained adapter: answering, merging, verifying, handing over."""
