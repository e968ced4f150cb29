"""What is run beside the tutorial: python -m tools.NAME"""
